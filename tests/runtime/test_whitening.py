"""Whitening: by numpy, kept by `save`, run by sentence-transformers, and by the command."""

import json

import numpy as np
import pytest
from tiny_models import TEXTS, tiny_checkpoint
from typer.testing import CliRunner
from written_folders import TOLERANCE, library_difference, library_model

from flashvec import Encoder
from flashvec.runtime import whitening
from flashvec.runtime.cli import app
from flashvec.runtime.devices import SpreadEncoder
from flashvec.runtime.whitening import SMOOTHING, fit_whitening

DOCUMENTS = [f"{text} {number}" for number in range(6) for text in TEXTS]


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return (3 + rng.normal(size=(200, 12)) @ np.diag(np.linspace(0.1, 4, 12)) @ rng.normal(size=(12, 12))).astype("f4")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("power", [0, 0.25, 0.5])
def test_axes_are_principal_and_weigh_as_the_power_says(vectors, power):
    weight, bias = fit_whitening(vectors, power)
    y = vectors.astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    covariance = y.T @ y / len(y)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    before = np.linalg.eigvalsh(np.cov(vectors, rowvar=False, bias=True))[::-1]
    expected = before * (before + SMOOTHING * before.mean()) ** (-2 * power)
    found = np.diag(covariance)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)
    assert found.sum() == pytest.approx(before.sum(), rel=1e-4) and (np.diff(found) <= 0).all()


def test_without_a_power_distances_stay(vectors):
    weight, bias = fit_whitening(vectors, 0)
    y = vectors @ weight.T + bias
    np.testing.assert_allclose(
        np.linalg.norm(y[:50] - y[50:100], axis=1), np.linalg.norm(vectors[:50] - vectors[50:100], axis=1), rtol=1e-4
    )


def test_few_texts_leave_no_axis_that_outweighs_those_they_lie_on(vectors):
    weight, _ = fit_whitening(vectors[:5])
    sizes = np.linalg.norm(weight, axis=1)
    assert np.isfinite(weight).all() and sizes.max() / sizes.min() < (12 / SMOOTHING + 1) ** 0.25 + 1e-3


@pytest.mark.parametrize(
    ("rows", "power", "named"),
    [
        (200, 0.6, r"power is 0.6, expected 0 \(the mean alone\) to 0.5"),
        (200, -0.1, "power is -0.1"),
        (1, 0.25, "two texts at least, better some hundreds; here are 1"),
    ],
)
def test_bad_input_is_named(vectors, rows, power, named):
    with pytest.raises(ValueError, match=named):
        fit_whitening(vectors[:rows], power)


def test_vectors_that_are_not_finite_are_refused(vectors):
    lost = vectors[:20].copy()
    lost[3, 1], lost[7] = np.nan, np.inf
    with pytest.raises(ValueError, match="whitening: 2 of 20 texts have no finite vector: leave them out"):
        fit_whitening(lost)


def test_texts_that_are_all_alike_are_refused(tmp_path):
    tiny_checkpoint(tmp_path)
    encoder = Encoder.load(tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="all alike"):
        encoder.whiten(["the cat sleeps"] * 5)
    with pytest.raises(TypeError, match="texts is a str"):
        encoder.whiten("the cat sleeps")
    with pytest.raises(ValueError, match=r"power is 0\.6"):
        encoder.whiten(unread(), power=0.6)
    assert not encoder.spec.dense and not encoder.heads


def unread():
    """Texts that must not be asked for."""
    raise AssertionError
    yield


def test_blocks_change_nothing_but_roundings(vectors, monkeypatch):
    whole = fit_whitening(vectors)
    monkeypatch.setattr(whitening, "BLOCK_ROWS", 7)
    for x, y in zip(whole, fit_whitening(vectors), strict=True):
        np.testing.assert_allclose(np.abs(x), np.abs(y), rtol=1e-4, atol=1e-5)


def test_an_encoder_is_fitted_to_its_texts(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    raw = encoder.embed(DOCUMENTS, normalize=False)
    encoder.calibrate(DOCUMENTS)
    encoder.whiten(DOCUMENTS, power=0.3)
    weight, bias = fit_whitening(raw, 0.3)
    found = encoder.embed(DOCUMENTS)
    np.testing.assert_allclose(found, unit(raw @ weight.T + bias), atol=1e-5)
    cut = encoder.embed(DOCUMENTS, truncate_dim=8)
    np.testing.assert_allclose(cut, unit((raw @ weight.T + bias)[:, :8]), atol=1e-5)
    assert encoder.spec.int8_ranges is None and encoder.spec.embedding_size == 32
    assert np.abs(found.mean(0)).max() < 0.1 < np.abs(unit(raw).mean(0)).max()
    encoder.save(tmp_path / "saved")
    assert np.array_equal(Encoder.load(tmp_path / "saved", dtype="float32").embed(DOCUMENTS), found)
    assert library_difference(tmp_path / "saved", "a whitened encoder") < TOLERANCE


def test_heads_and_cuts_that_are_there_stay(tmp_path):
    """A model that has dense layers and is cut: fitted to whole vectors, and cut as before."""
    library_model(tmp_path)
    encoder = Encoder.load(tmp_path / "model", dtype="float32", truncate_dim=10)
    raw = Encoder.load(tmp_path / "model", dtype="float32").embed(DOCUMENTS, normalize=False)
    encoder.whiten(DOCUMENTS)
    assert [head.out_features for head in encoder.spec.dense] == [96, 24, 24] and encoder.spec.truncate_dim == 10
    weight, bias = fit_whitening(raw)
    expected = unit(raw @ weight.T + bias)[:, :10]  # sentence-transformers cuts after it has normalised
    np.testing.assert_allclose(encoder.embed(DOCUMENTS), expected, atol=1e-5)


def test_an_encoder_on_several_devices_says_where_to_whiten():
    with pytest.raises(ValueError, match="do it on one, save it, and load the folder"):
        SpreadEncoder.whiten(None, DOCUMENTS)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_writes_an_encoder_for_a_collection(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    lines = [json.dumps({"body": text, "n": i}) for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    command = ["whiten", tmp_path / "docs.jsonl", "--model", tmp_path / "model", "--out", tmp_path / "fitted"]
    column = ["--text-column", "body", "--dtype", "float32"]
    done = run(*command, *column, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "fitted"), "texts": len(DOCUMENTS), "power": 0.25}
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    encoder.whiten(DOCUMENTS)
    fitted = Encoder.load(tmp_path / "fitted", dtype="float32")
    assert np.array_equal(fitted.embed(DOCUMENTS), encoder.embed(DOCUMENTS))
    again = run(*command, *column)
    assert again.exit_code and "exists and is not empty" in str(again.exception)
    spoken = run(*command, *column, "--overwrite", "--sample", 20)
    assert spoken.exit_code == 0 and "fitted to 20 texts" in spoken.output and "20 texts for 32 axes" in spoken.output
    own = run(*command[:-1], tmp_path / "model", *column, "--overwrite")
    assert own.exit_code and "is the model's own folder" in str(own.exception)
    missing = run("whiten", tmp_path / "nowhere.txt", "--model", tmp_path / "model", "--out", tmp_path / "x")
    assert missing.exit_code and "nowhere.txt" in str(missing.exception) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["whiten", "calibrate"])
@pytest.mark.parametrize("given", [{"precision": "binary"}, {"output": "torch"}, {"spans": []}])
def test_what_would_spoil_the_vectors_is_refused(method, given, tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    enc = Encoder.load(tmp_path / "tiny")
    with pytest.raises(TypeError, match=f"'{next(iter(given))}' is no argument here"):
        getattr(enc, method)(DOCUMENTS, **given)
    with pytest.raises(TypeError, match="'truncate_dim' is no argument here"):
        enc.whiten(DOCUMENTS, truncate_dim=8)
    assert enc.embed("as before").shape == (32,)
