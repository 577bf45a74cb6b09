"""What the engine asks of a device. With a GPU the real one is held to it; the stand-in of other tests always is."""

import numpy as np
import pytest
import torch
from fake_accelerator import FakeAccelerator

from flashvec.runtime.accelerator import Cuda

DEVICES = ["fake", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def accelerator(request):
    return FakeAccelerator() if request.param == "fake" else Cuda(torch.device("cuda", 0))


def test_values_may_change_as_soon_as_they_are_sent(accelerator):
    values = np.arange(1000, dtype=np.int32)
    sent = accelerator.send(values)
    values[:] = -1
    again = accelerator.send(values, into=sent.clone())
    assert sent.cpu().tolist() == list(range(1000)) and (again.cpu() == -1).all()
    assert accelerator.send(np.arange(3)).dtype == torch.int64


def test_fetched_values_are_there_after_a_mark(accelerator):
    x = accelerator.send(np.arange(1000, dtype=np.int32)).float()
    host = accelerator.fetch(x)
    accelerator.mark().wait()
    assert host.device.type == "cpu" and host.tolist() == list(range(1000))


def test_a_recording_reads_its_inputs_anew(accelerator):
    x = accelerator.send(np.ones(8, np.int32))
    recording = accelerator.record(lambda: (x * 2, x.sum()[None]))
    for value in (3, 5):
        accelerator.send(np.full(8, value, np.int32), into=x)
        recording.replay()
        assert recording.outputs[0].tolist() == [2 * value] * 8 and recording.outputs[1].item() == 8 * value


def test_memory(accelerator):
    accelerator.release()
    free, total = accelerator.memory()
    assert 0 < free <= total
