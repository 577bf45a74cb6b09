"""The command line as a person meets it, in a process of its own."""

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_checkpoint

import flashvec
from flashvec.runtime.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint(folder, "llama")
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "flashvec.runtime.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_command_has_an_example():
    assert all("Example: `flashvec " in (command.callback.__doc__ or "") for command in app.registered_commands)


def test_version_and_help():
    assert run("--version").stdout.strip() == f"flashvec {flashvec.__version__}"
    for command in ("info", "convert", "verify"):
        done = run(command, "--help")
        assert done.returncode == 0 and "Example" in done.stdout


def test_info(folder):
    done = run("info", folder)
    assert done.returncode == 0 and "bidirectional" in done.stdout and "not trained for" in done.stderr
    spec = json.loads(run("info", folder, "--attention", "causal", "--json").stdout)["spec"]
    assert spec["attention"] == "causal" and spec["pooling"] == ["last"]


def test_convert_then_verify(folder, tmp_path):
    done = run("convert", folder, tmp_path / "out", "--pooling", "mean")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "modules.json").is_file()
    again = run("convert", folder, tmp_path / "out")
    assert again.returncode == 1 and "overwrite" in again.stderr
    assert "not trained for" not in run("info", tmp_path / "out").stderr

    texts = tmp_path / "texts.txt"
    texts.write_text("The cat sleeps.\nMix flour and water.\nPrices rose.\n")
    done = run("verify", tmp_path / "out", texts, "--dtype", "float32", "--json")
    assert done.returncode == 0 and not json.loads(done.stdout)["failures"]
    shown = run("verify", tmp_path / "out", texts, "--dtype", "float32").stdout
    assert "passed" in shown and "flashvec" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("info",), 2, "Missing argument"),
        (("info", "./nowhere"), 1, "flashvec: ./nowhere: no such file or folder"),
        (("info", "nobody/nothing"), 1, "flashvec: nobody/nothing: no such folder here, and the hub could not"),
        (("info", "{folder}", "--attention", "both"), 1, "attention is 'both'"),
        (("convert", "{folder}", "/proc/nowhere/x"), 1, "flashvec: "),
        (("verify", "{folder}", "./nowhere.txt"), 1, "nowhere.txt"),
        (("verify", "{folder}", "--limit", "1"), 2, "--limit"),
        (("fly",), 2, "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(arguments, status, message, folder):
    done = run(*(a.format(folder=folder) for a in arguments))
    assert done.returncode == status
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    if status == 1:
        assert done.stderr.strip().splitlines()[-1].startswith("flashvec: ")
