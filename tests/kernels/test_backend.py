"""Where kernels run, and that nothing needs triton."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_checkpoint

from flashvec.kernels import backend

WITHOUT_TRITON = """
import sys, logging
sys.modules["triton"] = None                      # `import triton` raises, find_spec says it is not there
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else found(name, *a)
logging.basicConfig(format="%(message)s")
import torch
from flashvec.kernels.attention import attention
from flashvec.kernels.schedule import build_schedule
x = torch.randn(4, 2, 8)
for _ in range(2):
    out = attention(x, x, x, build_schedule([4]), scale=1.0)
print(tuple(out.shape))
"""

EVERY_MODULE = (
    WITHOUT_TRITON.split("import torch")[0]
    + """
import importlib, pathlib, flashvec
root = pathlib.Path(flashvec.__file__).parent
for part in ("kernels", "runtime", "training"):
    for file in sorted((root / part).resolve().rglob("*.py")):
        inner = file.relative_to((root / part).resolve()).with_suffix("").parts
        if "ray" not in inner[-1] and inner[-1] != "__init__":
            importlib.import_module(".".join(["flashvec", part, *inner]))
vectors = flashvec.Encoder.load(sys.argv[1], dtype="float32").embed(["The cat sleeps.", "Prices rose."])
print(vectors.shape, (vectors ** 2).sum(1).round(4).tolist())
"""
)


def test_runs_without_triton_with_one_notice():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(4, 2, 8)"
    assert done.stderr.count("triton is not installed") == 1


def test_every_module_imports_and_an_encoder_embeds_without_triton(tmp_path):
    tiny_checkpoint(tmp_path, "llama")
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 32) [1.0, 1.0]", done.stderr
    assert done.stderr.count("triton is not installed") == 1


def test_a_gpu_that_is_too_old_runs_torch_with_one_notice(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    backend.runs_triton.cache_clear()
    forms = {}
    with caplog.at_level(logging.WARNING, "flashvec"):
        for index, capability in ((5, (7, 5)), (6, (8, 0)), (5, (7, 5))):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            forms[index] = backend.implementation(SimpleNamespace(device=torch.device("cuda", index)))
    backend.runs_triton.cache_clear()
    assert forms == {5: "torch", 6: "triton"}
    (record,) = caplog.records
    assert record.getMessage().startswith("Tesla T4 is older than the kernels support (compute capability 8.0)")


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 7), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 1), "sm_120")],
)  # fmt: skip
def test_a_gpu_takes_the_options_of_one_like_it(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend._device_target.__wrapped__(0).name == name


def test_cpu_tensors_take_the_cpu_form():
    assert backend.implementation(torch.zeros(1)) == "cpu"
    assert backend.instruction_set() in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "default", "neon", "sve256")
