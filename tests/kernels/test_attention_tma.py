import math

import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels import attention_tma as module
from flashvec.kernels import backend
from flashvec.kernels.attention import attention_reference
from flashvec.kernels.schedule import build_schedule


@pytest.mark.parametrize("lengths", [[40, 129, 128], [200, 3]], ids=str)
def test_candidate_matches_reference(lengths, device, interpreted, monkeypatch):
    monkeypatch.setattr(module, "SHORTER", 30)
    schedule = build_schedule(lengths, device=device)
    q, k, v = torch.randn(sum(lengths), 8, 64, device=device).half().split([4, 2, 2], 1)
    neighbour = lengths[-1] <= 30
    if neighbour:  # it is not run, and its keys and values are read by boxes that pass the first one's end
        k[lengths[0] :] = v[lengths[0] :] = math.nan
    got, _ = module.attention_tma(q, k, v, schedule, scale=0.2)
    assert backend.launches["_attention_tma_fwd_kernel"]
    same, _ = attention_reference(q, k, v, schedule, scale=0.2)
    truth, _ = attention_reference(*(x.to(wider(x.dtype)) for x in (q, k, v)), schedule, scale=0.2)
    rows = slice(0, lengths[0] if neighbour else None)
    assert_as_close_as_torch(got[rows], same[rows], truth[rows])
    assert not neighbour or not got[lengths[0] :].any()
