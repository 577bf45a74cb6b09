"""`Encoder.embed_iter`: vectors of a stream, in order, with a window of it in memory."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny_models import TEXTS

from flashvec.runtime.texts import TruncationWarning


def test_stream_is_bounded_and_in_order(enc):
    drawn = []

    def stream():
        for i in range(25):
            drawn.append(i)
            yield TEXTS[i % len(TEXTS)]

    vectors = enc.embed_iter(stream(), window=10)
    first = next(vectors)
    assert len(drawn) == 10
    rest = list(vectors)
    np.testing.assert_array_equal(np.stack([first, *rest]), enc.embed([TEXTS[i % len(TEXTS)] for i in range(25)]))
    with pytest.raises(TypeError, match="iterable of str"):
        next(enc.embed_iter("cat"))


def test_a_stream_refuses_what_embed_refuses(enc):
    for texts, message in (
        (pd.DataFrame({"text": ["a"]}), r"texts is a table \(DataFrame\)"),
        ({"a": "b"}, "texts is a dict"),
        ({"a", "b"}, "texts is a set"),
        (None, "texts is None"),
    ):
        with pytest.raises(TypeError, match=message):
            list(enc.embed_iter(texts))
    given = iter(["a", "b", "c", "d", "e", None, "g"])
    vectors = enc.embed_iter(given, window=2)
    assert len([next(vectors) for _ in range(4)]) == 4
    with pytest.raises(TypeError, match=r"texts\[5\] is None, a missing value"):
        next(vectors)
    with pytest.raises(ValueError, match="window is 0; expected at least 1"):
        list(enc.embed_iter(["a"], window=0))
    with pytest.raises(ValueError, match="one instruction for all texts"):
        list(enc.embed_iter(["a"], instruction=np.array(["x"])))
    for refused in ({"spans": [[(0, 1)]]}, {"out": np.zeros((1, 32))}):
        (name,) = refused
        with pytest.raises(TypeError, match=f"'{name}' is no argument here .*: call embed for {name}"):
            list(enc.embed_iter(["a"], **refused))


def test_a_stream_of_an_arrow_column(enc):
    column = pa.chunked_array([TEXTS[:3], [], TEXTS[3:]])
    for texts in (column, column.combine_chunks()):
        np.testing.assert_array_equal(list(enc.embed_iter(texts, window=2)), enc.embed(list(TEXTS)))
    with pytest.raises(TypeError, match=r"texts\[1\] is None, a missing value"):
        list(enc.embed_iter(pa.array(["a", None])))


def test_a_stream_takes_embeds_arguments(enc):
    settings = {"instruction": "Query: ", "truncate_dim": 8, "precision": "float16", "max_length": 30}
    with pytest.warns(TruncationWarning) as caught:
        got = np.stack(list(enc.embed_iter(iter(TEXTS), window=5, **settings)))
    assert caught[0].filename == __file__
    with pytest.warns(TruncationWarning):
        np.testing.assert_array_equal(got, enc.embed(list(TEXTS), **settings))
