"""The comparison with torch.compile: the same mathematics on both sides, forms put in place and taken out again."""

import pytest
import torch
from tiny_models import tiny_checkpoint

from flashvec.bench import bench_compiled_forms as bench
from flashvec.runtime import decoder as decoder_module
from flashvec.runtime.encoder import Encoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint(folder, "llama")
    return Encoder.load(folder, dtype="float32").decoder


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """Definitions run as they are: tests need no compiler, and no 20 seconds for it."""
    monkeypatch.setattr(bench, "compiled", lambda form: form)


@pytest.mark.parametrize("op", bench.OPS)
def test_definition_and_form_agree(op, decoder):
    eager, definition = bench.OPS[op]
    want = bench._tensors(definition(*bench.inputs(decoder, 48)[op]))
    for a, b in zip(bench._tensors(eager(*bench.inputs(decoder, 48)[op])), want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_form_that_depends_on_the_row_count_is_found(decoder):
    def odd(x_TD, *rest):
        return bench.rms_norm_reference(x_TD, *rest) * (1 + 1e-6 * (len(x_TD) < 100))

    assert bench.same_bits_at_every_count(bench.rms_norm_reference, decoder, "rms_norm")
    assert not bench.same_bits_at_every_count(odd, decoder, "rms_norm")


def test_layers_run_the_forms_and_get_their_own_back(decoder):
    before, calls = decoder_module.swiglu, []
    with pytest.raises(KeyError), bench.in_place({"swiglu": lambda *args: calls.append(args)}):
        decoder_module.swiglu(1, 2)
        raise KeyError
    assert calls == [(1, 2)] and decoder_module.swiglu is before


def test_rows(decoder, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 2)
    rows = [*bench.bench_ops(decoder, 2), bench.bench_layers(decoder, 2)]
    assert [row["op"] for row in rows] == [*bench.OPS, "layer"]
    assert all(row["eager_ms"] > 0 and row["compiled_to_eager"] > 0 for row in rows)
    assert all(row["same_bits_at_every_row_count"] for row in rows[:-1])


def test_first_calls_are_timed_with_an_empty_and_a_filled_cache(monkeypatch):
    seen = []

    class Run:
        stdout = 'a line of something else\n{"rope": 1.5}\n'

    def run(command, env, **keywords):
        seen.append((command[-3:], env["TORCHINDUCTOR_CACHE_DIR"]))
        return Run()

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.first_calls_in_new_processes("m") == ({"rope": 1.5}, {"rope": 1.5})
    assert seen[0] == seen[1] and seen[0][0] == ["--model", "m", "--first-calls"]
