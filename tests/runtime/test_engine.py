import numpy as np
import pytest
import torch
from family_models import models, texts_of

from flashvec.runtime import engine


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_text_comes_back_once(workers):
    _, decoder = models("llama", "bidirectional")
    texts = texts_of([3, 9, 9, 1, 20, 64, 2] * 5)
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    done = list(engine.run(decoder, np.concatenate(texts), lengths, 70, False, workers))
    assert sorted(np.concatenate([d.indices for d in done]).tolist()) == list(range(len(texts)))
    for d in done:
        assert d.schedule.num_tokens == lengths[d.indices].sum() <= len(d.hidden_TD)
        assert d.hidden_TD.dtype == torch.float32


def test_a_worker_that_fails_says_so():
    _, decoder = models("llama", "bidirectional")
    ids = np.array([1, 2, 10**6], dtype=np.int32)
    threads = torch.get_num_threads()
    with pytest.raises(IndexError):
        list(engine.run(decoder, ids, np.array([1, 1, 1], dtype=np.int32), 1, False, 2))
    assert torch.get_num_threads() == threads


def test_budgets():
    assert engine.default_budget(torch.device("cpu")) == 2048
    assert engine.default_budget(torch.device("cuda")) == 16_384


def test_rotary_tables_grow_while_another_worker_reads_them():
    """A worker keeps the tables it asked for, though another one replaces them by shorter ones meanwhile."""
    from flashvec.kernels.schedule import build_schedule
    from flashvec.runtime.decoder import Decoder

    class Meddled(Decoder):
        """Another worker, slower to start, puts its short tables in place right after ours."""

        def __setattr__(self, name, value):
            if name == "_tables" and value:
                value = [(cos[:8], sin[:8]) for cos, sin in value]
            super().__setattr__(name, value)

    _, plain = models("llama", "bidirectional")
    meddled = Meddled(plain.spec, plain.embedding_VD, plain.layers, plain.norm_D)
    schedule = build_schedule([2000])
    for ours, theirs in zip(meddled._rope_rows(schedule), plain._rope_rows(schedule), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
