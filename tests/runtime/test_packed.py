"""An encoder whose weights are packed once is the same encoder: other blocks in memory, the same numbers."""

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.kernels.linear import can_pack
from flashvec.runtime import encoder as encoder_module
from flashvec.runtime.corpus.machine import model_facts
from flashvec.runtime.decoder import PRODUCTS
from flashvec.runtime.wide import widened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder)
    return folder


def load(folder, monkeypatch, dtype, *, packed):
    monkeypatch.setattr(encoder_module, "pays_to_pack", can_pack if packed else lambda weight: False)
    return Encoder.load(folder, dtype=dtype)


@pytest.fixture(params=["float32", "bfloat16"])
def both(request, folder, monkeypatch):
    """Packed and plain."""
    if not can_pack(torch.zeros(1, 1, dtype=getattr(torch, request.param))):
        pytest.skip(f"this torch packs no {request.param} weight on this processor")
    return [load(folder, monkeypatch, request.param, packed=packed) for packed in (True, False)]


def test_vectors_are_the_same(both):
    texts = [*TEXTS, *(f"{text} and {text}" for text in TEXTS)]
    packed, plain = (encoder.embed(texts) for encoder in both)
    np.testing.assert_allclose(packed, plain, atol=1e-6 if both[0].dtype == torch.float32 else 2e-2)
    alone = np.concatenate([both[0].embed([text]) for text in texts])
    assert np.array_equal(packed, alone)


def test_no_weight_is_held_twice(both):
    layers = both[0].decoder.layers
    assert all(getattr(layer, name).is_mkldnn for layer in layers for name in PRODUCTS)
    assert not any(getattr(layer, name).is_mkldnn for layer in both[1].decoder.layers for name in PRODUCTS)


def test_what_is_saved_is_the_same(both, tmp_path):
    for name, encoder in zip(("packed", "plain"), both, strict=True):
        encoder.save(tmp_path / name)
    names = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*"))
    assert any(name.suffix == ".safetensors" for name in names)
    for name in names:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_a_job_knows_the_weights(both):
    packed, plain = (model_facts(encoder, {}) for encoder in both)
    assert packed == plain


def test_a_text_beyond_the_dtype_runs_in_fp32_all_the_same(both):
    packed, plain = (widened(encoder.decoder).layers[0] for encoder in both)
    assert all(torch.equal(getattr(packed, name), getattr(plain, name)) for name in PRODUCTS)
    assert packed.qkv.dtype == torch.float32
