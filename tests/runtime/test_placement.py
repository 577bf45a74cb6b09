import pytest
import torch

from flashvec.runtime.placement import choose_devices, choose_dtype


def test_devices(monkeypatch):
    assert choose_devices("cuda:1") == [torch.device("cuda", 1)] == choose_devices(torch.device("cuda:1"))
    assert choose_devices(["cpu", "cpu"]) == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
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


def test_dtypes():
    assert choose_dtype("float16") == choose_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match="dtype is 'int4', known are float32, bfloat16, float16"):
        choose_dtype("int4")
