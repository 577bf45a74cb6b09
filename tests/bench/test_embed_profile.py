import pytest
from tiny_models import TEXTS, tiny_checkpoint
from typer.testing import CliRunner

from flashvec.bench import cli as bench_cli
from flashvec.bench.embed_profile import PARTS, REST, profile, table
from flashvec.runtime.cli import app
from flashvec.runtime.encoder import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "model"
    tiny_checkpoint(path, "llama")
    return path


def test_parts_add_up_and_functions_are_as_before(folder):
    encoder = Encoder.load(folder, dtype="float32")
    before = [getattr(owner, name) for _, owner, name in PARTS]
    plain = encoder.embed(list(TEXTS))
    parts = profile(encoder, TEXTS)
    assert [getattr(owner, name) for _, owner, name in PARTS] == before
    assert (encoder.embed(list(TEXTS)) == plain).all()
    assert {name for name, *_ in PARTS} <= set(parts) and list(parts)[-1] == REST
    layers = len(encoder.decoder.layers)
    assert parts["attention, rotation"].calls % layers == 0 and parts["activation"].calls % layers == 0
    assert parts["matrix products"].calls == 4 * parts["attention, rotation"].calls
    assert all(part.seconds >= 0 for part in parts.values())
    lines = table(parts, 100)
    assert len(lines) == len(parts) + 1 and "tokens/s" in lines[-1]


def test_workers_that_overlap_are_refused(folder):
    encoder = Encoder.load(folder)
    encoder.workers = 2
    with pytest.raises(ValueError, match="encoder has 2 workers"):
        profile(encoder, TEXTS)


def test_command(folder, monkeypatch):
    monkeypatch.setattr(bench_cli, "PROFILE_TOKENS", 200)
    done = CliRunner().invoke(app, ["bench", str(folder), "--profile", "--lengths", "sentences"])
    assert done.exit_code == 0 and "matrix products" in done.output and "tokens/s" in done.output, done.output
    with pytest.raises(ValueError, match="--lengths is 'novels'; known are queries"):
        CliRunner().invoke(app, ["bench", str(folder), "--lengths", "novels"], catch_exceptions=False)
    with pytest.raises(ValueError, match="--json goes with --profile"):
        CliRunner().invoke(app, ["bench", str(folder), "--json"], catch_exceptions=False)
