"""Where kernels run, and that nothing needs triton."""

import subprocess
import sys

import torch

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


def test_runs_without_triton_with_one_notice():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(4, 2, 8)"
    assert done.stderr.count("triton is not installed") == 1


def test_cpu_tensors_take_the_cpu_form():
    assert backend.implementation(torch.zeros(1)) == "cpu"
    assert backend.instruction_set() in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "default", "neon", "sve256")
