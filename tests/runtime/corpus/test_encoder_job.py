"""The whole way with a real encoder: command line, prompts, chunks, int8, estimates, search."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import TEXTS, tiny_adapter, tiny_checkpoint, tiny_model
from typer.testing import CliRunner

from flashvec import Encoder
from flashvec.runtime import cli_corpus
from flashvec.runtime.cli import app
from flashvec.runtime.corpus.chunks import chunk_texts
from flashvec.runtime.corpus.job import draft_plan, embed_corpus
from flashvec.runtime.corpus.machine import model_facts
from flashvec.runtime.corpus.plan import PLAN_FILE
from flashvec.runtime.corpus.sample import sample_texts
from flashvec.runtime.corpus.search import describe_hits, search_job
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import run_shard
from flashvec.runtime.corpus.sources import find_sources
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.vectors import Vectors
from flashvec.runtime.corpus.worker import ShardRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder.load(model)


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def plan_for(path, encoder, **settings):
    from dataclasses import replace

    plan = draft_plan(find_sources([path]), JobSettings(**settings), {})
    return replace(plan, model=model_facts(encoder, {}))


def vectors_of(folder):
    column = pq.read_table(folder / "part-00000.parquet")["vector"]
    return np.array(column.to_pylist(), np.float32)


def run(*arguments):
    """A command in this process: starting one takes seconds."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(texts_file, model, encoder, tmp_path):
    job = ["embed", texts_file, "--model", model, "--out", tmp_path / "out", "--id-column", "id", "--precision", "int8"]
    command = [sys.executable, "-m", "flashvec.runtime.cli", *map(str, job), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events] == ["plan", "note", "ready", "step", "done", "result"]
    assert events[3]["tokens"] == encoder.count_tokens(TEXTS).sum() and events[-1]["rows"] == len(TEXTS)
    ranges = json.loads((tmp_path / "out" / "plan.json").read_text())["int8_ranges"]
    np.testing.assert_array_equal(np.array(ranges, np.float32)[0], encoder.embed(list(TEXTS)).min(0))
    checked = run("embed", "--check", tmp_path / "out")
    assert checked.exit_code == 0 and "1 of 1 shard whole, 8 vectors" in checked.stdout
    found = run("search", tmp_path / "out", "The cat sleeps.", "--top", 1, "--json")
    (hit,) = json.loads(found.stdout)
    assert hit["id"] == "r2" and hit["text"] == "The cat sleeps." and hit["score"] > 0.99

    (tmp_path / "out" / "_manifest" / "00000.json").unlink()
    (tmp_path / "out" / "part-00000.parquet").rename(tmp_path / "before")
    shard = run("embed-shard", "--plan", tmp_path / "out" / "plan.json", "--shard", 0)
    assert shard.exit_code == 0 and "8 vectors" in shard.stdout
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == (tmp_path / "before").read_bytes()

    (tmp_path / "out" / "_manifest" / "00000.json").unlink()
    for name, status in (("SLURM_ARRAY_TASK_ID", 0), ("JOB_COMPLETION_INDEX", 0), ("OTHER", 2)):
        command = ["embed-shard", "--plan", str(tmp_path / "out")]
        assert CliRunner().invoke(app, command, env={name: "0"}).exit_code == status
    odd = CliRunner().invoke(app, command, env={"SLURM_ARRAY_TASK_ID": "x"})
    assert odd.exit_code == 2 and "the scheduler's index is 'x'" in " ".join(odd.stderr.replace("│", "").split())

    dry = run("embed", texts_file, "--model", model, "--dry-run")
    assert dry.exit_code == 0 and "about 8 rows" in dry.stdout and "tokens/s" in dry.stdout
    assert run("embed", texts_file).exit_code == 2 and run("embed-shard", "--plan", "x").exit_code == 2
    missing = run("embed", texts_file, "--model", model, "--out", tmp_path / "o", "--text-column", "body")
    assert "'body' is missing in its first 100,000 lines; columns are id, text" in str(missing.exception)


def test_what_is_not_there_is_said(texts_file, model, tmp_path):
    texts_file.write_text('{"id": "a", "text": "A river."}\n{"id": "b", "text": ""}\n')
    job = ["embed", texts_file, "--model", model, "--id-column", "id", "--out"]
    done = run(*job, tmp_path / "out")
    assert done.exit_code == 0 and "note: 1 row without a vector: _errors/ says which and why" in done.stderr
    assert "texts are not shown" not in run("search", tmp_path / "out", "river").stderr
    texts_file.write_text('{"id": "b", "text": ""}\n')
    assert "note: texts are not shown where the input is gone" in run("search", tmp_path / "out", "river").stderr
    assert run(*job, tmp_path / "none").exit_code == 0
    assert "the job has no vector" in run("search", tmp_path / "none", "river").stderr


def test_a_worker_for_each_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli_corpus.devices_of("cpu") == ["cpu"] and cli_corpus.devices_of("cuda:1") == ["cuda:1"]
    assert cli_corpus.devices_of(None) == cli_corpus.devices_of("all") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli_corpus.devices_of(None) == [None]


def test_an_adapter_and_fewer_layers_are_part_of_the_job(texts_file, model, tmp_path, monkeypatch):
    """Named by their full path: a job is gone on with, and searched, from anywhere."""
    monkeypatch.chdir(tmp_path)
    tiny_adapter(tiny_model(None), tmp_path / "adapter")
    job = ["embed", texts_file, "--model", model, "--adapter", "adapter", "--layers", 1, "--out", tmp_path / "out"]
    assert run(*job).exit_code == 0
    adapted = Encoder.load(model, adapters=tmp_path / "adapter", layers=1)
    np.testing.assert_array_equal(vectors_of(tmp_path / "out"), adapted.embed(list(TEXTS)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = run("search", tmp_path / "out", TEXTS[0], "--top", 1, "--json")
    assert json.loads(found.stdout)[0]["score"] > 0.99
    other = run(*(part for part in job if part not in ("--layers", 1)))
    assert "layers was 1 and is None" in str(other.exception)


def test_vectors_are_the_encoders(texts_file, encoder, tmp_path):
    plan = plan_for(texts_file, encoder, instruction="Query: ", max_length=12, dims=20, normalize=False)
    entry = run_shard(plan, 0, encoder, Storage(tmp_path / "out"))
    with pytest.warns(UserWarning, match="were cut"):
        expected = encoder.embed(list(TEXTS), instruction="Query: ", max_length=12, truncate_dim=20, normalize=False)
    np.testing.assert_array_equal(vectors_of(tmp_path / "out"), expected)
    assert entry.truncated > 0


def test_chunks(encoder, tmp_path):
    long = " ".join(f"summit {i} and a decoder" for i in range(40))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "short", "")))
    settings = {"long": "chunk", "max_length": 30, "instruction": "Query: "}
    chunks = chunk_texts(encoder, long, JobSettings(**settings))
    assert len(chunks) > 5 and long.startswith(chunks[0].text) and long.endswith(chunks[-1].text)
    counts = encoder.count_tokens(["Query: " + chunk.text for chunk in chunks])
    assert counts.max() <= 30
    at = 0
    for chunk in chunks:  # each begins before the one before it ends
        assert 0 <= long.find(chunk.text, max(at - 40, 0)) <= at
        at = long.find(chunk.text, max(at - 40, 0)) + len(chunk.text)
    own = encoder.embed([chunk.text for chunk in chunks], instruction="Query: ")

    plan, rows = plan_for(tmp_path / "in.jsonl", encoder, chunks="rows", **settings), Storage(tmp_path / "rows")
    entry = run_shard(plan, 0, encoder, rows)
    table = pq.read_table(tmp_path / "rows" / "part-00000.parquet")
    assert table["chunk"].to_pylist() == [*range(len(chunks)), 0] and entry.errors == 1 and entry.truncated == 0
    np.testing.assert_array_equal(vectors_of(tmp_path / "rows")[:-1], own)
    rows.write(PLAN_FILE, plan.to_json())
    (hit,) = describe_hits(rows, search_job(rows, own[3:4], 1)[0])
    assert hit.row == 0 and hit.chunk == 3 and hit.text == long

    run_shard(plan_for(tmp_path / "in.jsonl", encoder, **settings), 0, encoder, Storage(tmp_path / "mean"))
    found = vectors_of(tmp_path / "mean")
    mean = np.average(own.astype(np.float64), axis=0, weights=[chunk.num_tokens for chunk in chunks])
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(found[1], encoder.embed(["short"], instruction="Query: ")[0])


def test_chunks_are_not_cut_once_more_under_the_references_rules(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "llm2vec_config.json").write_text(json.dumps({"max_length": 96, "doc_max_length": 20}))
    encoder = Encoder.load(tmp_path / "model", compat="llm2vec")
    chunks = chunk_texts(encoder, "the dough has to rise again " * 30, JobSettings(long="chunk"))
    assert max(chunk.num_tokens for chunk in chunks) == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embed([chunk.text for chunk in chunks])


def test_chunks_without_room_are_refused_before_there_is_a_plan(encoder):
    """The folder was left with a plan that could never go on."""
    settings = JobSettings(long="chunk", max_length=3)
    with pytest.raises(ValueError, match="leave 1 tokens of a text"):
        ShardRunner(encoder, model_facts(encoder, {})).speed(["text"], settings)


def test_facts_tell_models_apart(model, encoder, tmp_path):
    facts = model_facts(encoder, {})
    assert not list(facts.differences(model_facts(Encoder.load(model), {})))
    calibrated = Encoder.load(model)  # of no concern to a job, which has ranges of its own
    calibrated.calibrate(["a text", "another one"])
    assert model_facts(calibrated, {}) == facts
    tiny_checkpoint(tmp_path / "other", seed=1)
    assert [d.split()[2] for d in facts.differences(model_facts(Encoder.load(tmp_path / "other"), {}))] == ["weights"]
    causal = model_facts(Encoder.load(model, attention="causal", pooling="mean"), {})
    assert [d.split()[2] for d in facts.differences(causal)] == ["spec"]
    half, whole = (model_facts(Encoder.load(model, dtype=name), {}) for name in ("bfloat16", "float32"))
    assert any("dtype" in d for d in half.machine_differences(whole.machine))


def test_samples_come_from_everywhere(tmp_path, encoder):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(1000)))
    plan = plan_for(tmp_path / "a.txt", encoder, shard_size=100)
    texts = sample_texts(plan, 20)
    assert len(texts) == 20 and len({int(text) // 100 for text in texts}) >= 8
    assert len(Vectors(plan, encoder).hash("x")) == 16


def test_a_job_goes_on_in_the_dtype_that_it_was_planned_in(texts_file, model, tmp_path):
    """A machine that computes in bf16 takes shards of one that does not, and a laptop searches what a GPU made."""
    out = tmp_path / "out"
    here = Encoder.load(model).dtype
    other = "float32" if here == torch.bfloat16 else "bfloat16"
    command = ("embed", texts_file, "--model", model, "--out", out, "--mixed-machines", "--shard-size", 8)
    assert run(*command, "--plan-only", "--id-column", "id", "--dtype", other).exit_code == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["model"]["load"].pop("dtype") == plan["model"]["machine"]["dtype"] == other
    (out / "plan.json").write_text(json.dumps(plan))  # as a machine would have planned it that has the other one
    shard = run("embed-shard", "--plan", str(out), "--shard", "0", "--json")
    assert shard.exit_code == 0 and json.loads(shard.stdout)["machine"]["dtype"] == other
    done = run(*command, "--id-column", "id")
    assert done.exit_code == 0, done.exception
    found = run("search", str(out), TEXTS[0], "--top", "1", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)[0]["id"] == "r0"


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"devices": ()}, ValueError, r"devices is \(\); give a list of one for each worker"),
        ({"devices": "cpu"}, ValueError, "devices is 'cpu'; give a list"),
        ({"settings": {"max_length": 8}}, TypeError, "settings is dict: give JobSettings"),
        ({"plan_only": "no"}, TypeError, "plan_only is 'no'; expected True or False"),
        ({"mixed_machines": "no"}, TypeError, "mixed_machines is 'no'"),
        ({"unique_ids": 1}, TypeError, "unique_ids is 1"),
        ({"max_errors": "3"}, TypeError, "max_errors is '3'; expected a whole number"),
    ],
)
def test_wrong_arguments_are_refused_before_work(wrong, kind, said, texts_file, model, tmp_path):
    with pytest.raises(kind, match=said):
        embed_corpus(texts_file, tmp_path / "out", model=model, **wrong)
    assert not (tmp_path / "out").exists()


def test_a_device_in_load_and_workers_without_ray_are_refused(texts_file, model, tmp_path):
    with pytest.raises(ValueError, match="load holds a device: name it in devices"):
        embed_corpus(texts_file, tmp_path / "out", model=model, load={"device": "cpu"})
    refused = run("embed", str(texts_file), "--model", str(model), "--out", str(tmp_path / "out"), "--workers", "4")
    assert refused.exit_code == 2 and "--workers counts Ray's actors" in refused.output
