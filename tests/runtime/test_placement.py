import pytest
import torch

from flashvec.runtime.placement import choose_devices, choose_dtype


def test_devices(monkeypatch):
    assert choose_devices(["cpu", "cpu"]) == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert choose_devices("cuda:1") == [torch.device("cuda", 1)] == choose_devices(torch.device("cuda:1"))
    assert [str(d) for d in choose_devices("all")] == ["cuda:0", "cuda:1", "cuda:2"]
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_devices(None) == [torch.device(expected)]


def test_refuses_devices_that_do_not_go_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device='all' spreads texts over all GPUs and there is none here"):
        choose_devices("all")
    with pytest.raises(ValueError, match="device lists cuda:0, cpu: give devices of one kind"):
        choose_devices(["cuda:0", "cpu"])
    with pytest.raises(ValueError, match="device lists nothing"):
        choose_devices([])


@pytest.mark.parametrize(
    ("device", "count", "built", "message"),
    [
        ("gpu", 0, False, "device is 'gpu'; give cpu, cuda, cuda:1"),
        ("mps", 0, False, "device is 'mps'; give cpu, cuda, cuda:1"),
        ("cuda", 0, False, r"device is 'cuda' and this torch is built without CUDA .*: leave it out for the CPU"),
        ("cuda", 0, True, "device is 'cuda' and there is no GPU here: leave it out for the CPU"),
        ("cuda:2", 2, True, "device is 'cuda:2'; the GPUs here are cuda:0, cuda:1"),
        (["cuda:0", "cuda:7"], 2, True, "device is 'cuda:7'"),
    ],
)
def test_refuses_devices_that_are_not_here(device, count, built, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(ValueError, match=message):
        choose_devices(device)


def test_dtypes():
    assert choose_dtype("float16") == choose_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match="dtype is 'int4', known are float32, bfloat16, float16"):
        choose_dtype("int4")
