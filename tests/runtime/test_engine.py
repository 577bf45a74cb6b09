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
