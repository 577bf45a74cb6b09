"""`Encoder.save`: the same bits again, and nothing of the user's lost on the way."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CLASSES, TEXTS, tiny_checkpoint
from written_folders import TOLERANCE, library_difference, library_model, llm2vec_model, names, texts

from flashvec import Encoder
from flashvec.runtime.checkpoint import export, placing
from flashvec.runtime.checkpoint.export import convert
from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint
from flashvec.runtime.checkpoint.saved import read_spec
from flashvec.runtime.checkpoint.source import CheckpointError


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_restores_bit_for_bit(family, dtype, tmp_path):
    tiny_checkpoint(tmp_path / "model", family)
    encoder = Encoder.load(tmp_path / "model", dtype=dtype, max_length=77)
    encoder.calibrate(list(TEXTS))
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype=dtype)
    assert again.spec == encoder.spec and again.spec.int8_ranges is not None
    assert np.array_equal(texts(encoder), texts(again))
    assert np.array_equal(encoder.embed(["x"], precision="int8"), again.embed(["x"], precision="int8"))
    if dtype == "float32":
        assert library_difference(tmp_path / "saved") < TOLERANCE


def test_every_file_may_be_read_by_whom_the_process_allows(tmp_path):
    """Where other users run the model: safetensors' own files are their owner's alone."""
    tiny_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "any").touch()
    Encoder.load(tmp_path / "model").save(tmp_path / "saved")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {(tmp_path / "any").stat().st_mode}


def test_save_keeps_heads_and_fewer_layers(tmp_path):
    library_model(tmp_path)
    encoder = Encoder.load(tmp_path / "model", layers=2, dtype="float32")
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    assert len(again.decoder.layers) == again.spec.decoder.num_layers == len(again.spec.decoder.layer_windows) == 2
    assert np.array_equal(texts(encoder), texts(again))
    assert library_difference(tmp_path / "saved") < TOLERANCE


@pytest.mark.parametrize("compat", [None, "llm2vec"])
def test_save_keeps_rules_that_fit_in_no_other_folder(compat, tmp_path, caplog):
    llm2vec_model(tmp_path / "model", "Qwen/Qwen2-7B-Instruct")
    encoder = Encoder.load(tmp_path / "model", dtype="float32", compat=compat)
    encoder.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "modules.json").exists()
    assert "opens with this package only, because" in caplog.text and "the template" in caplog.text
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    assert again.spec == encoder.spec
    instructions = ["find:", ""] * (len(TEXTS) // 2)
    ours, theirs = (e.embed(list(TEXTS), instruction=instructions) for e in (encoder, again))
    assert np.array_equal(ours, theirs)
    assert Encoder.load(tmp_path / "saved", compat="llm2vec").spec.span == "count_from_right"


def test_overrides_on_a_saved_folder(tmp_path):
    tiny_checkpoint(tmp_path / "model", "gemma3")
    Encoder.load(tmp_path / "model").save(tmp_path / "saved")
    loaded = Encoder.load(tmp_path / "saved", attention="causal", pooling="last", max_length=9, truncate_dim=8).spec
    direct = Encoder.load(tmp_path / "model", attention="causal", pooling="last", max_length=9, truncate_dim=8).spec
    assert loaded == direct and loaded.decoder.layer_windows != read_spec(tmp_path / "saved").decoder.layer_windows
    with pytest.raises(ValueError, match="compat='llm2vec' is for LLM2Vec models and plain decoders"):
        Encoder.load(tmp_path / "saved", compat="llm2vec")


def test_a_flagged_model_saved_as_causal_keeps_its_windows_for_the_other_direction(tmp_path):
    """The flag halves them; config.json of a causal model does not state it."""
    tiny_checkpoint(tmp_path / "model", "gemma3", use_bidirectional_attention=True)
    Encoder.load(tmp_path / "model", attention="causal").save(tmp_path / "saved")
    loaded, direct = (Encoder.load(tmp_path / name, attention="bidirectional").spec for name in ("saved", "model"))
    assert loaded.decoder.layer_windows == direct.decoder.layer_windows


@pytest.fixture
def encoder(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    return Encoder.load(tmp_path / "model", dtype="float32")


def test_an_existing_folder_is_replaced_only_on_demand(encoder, tmp_path):
    target = tmp_path / "deep" / "saved"
    encoder.save(target)
    with pytest.raises(ValueError, match="exists and is not empty"):
        encoder.save(target)
    (target / "old").touch()
    encoder.save(target, overwrite=True)
    assert not (target / "old").exists() and names(target.parent) == ["saved"]
    (tmp_path / "empty").mkdir()
    encoder.save(tmp_path / "empty")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a model folder, so it is not replaced"):
        encoder.save(tmp_path / "papers", overwrite=True)
    with pytest.raises(ValueError, match="folder is '': name one to write"):
        encoder.save("")
    with pytest.raises(ValueError, match="is the model's own folder"):
        convert(tmp_path / "model", tmp_path / "model", overwrite=True)
    (tmp_path / "papers" / "config.json").write_text('{"theme": "dark"}')  # of a program, not of a model
    with pytest.raises(ValueError, match="is not a model folder, so it is not replaced"):
        encoder.save(tmp_path / "papers", overwrite=True)
    assert names(tmp_path / "papers") == ["config.json", "thesis.tex"]


def test_numpys_whole_numbers_are_saved(encoder, tmp_path):
    sizes = {"truncate_dim": np.int64(8), "max_length": np.int32(64), "layers": np.int64(1)}
    Encoder.load(tmp_path / "model", dtype="float32", **sizes).save(tmp_path / "saved")
    spec = Encoder.load(tmp_path / "saved").spec
    assert (spec.truncate_dim, spec.max_length, spec.decoder.num_layers) == (8, 64, 1)


def test_nothing_half_written_stays(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(encoder.tokenizer, "save", fail, raising=False)
    for folder in ("saved", "fresh"):
        with pytest.raises(OSError, match="no space left"):
            encoder.save(tmp_path / folder, overwrite=True)
    assert names(tmp_path) == ["model", "saved"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()}


def test_files_of_others_stay_where_a_model_is_written_among_them(encoder, tmp_path, monkeypatch):
    folder = tmp_path / "notes"
    (folder / ".git").mkdir(parents=True)
    for name in (".git/HEAD", "README.md", "modules.json"):
        (folder / name).write_text("mine")
    with monkeypatch.context() as small:
        small.setattr(export, "SHARD_BYTES", 30_000)
        export.save(encoder, folder, among_others=True)
    export.save(encoder, folder, among_others=True, spec=replace(encoder.spec, template="a {text}"))
    assert (folder / ".git/HEAD").read_text() == (folder / "README.md").read_text() == "mine"
    # what the sharded model before it said of its files and modules is gone
    assert {"model.safetensors.index.json", "modules.json"} <= set(placing.REPLACED_FILES)
    assert set(placing.REPLACED_FILES) & set(names(folder)) == {"model.safetensors"}
    assert Encoder.load(folder, dtype="float32").spec.template == "a {text}"
    assert not [name for name in names(folder) if name.startswith(".flashvec")]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["attention"], "sideways", "attention"),
        (["pooling"], ["median"], "pooling"),
        (["pooling"], [], "pooling"),
        (["span"], "all", "span"),
        (["layout"], "pickle", "layout is 'pickle'"),
        (["similarity"], "maxsim", "similarity is 'maxsim'"),
        (["compat"], "v1", "compat is 'v1'"),
        (["template"], "no place", "template holds {text} 0 times"),
        (["prompts"], {"query": 3}, "prompts"),
        (["prompts"], {"query": "x" * 70_000}, "longer than"),
        (["prompts"], {"query": "{text} and {text}"}, "prompts: query holds {text} 2 times"),
        (["max_length"], 10**6, "max_length is 1000000"),
        (["max_length"], "512", "max_length"),
        (["truncate_dim"], 33, "truncate_dim is 33"),
        (["int8_ranges"], [[0.0], [1.0, 2.0]], "int8_ranges has 1 minima and 2 maxima"),
        (["int8_ranges"], [[0.0] * 33, [1.0] * 33], "int8_ranges has 33 minima"),
        (["int8_ranges"], [[], []], "int8_ranges has 0 minima"),
        (["dense"], [{"in_features": 7, "out_features": 3, "bias": False, "activation": "tanh"}], "takes 7 features"),
        (["dense"], [{"in_features": 32, "out_features": 3, "bias": False, "activation": "exec"}], "dense.activation"),
        (["decoder", "family"], "bert", "decoder.family is 'bert'"),
        (["decoder", "num_layers"], 10**9, "decoder.num_layers is 1000000000"),
        (["decoder", "vocab_size"], -1, "decoder.vocab_size is -1"),
        (["decoder", "norm_eps"], float("nan"), "norm_eps"),
        (["decoder", "norm_eps"], -1, "decoder.norm_eps is -1; expected a number from 1e-30 to 1"),
        (["decoder", "norm_eps"], 10**30, "decoder.norm_eps is 1000"),
        (["decoder", "norm_offset"], 10**400, "norm_offset"),
        (["decoder", "embedding_scale"], 10**30, "decoder.embedding_scale is 1000"),
        (["decoder", "softcap"], 0.0, "decoder.softcap is 0.0"),
        (["decoder", "query_scale_beta"], -1, "decoder.query_scale_beta is -1"),
        (["decoder", "ropes"], [{"theta": -1.0}], "decoder.ropes: theta is -1.0"),
        (["decoder", "num_kv_heads"], 3, "num_kv_heads"),
        (["decoder", "layer_ropes"], [0, 0, 7], "layer_ropes names a table"),
        (["decoder", "layer_windows"], [None], "layer_windows has 1 entries, not 3"),
        (["decoder", "ropes"], [{"theta": 1e4, "kind": "spiral"}], "kind"),
        (["surplus"], 1, "surplus"),
        (["decoder"], None, "not a flashvec model spec"),
        (["default_prompt_name"], "zz", "default_prompt_name is 'zz'; prompts are none"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else None,
)
def test_saved_facts_are_checked(path, value, named, encoder, tmp_path):
    encoder.save(tmp_path / "saved")
    file = tmp_path / "saved" / "flashvec.json"
    values = json.loads(file.read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "saved", Overrides())
    assert named in str(error.value) and "flashvec.json" in str(error.value)


def test_dense_heads_are_not_forgotten_with_their_list(encoder, tmp_path):
    encoder.whiten(list(TEXTS))
    encoder.save(tmp_path / "saved")
    file = tmp_path / "saved" / "flashvec.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"dense": []}))
    with pytest.raises(CheckpointError, match=r"names 0 dense heads, but saved has one more, 2_Dense: were these"):
        Encoder.load(tmp_path / "saved")
    del values["dense"]
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"flashvec\.json: not a flashvec model spec: dense is missing"):
        Encoder.load(tmp_path / "saved")


def test_a_folder_of_a_containers_image_is_replaced(tmp_path, monkeypatch):
    """Its file system, an overlay, does not rename what lies in a lower layer."""
    tiny_checkpoint(tmp_path / "model", "llama")
    encoder = Encoder.load(tmp_path / "model")
    target = tmp_path / "saved"
    encoder.save(target)
    (target / "old-layer").touch()
    rename, drop = Path.rename, shutil.rmtree

    def overlay(path, to):
        if path == target:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", overlay)
    with monkeypatch.context() as patched:  # where it cannot be dropped either, it is whole again

        def drop_a_part(path, **options):
            if path != target:
                return drop(path, **options)
            (path / "old-layer").unlink()
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        patched.setattr(shutil, "rmtree", drop_a_part)
        with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
            encoder.save(target, overwrite=True)
    assert (target / "old-layer").exists()
    encoder.save(target, overwrite=True)
    assert not (target / "old-layer").exists() and np.array_equal(texts(Encoder.load(target)), texts(encoder))
