import json
import sys

import pytest
import yaml
from training_runs import config_for, write_pairs
from typer.testing import CliRunner

from flashvec.runtime.cli import app
from flashvec.training.cli import train_app
from flashvec.training.cli_evaluate import evaluate_app
from flashvec.training.config import MntpConfig, read_config
from flashvec.training.progress import TrainingBar
from flashvec.training.settings import to_yaml

runner = CliRunner()


def written(objective, tmp_path, **values):
    """A configuration file of a short run, without what is its default anyway."""
    path = tmp_path / f"{objective}.yaml"
    path.write_text(to_yaml(config_for(objective, tmp_path, **values)))
    return str(path)


@pytest.mark.parametrize("objective", ["mntp", "contrastive", "distill"])
def test_trains_and_evaluates(objective, tmp_path):
    run = written(objective, tmp_path, loop={"steps": 2})
    result = runner.invoke(app, ["train", objective, run, "loop.steps=3", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == 3
    (tmp_path / "dev.tsv").write_text("score\tsentence1\tsentence2\n1\ta\tb\n3\tb\tc\n2\ta\ta\n")
    result = runner.invoke(app, ["evaluate", "sts", str(tmp_path / "out"), str(tmp_path / "dev.tsv"), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["pairs"] == 3
    scored = ["evaluate", "sts", str(tmp_path / "out"), str(tmp_path / "dev.tsv")]
    result = runner.invoke(app, [*scored, "--dtype", "float32"])
    assert "Spearman" in result.stdout and "over 3 pairs, in float32" in result.stdout
    refused = runner.invoke(app, [*scored, "--dtype", "float16", "--backend", "hf"])
    assert "backend hf runs a model as it is, without dtype" in str(refused.exception)


def test_one_process_of_several_prints(tmp_path, monkeypatch):
    run = written("mntp", tmp_path, loop={"steps": 1})
    assert json.loads(runner.invoke(app, ["train", "mntp", run, "--json"]).stdout)["step"] == 1
    monkeypatch.setenv("RANK", "1")
    assert runner.invoke(app, ["train", "mntp", run, "--json"]).stdout == ""  # the run has ended, nothing is trained


def test_processes_share_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = written("mntp", tmp_path, loop={"steps": 1})
    assert runner.invoke(app, ["train", "mntp", run, "loop.steps=2", "--processes", "2"]).exit_code == 0
    (last,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1:]
    assert json.loads(last)["step"] == 2
    failed = runner.invoke(app, ["train", "mntp", run, "texts=absent.txt", "output=x", "--processes", "2"])
    assert failed.exit_code == 1
    assert capfd.readouterr().err.count("absent.txt") == 1  # both fail alike, the first one says it


def test_prints_its_settings_and_does_nothing_else(tmp_path):
    result = runner.invoke(train_app, ["mntp", written("mntp", tmp_path), "lora.r=2", "--print-config"])
    (tmp_path / "printed.yaml").write_text(result.stdout)
    assert read_config(MntpConfig, tmp_path / "printed.yaml").lora.r == 2
    assert yaml.safe_load(result.stdout)["optimizer"]["clip"] == 1.0
    assert not (tmp_path / "out").exists()
    result = runner.invoke(train_app, ["mntp", written("mntp", tmp_path), "--print-config", "--json"])
    (tmp_path / "printed.json").write_text(result.stdout)
    assert json.loads(result.stdout)["lora"]["r"] == read_config(MntpConfig, tmp_path / "printed.json").lora.r


def test_a_users_mistake_is_an_error_that_names_the_key(tmp_path):
    result = runner.invoke(app, ["train", "mntp", written("mntp", tmp_path), "lora.q=2"])
    assert result.exit_code == 1 and "lora.q is unknown" in str(result.exception)
    result = runner.invoke(app, ["train", "mntp", str(tmp_path)])
    assert "a folder; name a .yaml or .json file of settings" in str(result.exception)
    assert runner.invoke(evaluate_app, ["sts"]).exit_code == 2


def test_mteb_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "flashvec.training.mteb_encoder", raising=False)
    result = runner.invoke(app, ["evaluate", "mteb", "--model", "x", "--tasks", "STS12"])
    assert isinstance(result.exception, ImportError) and "pip install 'flashvec[mteb]'" in str(result.exception)


def test_every_command_shows_an_example():
    evaluations = [("evaluate", name) for name in ("sts", "retrieval", "words", "mteb")]
    training = [("train", name) for name in ("mntp", "contrastive", "distill", "average")]
    for group, command in (*training, *evaluations):
        result = runner.invoke(app, [group, command, "--help"])
        assert result.exit_code == 0 and "Example" in result.stdout


def test_evaluation_while_training_is_logged(tmp_path):
    write_pairs(tmp_path / "dev.jsonl", scored=True, negatives=0)
    lines = (tmp_path / "dev.jsonl").read_text().replace("query", "sentence1").replace("positive", "sentence2")
    (tmp_path / "dev.jsonl").write_text(lines)
    run = written("mntp", tmp_path, sts=str(tmp_path / "dev.jsonl"), loop={"steps": 4, "evaluate_every": 2})
    assert runner.invoke(app, ["train", "mntp", run]).exit_code == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "sts" in line] == [2, 4]


def test_progress_line(capsys):
    line = {"loss": 1.0, "tokens_per_s": 10.0, "memory_gib": 1.0, "sts": 50.0}
    with TrainingBar(2, 0, True) as bar:
        bar.advance(line)
        bar.advance(line)
    assert "2/2" in capsys.readouterr().err
    with TrainingBar(2, 0, False) as bar:
        bar.advance(line)
    assert capsys.readouterr().err == ""
