"""Vectors through the Triton kernels, with the last layer run for pooled tokens alone, are the CPU path's vectors."""

import numpy as np
import pytest
import torch
from family_models import models, texts_of

from flashvec.kernels import backend
from flashvec.runtime import pooling as pooling_module
from flashvec.runtime.batches import TokenRows, host_batch
from flashvec.runtime.pooling import pooled_tokens
from flashvec.runtime.program import embedding_program
from flashvec.runtime.spec import ModelSpec

LENGTHS = [1, 3, 9, 30, 70]


def spec_of(decoder, pooling, **facts):
    return ModelSpec(decoder=decoder.spec, attention="bidirectional", pooling=pooling, layout="hf", **facts)


@pytest.mark.parametrize("pooling", [("mean",), ("last",), ("cls",), ("mean", "last"), ("weighted_mean",)], ids=str)
@pytest.mark.parametrize("instruction", [0, 1])
def test_kernels_give_the_cpu_paths_vectors(pooling, instruction, interpreter, monkeypatch):
    _, decoder = models("qwen3", "bidirectional")
    texts = texts_of([n + instruction for n in LENGTHS])
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    spans = np.stack([np.full(len(texts), instruction), lengths], 1).astype(np.int64)
    batch = host_batch(TokenRows(np.concatenate(texts), lengths, spans), decoder.row_plan(int(lengths.sum())))
    program = embedding_program(spec_of(decoder, pooling), ())
    (want,) = program.run(decoder, batch)
    before, pool, longest = backend.launches.copy(), pooling_module.mean_pool, []
    monkeypatch.setattr(
        pooling_module, "mean_pool", lambda *a, **keys: longest.append(keys["longest"]) or pool(*a, **keys)
    )
    with interpreter():
        (got,) = program.run(decoder, batch)
    assert set(longest) == {int(lengths.max())}  # short texts are pooled in one launch
    assert (backend.launches - before)["_mean_pool_fwd_kernel"] == len(pooling)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # unit vectors


def test_pooled_tokens_hold_all_modes():
    _, decoder = models("qwen3", "bidirectional")
    lengths, spans = np.array([5, 7]), np.array([[2, 5], [0, 7]])
    for pooling, want in [
        (("mean",), [[2, 5], [0, 7]]),
        (("last",), [[4, 5], [6, 7]]),
        (("cls",), [[0, 1], [0, 1]]),
        (("cls", "mean"), [[0, 5], [0, 7]]),
    ]:
        assert pooled_tokens(spec_of(decoder, pooling), lengths, spans).tolist() == want
    prompted = spec_of(decoder, ("cls",), span="prompt_tokens")
    assert pooled_tokens(prompted, lengths, spans).tolist() == [[2, 3], [0, 1]]
