from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashvec.runtime.pooling import (
    DENSE_FUNCTIONS,
    DenseHead,
    cut_ranges,
    dequantize,
    finish,
    quantize,
    vector_length,
)
from flashvec.runtime.spec import DecoderSpec, ModelSpec

SPEC = ModelSpec(DecoderSpec("llama", 9, 4, 4, 1, 1, 1, 4, 9, 1e-6), "bidirectional", ("mean",), "hf")


def test_cut_before_normalising():
    x = torch.randn(3, 6)
    torch.testing.assert_close(finish(SPEC, x, (), None, 4), F.normalize(x[:, :4], dim=-1))
    torch.testing.assert_close(finish(SPEC, x, (), False, 4), x[:, :4])


def test_a_sentence_transformers_folder_cuts_after_its_own_normalisation():
    x, spec = torch.randn(3, 6), replace(SPEC, layout="sentence-transformers")
    torch.testing.assert_close(finish(spec, x, (), None, 4), F.normalize(x, dim=-1)[:, :4])
    torch.testing.assert_close(finish(spec, x, (), True, 4), F.normalize(x[:, :4], dim=-1))
    torch.testing.assert_close(finish(replace(spec, normalize=False), x, (), None, 4), x[:, :4])


def test_a_zero_vector_stays_zero():
    assert not finish(SPEC, torch.zeros(1, 4), (), None, None).any()


@pytest.mark.parametrize("activation", DENSE_FUNCTIONS)
def test_dense_heads(activation):
    x, w, b = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    want = DENSE_FUNCTIONS[activation](F.linear(x, w, b))
    torch.testing.assert_close(DenseHead(w, b, activation)(x), want)
    torch.testing.assert_close(DenseHead(w, None, activation)(x), DENSE_FUNCTIONS[activation](F.linear(x, w)))


def test_dense_heads_give_a_vector_the_same_bits_in_every_batch():
    head, x = DenseHead(torch.randn(96, 64), torch.randn(96), "tanh"), torch.randn(300, 64)
    together = head(x)
    assert all(torch.equal(head(x[i : i + n]), together[i : i + n]) for i, n in ((0, 1), (7, 2), (40, 33), (299, 1)))


def test_number_formats():
    x = np.array([[-1.0, 0.0, 0.5, 1.0, 2.0, -2.0, 0.1, -0.1]], np.float32)
    ranges = ((-1.0,) * 8, (1.0,) * 8)
    assert quantize(x, "int8", ranges).tolist() == [[-128, -1, 63, 127, 127, -128, 12, -14]]
    assert quantize(x, "uint8", ranges).tolist() == [[0, 127, 191, 255, 255, 0, 140, 114]]
    assert quantize(x, "ubinary", None).tolist() == [[0b00111010]]
    assert quantize(x, "binary", None).tolist() == [[0b00111010 - 128]]
    assert quantize(x, "float16", None).dtype == np.float16


def test_steps_of_int8_are_alike():
    """Cut towards zero one step would be twice as wide as the others, and half of all values another's."""
    x = np.linspace(0, 1, 100_001, dtype=np.float32)[:, None]
    steps, signed = (quantize(x, name, ((0.0,), (1.0,)))[:, 0].astype(int) for name in ("uint8", "int8"))
    assert np.array_equal(signed, steps - 128) and np.ptp(np.bincount(steps)[:-1]) <= 1


def test_is_sentence_transformers_quantisation():
    """Same bytes as the library that defined these formats, given the same ranges."""
    from sentence_transformers.util.quantization import quantize_embeddings

    x = np.random.default_rng(0).standard_normal((50, 16), np.float32)
    ranges = np.stack([x.min(0), x.max(0)])
    for precision in ("int8", "uint8", "binary", "ubinary"):
        theirs = quantize_embeddings(x, precision=precision, ranges=ranges)
        ours = quantize(x, precision, (ranges[0], ranges[1]))
        assert ours.dtype == theirs.dtype
        # Theirs divides by the size of a step, ours multiplies: a value at a step's edge may fall to either side.
        differences = np.abs(ours.astype(int) - theirs.astype(int))
        assert differences.max() <= (1 if "int" in precision else 0) and differences.mean() < 0.01


def test_steps_stand_for_their_middles():
    x = np.random.default_rng(0).uniform(-1, 2, (50, 16)).astype(np.float32)
    ranges = (x.min(0), x.max(0))
    half = (ranges[1] - ranges[0]) / 255 / 2
    for precision in ("int8", "uint8"):
        assert (np.abs(dequantize(quantize(x, precision, ranges), ranges) - x) <= 1.01 * half).all()


def test_refuses_by_name():
    with pytest.raises(ValueError, match="12 is no multiple of 8"):
        quantize(np.zeros((1, 12), np.float32), "binary", None)
    with pytest.raises(ValueError, match=r"enc.calibrate\(texts\)"):
        quantize(np.zeros((1, 8), np.float32), "int8", None)
    with pytest.raises(ValueError, match="'int4'"):
        quantize(np.zeros((1, 8), np.float32), "int4", None)
    with pytest.raises(ValueError, match="ranges are of 4 dimensions, the vectors have 8"):
        quantize(np.zeros((1, 8), np.float32), "int8", ((0.0,) * 4, (1.0,) * 4))


@pytest.mark.parametrize("layout", ["hf", "sentence-transformers"])
@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("normalize", [None, True, False])
def test_ranges_are_cut_with_the_vectors_where_a_cut_is_the_start_of_the_whole(layout, is_unit, normalize):
    ranges = ((-1.0, -2.0, -3.0, -4.0), (1.0, 2.0, 3.0, 4.0))
    spec, x = replace(SPEC, layout=layout, normalize=is_unit, int8_ranges=ranges), torch.randn(5, 4)
    is_start = torch.equal(finish(spec, x, (), normalize, 3), finish(spec, x, (), normalize, None)[:, :3])
    assert cut_ranges(spec, 3, normalize) == (((-1.0, -2.0, -3.0), (1.0, 2.0, 3.0)) if is_start else None)
    assert cut_ranges(spec, 4, normalize) == ranges and cut_ranges(spec, 5, normalize) is None
    assert cut_ranges(replace(spec, int8_ranges=None), 4, normalize) is None


@pytest.mark.parametrize("layout", ["hf", "sentence-transformers"])
@pytest.mark.parametrize("is_unit", [True, False])
def test_ranges_are_used_on_the_vectors_that_they_were_measured_on(layout, is_unit):
    spec, x = replace(SPEC, layout=layout, normalize=is_unit), torch.randn(5, 4)
    ways = [(dim, normalize) for dim in (2, 3, 4) for normalize in (None, True, False)]

    def vectors(dim, normalize):
        return finish(spec, x, (), normalize, None if dim == 4 else dim)

    for measured in ways:
        width, length = measured[0], vector_length(spec, *measured)
        known = replace(spec, int8_ranges=((0.0,) * width, (1.0,) * width), int8_length=length)
        for dim, normalize in ways:
            start = vectors(*measured)[:, :dim]
            fits = dim <= width and torch.allclose(vectors(dim, normalize), start)
            assert (cut_ranges(known, dim, normalize) is not None) == fits, (measured, dim, normalize)
