"""Which reader a model gets, and what a user reads when a model is not what it should be."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_adapter, tiny_checkpoint, tiny_model

from flashvec import Encoder
from flashvec.runtime.checkpoint.chain import adapter_chain, model_name
from flashvec.runtime.checkpoint.gguf_encoder import open_gguf
from flashvec.runtime.checkpoint.json_files import MAX_BYTES
from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint, resolve
from flashvec.runtime.checkpoint.source import CheckpointError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "model"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture
def model(built, tmp_path):
    """A plain decoder's folder, to change or damage."""
    return Path(shutil.copytree(built, tmp_path / "model"))


def write(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def layout(folder, **overrides):
    return open_checkpoint(Path(folder), Overrides(**overrides)).spec.layout


def test_the_first_mark_of_a_layout_counts(model, tmp_path):
    assert layout(model) == "hf"
    assert layout(model, compat="llm2vec") == "llm2vec"
    write(model / "llm2vec_config.json", {"pooling_mode": "mean"})
    assert layout(model) == "llm2vec"
    write(model / "modules.json", MODULES)
    write(model / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    assert layout(model) == "sentence-transformers"
    saved = Encoder.load(tmp_path / "model", pooling="max")
    saved.save(tmp_path / "saved")
    (tmp_path / "saved" / "1_Pooling" / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path / "saved", Overrides())
    assert checkpoint.spec == saved.spec and checkpoint.spec.pooling == ("max",)


def test_llm2vec_classes_are_a_mark(model):
    for architecture, expected in (
        ("LlamaBiModel", "llm2vec"),
        ("LlamaEncoderModel", "llm2vec"),
        ("LlamaBidirectionalModel", "hf"),
        ("LlamaForCausalLM", "hf"),
    ):
        config = json.loads((model / "config.json").read_text()) | {"architectures": [architecture]}
        write(model / "config.json", config)
        assert layout(model) == expected


def test_adapter_on_a_folder_of_another_layout(model, tmp_path):
    """An adapter without marks follows the rules of its base, whatever layout that has."""
    write(model / "modules.json", MODULES)
    write(model / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    tiny_adapter(tiny_model(None), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write(tmp_path / "adapter" / "adapter_config.json", config | {"base_model_name_or_path": "../model"})
    checkpoint = open_checkpoint(tmp_path / "adapter", Overrides())
    assert checkpoint.spec.layout == "sentence-transformers" and not checkpoint.spec.normalize
    assert checkpoint.notices == [
        "the weights are those of model, as adapter_config.json names it, with adapter merged in"
    ]


def test_hub_folders_know_their_name(tmp_path):
    """Rules that go by a model's name see the hub's, not the commit that the cache calls its folder."""
    snapshot = tmp_path / "models--McGill-NLP--LLM2Vec-Sheared-LLaMA-mntp-supervised" / "snapshots" / "0a5cd8"
    assert model_name(snapshot) == "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
    assert model_name(tmp_path / "folder") == "folder"
    tiny_adapter(tiny_model(None), snapshot)
    with pytest.raises(CheckpointError, match=r"needs the MNTP adapter McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp: "):
        adapter_chain(snapshot, local_files_only=True)


def test_a_hub_repository_of_gguf_files_says_how_to_take_one(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"owner/some-GGUF: .*\(hf download owner/some-GGUF FILE\.gguf\)"):
        resolve("owner/some-GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve("owner/some-GGUF") == tmp_path


def test_what_is_no_model(model, tmp_path):
    for path, named in (
        (tmp_path / "nothing", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("nothing.gguf", "no such file or folder"),
        ("owner/nothing", "the hub could not give it"),
    ):
        with pytest.raises(CheckpointError, match=named):
            resolve(path, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a model; give a model folder"):
        open_checkpoint(model / "model.safetensors", Overrides())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json is missing$"):
        open_checkpoint(tmp_path / "empty", Overrides())
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    (tmp_path / "run" / "encoder" / "config.json").write_text("{}")
    (tmp_path / "files").mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.GGUF"):
        (tmp_path / "files" / name).touch()
    with pytest.raises(CheckpointError, match=r"files: holds GGUF files .*: give one of them \(a-Q4_0\.gguf, a-Q8_0"):
        open_checkpoint(tmp_path / "files", Overrides())
    (tmp_path / "A.GGUF").touch()
    with pytest.raises(CheckpointError, match="too short for a GGUF file"):
        open_checkpoint(tmp_path / "A.GGUF", Overrides())
    with pytest.raises(CheckpointError, match=r"run/config\.json is missing: the model of this run is .*run/encoder$"):
        open_checkpoint(tmp_path / "run", Overrides())
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        open_gguf(tmp_path / "bad.gguf", Overrides())


def test_pickles_are_not_read(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin; pickle files are not read"):
        Encoder.load(model)


def test_tokenizer_missing(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Encoder.load(model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_act": "exec"}, "hidden_act is 'exec'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "config.json: "),
        ({"num_hidden_layers": 2}, "tensors fit nowhere"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
        ({"intermediate_size": 64}, "the configuration asks for"),
    ],
    ids=str,
)
def test_config_and_weights_that_do_not_fit(change, named, model):
    write(model / "config.json", json.loads((model / "config.json").read_text()) | change)
    with pytest.raises(CheckpointError) as error:
        Encoder.load(model)
    assert named in str(error.value)


def test_code_in_a_folder_is_never_imported_and_that_is_told(model, tmp_path, caplog):
    (model / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "modeling_evil.X"},
        "trust_remote_code": True,
        "attn_implementation": "evil/kernel",
    }
    write(model / "config.json", config)
    Encoder.load(model)
    assert not (tmp_path / "ran").exists()
    assert "config.json names a model class of its own (auto_map), whose code is never run" in caplog.text


@pytest.mark.parametrize(
    "name", ["config.json", "llm2vec_config.json", "adapter_config.json", "modules.json", "flashvec.json"]
)
@pytest.mark.parametrize("content", ["{", "", "[" * 100_000, "\udcff", '"text"'])
def test_damaged_json_names_its_file(name, content, model):
    if name == "adapter_config.json":
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(model, Overrides())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_configurations_in_every_encoding_of_json(model, encoding):
    """Editors leave marks of their encoding at a file's start."""
    for name in ("config.json", "tokenizer_config.json"):
        path = model / name
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        path.write_text(text, encoding=encoding)
    open_checkpoint(model, Overrides()).source.close()


def test_a_huge_file_is_no_configuration(model):
    with (model / "config.json").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"config\.json: 16,777,217 bytes, more than a configuration can have"):
        open_checkpoint(model, Overrides())
