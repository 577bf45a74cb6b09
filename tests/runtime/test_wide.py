import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from family_models import final_states, models, run_packs, texts_of
from torch import Tensor

from flashvec.runtime.decoder import Decoder
from flashvec.runtime.wide import widened


def converted(decoder, dtype):
    def convert(layer):
        products = ("qkv", "qkv_bias", "out", "out_bias", "gate_up", "gate_up_bias", "down", "down_bias")
        values = {name: getattr(layer, name) for name in products}
        return replace(layer, **{n: x.to(dtype) for n, x in values.items() if x is not None})

    return Decoder(decoder.spec, decoder.embedding_VD.to(dtype), [convert(x) for x in decoder.layers], decoder.norm_D)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_computes_what_a_decoder_with_fp32_weights_computes(family):
    _, decoder = models(family, "bidirectional")
    narrow = converted(decoder, torch.float16)
    whole = converted(narrow, torch.float32)
    texts = texts_of([9, 30, 4])
    got, want = (final_states(d, run_packs(d, texts, False), texts) for d in (widened(narrow), whole))
    half = final_states(narrow, run_packs(narrow, texts, False), texts)
    for a, b, c in zip(got, want, half, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_keeps_no_second_copy_of_the_weights():
    _, decoder = models("llama", "bidirectional")
    narrow = converted(decoder, torch.float16)
    wide = widened(narrow)
    assert wide.dtype == torch.float32 and narrow.dtype == torch.float16
    assert wide.embedding_VD is narrow.embedding_VD and len(wide.layers) == len(narrow.layers)
    first, again = wide.layers[0], wide.layers[0]
    assert first is not again and [layer.qkv.dtype for layer in wide.layers[1:]] == [torch.float32] * (
        len(wide.layers) - 1
    )
    for field in fields(first):
        value = getattr(first, field.name)
        assert not isinstance(value, Tensor) or value.dtype == torch.float32
    assert np.isfinite(first.qkv.numpy()).all() and copy.copy(wide).device == narrow.device
