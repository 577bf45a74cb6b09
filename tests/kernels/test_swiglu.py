import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels.swiglu import ACTIVATIONS, swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 6), (5, 200)], ids=str)
def test_matches_reference(shape, activation, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    before = x.clone()
    got = swiglu(x, activation)
    assert torch.equal(x, before)  # the CPU form works in place, on its own memory
    if shape[0]:
        truth = swiglu_reference(x.to(wider(dtype)), activation)
        gate, up = x.chunk(2, -1)
        assert_as_close_as_torch(got, ACTIVATIONS[activation](gate) * up, truth)


def test_definition(device):
    x = torch.tensor([[0.0, 2.0, 5.0, 3.0]], device=device)
    torch.testing.assert_close(swiglu(x), torch.tensor([[0.0, 2 / (1 + torch.e**-2.0) * 3]], device=device))


def test_rejects(device):
    with pytest.raises(ValueError, match="even width, got 3"):
        swiglu(torch.zeros(1, 3, device=device))
    with pytest.raises(ValueError, match="'tanh'"):
        swiglu(torch.zeros(1, 4, device=device), "tanh")
