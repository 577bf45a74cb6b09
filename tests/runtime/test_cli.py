"""The command line as a person meets it."""

import ast
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from tiny_models import tiny_checkpoint

import flashvec
from flashvec import Encoder
from flashvec.runtime import cli
from flashvec.runtime.cli import app, main
from flashvec.runtime.texts import TruncationWarning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint(folder, "llama")
    return folder


def run(*arguments):
    """In a process of its own."""
    command = [sys.executable, "-m", "flashvec.runtime.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """In this process, which has imported what takes seconds."""

    def run_here(*arguments):
        monkeypatch.setattr("sys.argv", ["flashvec", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run_here


def test_every_command_has_an_example():
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [command for group in groups for command in group.registered_commands]
    assert len(groups) == 3 and all("Example: `flashvec " in (command.callback.__doc__ or "") for command in commands)


def test_version_and_help(run_here):
    assert run("--version").stdout.strip() == f"flashvec {flashvec.__version__}"
    listed = subprocess.run(
        [sys.executable, "-c", "import flashvec; print(dir(flashvec))"], capture_output=True, text=True
    )
    assert {"Encoder", "JobSettings", "embed_corpus", "__file__"} <= set(ast.literal_eval(listed.stdout))
    for command in ("info", "convert", "verify"):
        done = run_here(command, "--help")
        assert done.returncode == 0 and "Example" in done.stdout


def test_a_warning_of_this_package_is_a_note(run_here, monkeypatch):
    def command():
        warnings.simplefilter("always")
        warnings.warn("2 of 3 texts [long] were cut", TruncationWarning, stacklevel=1)
        warnings.warn("of another", FutureWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", command)
    note, other, *_ = run_here().stderr.splitlines()
    assert note == "note: 2 of 3 texts [long] were cut" and other.endswith("FutureWarning: of another")


def test_info(folder, run_here):
    done = run_here("info", folder)
    assert done.returncode == 0 and "bidirectional" in done.stdout and "not trained for" in done.stderr
    spec = json.loads(run_here("info", folder, "--attention", "causal", "--json").stdout)["spec"]
    assert spec["attention"] == "causal" and spec["pooling"] == ["last"]


def test_brackets_and_colons_of_a_model_are_printed_as_they_are(folder, tmp_path, run_here):
    enc = Encoder.load(folder)
    prompts = {"query": "[query] ", "cat": ":cat: "}
    enc.spec = replace(enc.spec, template="[INST] {text} [/INST]", prompts=prompts)
    enc.save(tmp_path / "[b]saved")
    shown = run_here("info", tmp_path / "[b]saved").stdout
    assert "'[INST] {text} [/INST]'" in shown and "'[query] '" in shown and "':cat: '" in shown
    done = run_here("convert", tmp_path / "[b]saved", tmp_path / "[b]out", "--plain")
    assert done.returncode == 0 and "'[INST] {text} [/INST]'" in " ".join(done.stderr.split())
    assert "[b]out" in done.stdout.replace("\n", "")


def test_no_control_character_of_a_name_reaches_the_terminal(tmp_path, run_here):
    folder = tmp_path / "m\x1b[2J\nflashvec: forged"
    folder.mkdir()
    done = run_here("info", folder)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and r"m\x1b[2J\nflashvec: forged" in done.stderr


def test_convert_then_verify(folder, tmp_path, run_here):
    done = run_here("convert", folder, tmp_path / "out", "--pooling", "mean")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "modules.json").is_file()
    again = run_here("convert", folder, tmp_path / "out")
    assert again.returncode == 1 and "overwrite" in again.stderr
    assert "not trained for" not in run_here("info", tmp_path / "out").stderr

    texts = tmp_path / "texts.txt"
    texts.write_text("The cat sleeps.\nMix flour and water.\nPrices rose.\n")
    done = run_here("verify", tmp_path / "out", texts, "--dtype", "float32", "--json")
    assert done.returncode == 0 and not json.loads(done.stdout)["failures"]
    shown = run_here("verify", tmp_path / "out", texts, "--dtype", "float32").stdout
    assert "passed" in shown and "flashvec" in shown
    done = run_here("verify", folder, texts, "--dtype", "float32", "--compat", "llm2vec")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compat='llm2vec' is for" in run_here("verify", tmp_path / "out", texts, "--compat", "llm2vec").stderr


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
def test_a_mistake_is_one_line_and_a_status(arguments, status, message, folder, run_here):
    done = run_here(*(a.format(folder=folder) for a in arguments))
    assert done.returncode == status
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    if status == 1:
        assert done.stderr.strip().splitlines()[-1].startswith("flashvec: ")


def test_closed_streams_are_as_the_null_device(folder, tmp_path):
    """Nothing that is opened gets their number, and what would be said to nobody stops no job."""
    (tmp_path / "in.txt").write_text("A cat sleeps.\n")
    embed = f"{sys.executable} -m flashvec.runtime.cli embed {tmp_path}/in.txt --model {folder}"
    for closed, out, rest in (("2>&-", "a", ""), (">&-", "b", "--json"), ("<&- >&- 2>&-", "c", "")):
        assert subprocess.run(["sh", "-c", f"{embed} --out {tmp_path}/{out} {rest} {closed}"]).returncode == 0
        assert (tmp_path / out / "_SUCCESS").exists()


def test_what_the_terminal_cannot_show_is_escaped(folder, tmp_path):
    """A result beyond its encoding, or a name that is not UTF-8, is no reason to stop."""
    (tmp_path / "in.txt").write_text("Le chat dort à Zürich.\n")
    assert run("embed", tmp_path / "in.txt", "--model", folder, "--out", tmp_path / "out").returncode == 0
    command = [sys.executable, "-m", "flashvec.runtime.cli", "search", str(tmp_path / "out"), "chat"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0 and r"Le chat dort \xe0 Z\xfcrich." in found.stdout, found.stderr


def test_names_that_are_not_utf8_are_refused_before_the_work(run_here, folder, tmp_path):
    """Neither tokenizers nor safetensors nor Arrow can be given them; a run ended where it was to be saved."""
    odd = tmp_path / "z\udcfcrich"
    odd.symlink_to(folder)
    (tmp_path / "in.txt").write_text("A cat sleeps.\n")
    (tmp_path / "mntp.json").write_text(json.dumps({"model": str(folder), "texts": str(tmp_path / "in.txt")}))
    new = tmp_path / "n\udce4chste"
    for command in (
        ("info", odd),
        ("embed", tmp_path / "in.txt", "--model", odd, "--out", tmp_path / "out"),
        ("embed", tmp_path / "in.txt", "--model", folder, "--out", new),
        ("convert", folder, new),
        ("train", "mntp", tmp_path / "mntp.json", f"output={new}"),
    ):
        said = run_here(*command)
        assert said.returncode == 1 and "\ufffd" in said.stderr, said.stderr
        assert said.stderr.endswith(": its name is not utf-8: rename it\n")
    assert not new.exists() and not (tmp_path / "out").exists()
