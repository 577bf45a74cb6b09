"""Shared fixtures: a device, fixed seeds, and empty tensors poisoned so that a forgotten element shows."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores,
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the processes that a test starts
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are imported: makes the fixture below possible


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """new_empty returns NaN, so an output element that an op forgot fails its test."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **kwargs):
        out = new_empty(self, *size, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def interpreted(device: str) -> Iterator[None]:
    """Run Triton kernels: compiled on a GPU, else in the interpreter. Without it, a test takes the path users get."""
    if device == "cuda":
        yield
        return
    from flashvec.kernels import backend

    with backend.interpreted():
        yield


@pytest.fixture
def interpreter(device: str) -> Callable[[], AbstractContextManager[None]]:
    """A context in which models on the CPU run interpreted kernels; skipped where a GPU compiles them."""
    if device == "cuda":
        pytest.skip("kernels are compiled for the GPU here, and do not run on CPU tensors")
    from flashvec.kernels import backend

    return backend.interpreted


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, for tests that do not change it."""
    from tiny_models import tiny_checkpoint

    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def enc(folder: Path) -> Any:
    """The encoder of `folder`, for tests that do not change it."""
    from flashvec import Encoder

    return Encoder.load(folder, dtype="float32")


@pytest.fixture(scope="session")
def prompted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sentence-transformers opens too, with prompts for queries and documents."""
    from tiny_models import tiny_checkpoint

    from flashvec import Encoder

    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model") / "tiny"
    tiny_checkpoint(source, "llama")
    enc = Encoder.load(source, dtype="float32", attention="bidirectional", pooling="mean", max_length=256)
    prompts = {"query": "Query: ", "document": "Passage: "}
    enc.spec = replace(enc.spec, layout="sentence-transformers", span="prompt_tokens", prompts=prompts)
    enc.save(folder)
    return folder


@pytest.fixture(scope="session")
def prompted(prompted_folder: Path) -> Any:
    """Its encoder, fp32."""
    from flashvec import Encoder

    return Encoder.load(prompted_folder, dtype="float32")
