import numpy as np
import pyarrow as pa
import pytest
from stand_in import NOT_FINITE, StandIn

from flashvec.runtime.corpus.batch import EmbedBatch
from flashvec.runtime.corpus.settings import JobSettings


@pytest.mark.parametrize("precision", ["float32", "float16", "binary"])
def test_rows_in_order_and_null_where_there_is_no_vector(precision):
    step = EmbedBatch(encoder=StandIn(), settings=JobSettings(text_columns=("body",), precision=precision, dims=8))
    table = pa.table({"body": ["a", None, "b", "", "a", NOT_FINITE], "n": range(6)})
    found = step(table)
    assert found.column_names == ["body", "n", "vector"] and found["n"].to_pylist() == list(range(6))
    vectors = found["vector"].to_pylist()
    assert [i for i, vector in enumerate(vectors) if vector is None] == [1, 3, 5]
    expected = StandIn().embed(["a", "b", "a"])[:, :8]
    expected = np.packbits(expected > 0, axis=1) if precision == "binary" else expected.astype(precision)
    np.testing.assert_array_equal(np.array([v for v in vectors if v is not None], expected.dtype), expected)
    assert len(step(table.slice(0, 0))) == 0


def test_refused():
    with pytest.raises(ValueError, match="no int8"):
        EmbedBatch(encoder=StandIn(), settings=JobSettings(text_columns=("a",), precision="int8"))
    with pytest.raises(ValueError, match="no chunks='rows'"):
        EmbedBatch(encoder=StandIn(), settings=JobSettings(text_columns=("a",), long="chunk", chunks="rows"))
    with pytest.raises(ValueError, match="needs text_columns"):
        EmbedBatch(encoder=StandIn(), settings=JobSettings())
