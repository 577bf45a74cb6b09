"""What vectors come as: cut, normalised, in other precisions, on the device, in the caller's own array."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_adapter, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.fitting import FEW_TEXTS


def test_normalize_and_truncate(enc):
    raw = enc.embed(TEXTS[0], normalize=False)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    cut = enc.embed(TEXTS[0], truncate_dim=8)
    np.testing.assert_allclose(cut, raw[:8] / np.linalg.norm(raw[:8]), atol=1e-6)
    with pytest.raises(ValueError, match="truncate_dim is 33, the vectors have 32"):
        enc.embed("x", truncate_dim=33)


def test_torch_output(enc):
    vectors = enc.embed(list(TEXTS), output="torch")
    assert isinstance(vectors, torch.Tensor) and vectors.device == enc.device
    np.testing.assert_array_equal(vectors.numpy(), enc.embed(list(TEXTS)))
    with pytest.raises(ValueError, match="output is 'jax'"):
        enc.embed("x", output="jax")


def test_writes_into_an_array_or_memmap(enc, tmp_path, monkeypatch):
    out = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, (len(TEXTS), 32))
    assert enc.embed(list(TEXTS), out=out) is out
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), enc.embed(list(TEXTS)))
    with pytest.raises(ValueError, match=r"out has shape \(2, 2\)"):
        enc.embed("x", out=np.zeros((2, 2)))
    monkeypatch.setattr(enc, "_embed_rows", lambda *rest: pytest.fail("it worked before it looked"))
    for wrong in (np.zeros((len(TEXTS), 31), np.float32), np.zeros((len(TEXTS), 32), np.int32)):
        with pytest.raises(ValueError, match="out has"):
            enc.embed(list(TEXTS), out=wrong)


def test_precisions(folder):
    enc = Encoder.load(folder, dtype="float32")
    full = enc.embed(list(TEXTS))
    np.testing.assert_array_equal(enc.embed(list(TEXTS), precision="float16"), full.astype(np.float16))
    np.testing.assert_array_equal(enc.embed(list(TEXTS), precision="ubinary"), np.packbits(full > 0, axis=1))
    assert enc.embed(list(TEXTS), precision="binary").dtype == np.int8
    with pytest.raises(ValueError, match=r"calibrate\(texts\)"):
        enc.embed("x", precision="int8")
    with pytest.raises(ValueError, match="precision is 'int4'"):
        enc.embed("x", precision="int4")
    enc.calibrate(TEXTS)
    small = enc.embed(list(TEXTS), precision="int8")
    assert small.dtype == np.int8
    low, high = (np.array(r) for r in enc.spec.int8_ranges)
    back = (small.astype(np.float32) + 128) / 255 * (high - low) + low
    assert np.abs(back - full).max() <= (high - low).max() / 255 * 1.01
    assert small.min() == -128 and small.max() == 127  # the calibration texts' own ends


def test_integers_are_written_into_what_holds_them(folder):
    enc = Encoder.load(folder, dtype="float32")
    enc.calibrate(TEXTS)
    wide = enc.embed(list(TEXTS), precision="uint8", out=np.zeros((len(TEXTS), 32), np.int16))
    np.testing.assert_array_equal(wide, enc.embed(list(TEXTS), precision="uint8"))
    for precision, dtype in (("uint8", np.int8), ("int8", np.uint8), ("ubinary", np.int8), ("binary", np.uint8)):
        out = np.zeros((len(TEXTS), 4 if "binary" in precision else 32), dtype)
        with pytest.raises(ValueError, match=f"out has dtype {out.dtype}, the vectors are "):
            enc.embed(list(TEXTS), precision=precision, out=out)
    for dtype in (np.complex64, object, bool):
        with pytest.raises(ValueError, match=r"out has dtype .*: it would not hold their values"):
            enc.embed(["x"], out=np.zeros((1, 32), dtype))
    fixed = np.zeros((1, 32), np.float32)
    fixed.flags.writeable = False
    before = enc.num_texts_run
    with pytest.raises(ValueError, match="out is read-only"):
        enc.embed(["x"], out=fixed)
    assert enc.num_texts_run == before
    assert enc.embed(["x"], out=np.zeros((1, 32), np.float16)).any()
    with pytest.raises(TypeError, match=r"out is list: give a numpy array or memmap of shape \(1, 32\)"):
        enc.embed(["x"], out=[0.0])


def test_ranges_are_not_taken_from_vectors_that_are_not_finite(folder, monkeypatch):
    enc = Encoder.load(folder, dtype="float32")
    monkeypatch.setattr(enc, "embed", lambda texts, **_: np.array([[1, 2], [np.nan, 2], [3, 4]], np.float32))
    with pytest.raises(ValueError, match="calibrate: 1 of 3 texts have no finite vector: leave them out"):
        enc.calibrate(["a", "b", "c"])
    assert enc.spec.int8_ranges is None


def test_ranges_of_few_texts_are_noted_and_of_equal_ones_refused(folder, caplog):
    enc = Encoder.load(folder, dtype="float32")
    with pytest.raises(ValueError, match="calibrate: the texts' vectors are all alike: give texts that differ"):
        enc.calibrate(["abc", "abc"])
    assert enc.spec.int8_ranges is None
    with caplog.at_level(logging.WARNING, "flashvec"):
        enc.calibrate(["abc", "a river"])
        assert "int8 ranges are of 2 texts" in caplog.text
        caplog.clear()
        enc.calibrate([f"text {i}" for i in range(FEW_TEXTS)])
    assert not caplog.text


def test_int8_ranges_are_those_of_the_vectors_they_are_used_on(folder, tmp_path):
    enc, texts = Encoder.load(folder, dtype="float32"), list(TEXTS)
    with pytest.raises(TypeError, match="texts is a str"):
        enc.calibrate("one text")
    enc.calibrate(texts)
    for precision in ("int8", "uint8"):  # cut vectors have unit length again: values outside the whole ones' ranges
        with pytest.raises(ValueError, match=r"for 8 dim.* are for 32\): call enc.calibrate\(texts, truncate_dim=8"):
            enc.embed(texts, truncate_dim=8, precision=precision)
    enc.calibrate(texts, truncate_dim=8)
    small = enc.embed(texts, truncate_dim=8, precision="uint8")
    assert (small.min(0) == 0).all() and (small.max(0) == 255).all()
    with pytest.raises(
        ValueError, match=r"32 dimensions \(the encoder's are for 8\): call enc.calibrate\(texts\) once"
    ):
        enc.embed(texts, precision="int8")
    enc.save(tmp_path / "cut")
    again = Encoder.load(tmp_path / "cut", dtype="float32")
    np.testing.assert_array_equal(again.embed(texts, truncate_dim=8, precision="uint8"), small)
    enc.calibrate(texts, normalize=False)
    for given, cure in ((None, r"texts\)"), (True, r"texts, normalize=True\)")):
        with pytest.raises(ValueError, match=rf"of vectors of another length: own\): call enc.calibrate\({cure} once"):
            enc.embed(texts, precision="int8", normalize=given)
    enc.save(tmp_path / "long")
    assert Encoder.load(tmp_path / "long").spec.int8_length == "own"
    whole = enc.embed(texts, normalize=False, precision="int8")
    np.testing.assert_array_equal(enc.embed(texts, normalize=False, truncate_dim=8, precision="int8"), whole[:, :8])


def test_int8_ranges_do_not_outlive_the_vectors_they_were_measured_on(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    tiny_adapter(model, tmp_path / "adapter")
    enc = Encoder.load(tmp_path / "model", dtype="float32")
    enc.calibrate(TEXTS)
    enc.save(tmp_path / "saved")
    others = [{"attention": "causal"}, {"pooling": "max"}, {"layers": 2}, {"truncate_dim": 8}]
    for change in (*others, {"adapters": tmp_path / "adapter"}):
        changed = Encoder.load(tmp_path / "saved", dtype="float32", **change)
        assert changed.spec.int8_ranges is None
        changed.save(tmp_path / "changed", overwrite=True)
        assert Encoder.load(tmp_path / "changed", dtype="float32").spec.int8_ranges is None
    for same in ({"max_length": 64}, {"layers": 3}, {"pooling": "mean", "attention": "bidirectional"}):
        assert Encoder.load(tmp_path / "saved", **same).spec.int8_ranges == enc.spec.int8_ranges
    enc.spec = dataclasses.replace(enc.spec, normalize=False)  # here a cut is the start of the whole vector
    enc.calibrate(TEXTS)
    enc.save(tmp_path / "raw")
    cut = Encoder.load(tmp_path / "raw", truncate_dim=8).spec.int8_ranges
    assert cut == tuple(side[:8] for side in enc.spec.int8_ranges)
