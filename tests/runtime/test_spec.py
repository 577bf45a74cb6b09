import json
from dataclasses import replace

import pytest

from flashvec.kernels.rope import Rope
from flashvec.runtime.describe import describe_spec, spec_rows
from flashvec.runtime.spec import DecoderSpec, DenseSpec, ModelSpec, spec_from_dict

DECODER = DecoderSpec(
    "gemma3_text", 100, 32, 64, 2, 4, 2, 8, 512, 1e-6,
    ropes=(Rope(1e6, "linear", 8.0), Rope()), layer_ropes=(0, 1), layer_windows=(None, 5),
)  # fmt: skip
SPEC = ModelSpec(
    DECODER,
    "bidirectional",
    ("mean", "last"),
    "sentence-transformers",
    dense=(DenseSpec(64, 16, True, "tanh"),),
    prompts={"query": "Query: "},
    default_prompt_name="query",
    int8_ranges=((0.0,) * 16, (1.0,) * 16),
)


def test_survives_json():
    assert spec_from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@pytest.mark.parametrize("change", [{"surprise": 1}, {"decoder": {"family": "llama"}}, {"pooling": None}])
def test_refuses_what_is_no_spec(change):
    with pytest.raises(ValueError, match="not a flashvec model spec"):
        spec_from_dict({**SPEC.to_dict(), **change})


def test_width():
    assert SPEC.embedding_size == 16
    assert replace(SPEC, truncate_dim=8).embedding_size == 8
    assert replace(SPEC, dense=()).embedding_size == 64


def test_reads_as_lines_of_facts():
    rows = dict(spec_rows(SPEC))
    assert rows["attention"] == "bidirectional, 1 of 2 layers see 5 tokens to each side"
    assert rows["vector"] == "16 dimensions after dense 64 -> 16"
    assert rows["prompt query"] == "'Query: ' (default)"
    assert rows["rope"] == "linear, theta 1e+06, factor 8; default, theta 10000"
    assert str(SPEC) == describe_spec(SPEC) and len(str(SPEC).splitlines()) == len(rows)
