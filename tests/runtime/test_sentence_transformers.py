"""sentence-transformers folders, written by the library itself and compared with it in fp32."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import note
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.checkpoint.export import convert
from flashvec.runtime.checkpoint.sentence_transformers import OLD_POOLING_KEYS, POOLING
from flashvec.runtime.checkpoint.source import CheckpointError

PROMPTS = {"query": "Instruct: find it\nQuery: ", "document": "", "short": "q:"}
TOLERANCE = 1e-5


def build(folder, family="llama", modules=(), *, bos=True, eos=False, pooling="mean", include_prompt=True, **keys):
    """Save a model with the library; returns it as the library loads it again."""
    names = ("prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name")
    settings = {name: keys.pop(name) for name in names if name in keys}
    tiny_checkpoint(folder / "base", family, bos=bos, eos=eos, **keys)
    transformer = Transformer(str(folder / "base"))
    head = Pooling(transformer.get_embedding_dimension(), pooling, include_prompt)
    model = SentenceTransformer(modules=[transformer, head, *modules], device="cpu", **settings)
    model.save(str(folder / "model"))
    return SentenceTransformer(str(folder / "model"), device="cpu")


def difference(folder, model, texts=TEXTS, **settings):
    """Largest absolute difference between the library and us over all texts in one ragged batch."""
    encoder = Encoder.load(folder / "model", dtype="float32")
    theirs = model.encode(list(texts), **settings)
    ours = encoder.encode(list(texts), **settings)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.01
    found = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    return note("layout", "sentence-transformers folder", "sentence-transformers", found)


@pytest.fixture
def plain(tmp_path):
    return build(tmp_path, modules=[Normalize()], is_causal=False), tmp_path


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_qwen3_last_token_with_appended_eos(tmp_path):
    model = build(tmp_path, "qwen3", [Normalize()], bos=False, eos=True, pooling="lasttoken", prompts=PROMPTS)
    assert difference(tmp_path, model) < TOLERANCE
    assert difference(tmp_path, model, prompt_name="query") < TOLERANCE
    assert Encoder.load(tmp_path / "model").spec.attention == "causal"


def test_gemma3_bidirectional_with_dense_heads(tmp_path):
    heads = [Dense(32, 96, bias=False, activation_function=torch.nn.Identity()), Dense(96, 24, bias=True)]
    model = build(
        tmp_path, "gemma3", [*heads, Normalize()], use_bidirectional_attention=True, prompts=PROMPTS, truncate_dim=16
    )
    long = (*TEXTS, "a window is far shorter than this text " * 8)
    assert difference(tmp_path, model, long) < TOLERANCE
    assert difference(tmp_path, model, long, prompt_name="query", truncate_dim=8) < TOLERANCE
    spec = Encoder.load(tmp_path / "model").spec
    assert spec.attention == "bidirectional" and [d.activation for d in spec.dense] == ["identity", "tanh"]
    assert spec.embedding_size == 16


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gemma2"])
@pytest.mark.parametrize("direction", [{}, {"is_causal": False}], ids=["causal", "bidirectional"])
def test_families_in_both_directions(family, direction, tmp_path):
    model = build(tmp_path, family, [Normalize()], **direction)
    assert difference(tmp_path, model) < TOLERANCE


@pytest.mark.parametrize("pooling", [*POOLING, ("mean", "max"), ("lasttoken", "cls", "weightedmean")], ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_pooling_modes_and_prompts(pooling, include_prompt, tmp_path):
    model = build(tmp_path, pooling=pooling, include_prompt=include_prompt, prompts=PROMPTS, is_causal=False)
    for settings in (
        {},
        {"prompt_name": "query"},
        {"prompt": "q:"},
        {"prompt": "search "},
        {"prompt_name": "document"},
    ):
        assert difference(tmp_path, model, **settings) < TOLERANCE, settings


@pytest.mark.parametrize("eos", [True, False])
def test_prompt_tokens_are_counted_alone(eos, tmp_path):
    """The prompt's last letters merge with the text's first: the library's count is followed all the same."""
    model = build(tmp_path, include_prompt=False, eos=eos, is_causal=False)
    for prompt in ("the summ", "s", " ", "Query: how do I bake sourdough", "ends with </s>"):
        assert difference(tmp_path, model, [t for t in TEXTS if t != "x"], prompt=prompt) < TOLERANCE, prompt


def test_default_prompt_query_and_document(tmp_path):
    prompts = {**PROMPTS, "passage": "p: "}
    model = build(tmp_path, prompts=prompts, default_prompt_name="short", is_causal=False)
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    for name in ("encode", "encode_query", "encode_document"):
        ours, theirs = (getattr(each, name)(list(TEXTS)) for each in (encoder, model))
        assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max(), name
    assert encoder.spec.default_prompt_name == "short"


def test_a_prompt_stands_before_a_text_whatever_it_holds(tmp_path):
    prompts = {"q": "a {text} b ", "twice": "{text}{text}: "}
    model = build(tmp_path, prompts=prompts, default_prompt_name="q", is_causal=False)
    for settings in ({}, {"prompt_name": "q"}, {"prompt_name": "twice"}):
        assert difference(tmp_path, model, **settings) < TOLERANCE, settings
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    np.testing.assert_array_equal(encoder.embed("cat", instruction="({text})"), encoder.embed("(cat)", instruction=""))
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    np.testing.assert_array_equal(again.embed(list(TEXTS)), encoder.embed(list(TEXTS)))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(similarity, tmp_path):
    model = build(tmp_path, similarity_fn_name=similarity, is_causal=False)
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    vectors = model.encode(list(TEXTS))
    theirs, ours = model.similarity(vectors[:3], vectors), encoder.similarity(vectors[:3], vectors)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_are_not_normalised_again(normalize, tmp_path):
    model = build(tmp_path, modules=[Normalize()] if normalize else [], truncate_dim=12, is_causal=False)
    assert difference(tmp_path, model) < TOLERANCE
    assert difference(tmp_path, model, truncate_dim=5, normalize_embeddings=True) < TOLERANCE


def test_a_cut_vector_told_not_to_be_normalised_is_the_first_part_of_one_that_is_not(tmp_path):
    build(tmp_path, modules=[Normalize()], is_causal=False)
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    whole = encoder.embed(list(TEXTS), normalize=False)
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() > 0.01
    np.testing.assert_array_equal(encoder.embed(list(TEXTS), normalize=False, truncate_dim=5), whole[:, :5])


def test_long_texts_are_cut_where_the_library_cuts(tmp_path):
    model = build(tmp_path, eos=True, is_causal=False)
    edit(tmp_path / "model" / "sentence_bert_config.json", max_seq_length=10)
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    with pytest.warns(UserWarning, match="max_length=10"):
        assert difference(tmp_path, model) < TOLERANCE


@pytest.mark.parametrize(("tokenizer", "expected"), [(None, 512), (100, 100), (9999, 512), (1e30, 512)])
def test_max_length_from_the_tokenizer_capped_by_the_model(tokenizer, expected, plain):
    _, folder = plain
    edit(folder / "model" / "tokenizer_config.json", model_max_length=tokenizer)
    assert Encoder.load(folder / "model").spec.max_length == expected
    if tokenizer is not None:
        assert SentenceTransformer(str(folder / "model")).max_seq_length == expected
    edit(folder / "model" / "sentence_bert_config.json", max_seq_length=77)
    assert Encoder.load(folder / "model").spec.max_length == 77
    assert Encoder.load(folder / "model", max_length=50).spec.max_length == 50
    with pytest.raises(ValueError, match="max_length is 513, the model has 512 positions"):
        Encoder.load(folder / "model", max_length=513)


def test_old_files(tmp_path):
    """Folders from before version 5: old class paths, booleans for pooling, a folder for the transformer."""
    model = build(tmp_path, modules=[Normalize()], pooling=("max", "mean"), is_causal=False)
    folder = tmp_path / "model"
    modules = json.loads((folder / "modules.json").read_text())
    for entry, path in zip(modules, ("0_Transformer", "1_Pooling", "2_Normalize"), strict=True):
        entry.update(path=path, type=f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}")
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer").mkdir()
    for file in [p for p in folder.iterdir() if p.is_file() and p.name not in ("modules.json",)]:
        file.rename(folder / "0_Transformer" / file.name)
    old = {key: mode in ("max", "mean") for key, mode in OLD_POOLING_KEYS.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **old}))
    (folder / "2_Normalize" / "config.json").unlink()
    (folder / "2_Normalize").rmdir()
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 64, "do_lower_case": false}'
    )
    assert difference(tmp_path, model) < TOLERANCE
    assert Encoder.load(folder).spec.pooling == ("max", "mean")


def test_adapter_saved_by_the_library(tmp_path):
    from peft import LoraConfig

    build(tmp_path, is_causal=False)
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save(str(tmp_path / "adapted"))
    assert not (tmp_path / "adapted" / "model.safetensors").exists()
    ours, theirs = Encoder.load(tmp_path / "adapted", dtype="float32"), model.encode(list(TEXTS))
    found = np.abs(ours.embed(list(TEXTS)) - theirs).max() / np.abs(theirs).max()
    assert note("layout", "adapter saved by sentence-transformers", "sentence-transformers", found) < TOLERANCE
    before = sorted((tmp_path / "model").rglob("*"))
    with pytest.raises(ValueError, match="model: is the model's own folder; write to another"):
        convert(tmp_path / "adapted", tmp_path / "model", overwrite=True)  # the base, which the adapter names
    assert sorted((tmp_path / "model").rglob("*")) == before


def test_attention_override_and_direction_from_the_loader(plain):
    _, folder = plain
    assert Encoder.load(folder / "model").spec.attention == "bidirectional"
    assert Encoder.load(folder / "model", attention="causal").spec.attention == "causal"
    edit(folder / "model" / "config.json", is_causal=None)
    assert Encoder.load(folder / "model").spec.attention == "causal"
    edit(folder / "model" / "sentence_bert_config.json", config_args={"is_causal": False})
    assert Encoder.load(folder / "model").spec.attention == "bidirectional"


def test_code_named_by_a_folder_is_never_run(plain, tmp_path, caplog):
    """auto_map and a module's class path are read as names; a file beside them is not imported.

    A module of the folder's own is refused: it has a rule of its own, whatever its name.
    """
    model, folder = plain
    (folder / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Pooling: ...\n")
    edit(folder / "model" / "config.json", auto_map={"AutoModel": "evil.Pooling"})
    assert difference(folder, model) < TOLERANCE
    assert "whose code is never run" in caplog.text
    modules = json.loads((folder / "model" / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (folder / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules.json: module 'evil.Pooling' is not sentence-transformers' own"):
        Encoder.load(folder / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode is 'median'"),
        ("1_Pooling/config.json", {"pooling_mode": [{"a": 1}]}, "pooling_mode is {'a': 1}"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": ["query"]},
            "default_prompt_name is ['query']",
        ),
        ("1_Pooling/config.json", {"embedding_dimension": 31}, "embedding_dimension is 31"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "include_prompt is 'no'"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function is 'os.system'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Softmax"}, "activation_function"),
        ("2_Dense/config.json", {"in_features": 31}, "takes 31 features, it is given 32"),
        ("2_Dense/config.json", {"out_features": 9}, "linear.weight has shape (8, 32)"),
        ("2_Dense/config.json", {"bias": False}, "2_Dense/model.safetensors: holds"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config"),
        ("sentence_bert_config.json", {"tokenizer_args": {"add_prefix_space": True}}, "add_prefix_space"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "none"}, "prompt_name is 'none'"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "fn_name is 'maxsim'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "is 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refuses_what_it_does_not_know(file, values, named, dense_folder):
    edit(dense_folder / file, **values)
    with pytest.raises(CheckpointError) as error:
        Encoder.load(dense_folder)
    assert named in str(error.value)


@pytest.fixture(scope="module")
def built_dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    build(folder, modules=[Dense(32, 8), Normalize()], is_causal=False)
    return folder / "model"


@pytest.fixture
def dense_folder(built_dense_folder, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(built_dense_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    "path", ["/etc", "../base", "a/../../base", "..\\base", "C:\\base", "1_Pooling\0", "x" * 999, 7]
)
def test_module_paths_stay_inside(path, dense_folder):
    modules = json.loads((dense_folder / "modules.json").read_text())
    modules[1]["path"] = path
    (dense_folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules\.json: path"):
        Encoder.load(dense_folder)


def test_module_path_through_a_link(dense_folder):
    (dense_folder / "1_Pooling").rename(dense_folder.parent / "outside")
    (dense_folder / "1_Pooling").symlink_to(dense_folder.parent / "outside")
    with pytest.raises(CheckpointError, match="link that leaves"):
        Encoder.load(dense_folder)


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (["Transformer", "Pooling", "Normalize", "Dense"], "only Transformer, Pooling, Dense"),
        (["Transformer", "Dense"], "only Transformer, Pooling"),
        (["Transformer", "Pooling", "LayerNorm"], "module 'LayerNorm' is not known"),
        (["Pooling"], "only Transformer, Pooling"),
        (["Transformer"], "gives no vectors of texts; a cross-encoder"),
    ],
)
def test_refuses_other_modules_and_orders(order, named, dense_folder):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    modules = [
        {"name": str(i), "path": paths.get(n, n), "type": f"sentence_transformers.models.{n}"}
        for i, n in enumerate(order)
    ]
    (dense_folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=named):
        Encoder.load(dense_folder)


@pytest.mark.parametrize("file", ["modules.json", "1_Pooling/config.json", "config.json", "sentence_bert_config.json"])
def test_damaged_json_names_the_file(file, dense_folder):
    path = dense_folder / file
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=f"{path.name}: not valid JSON"):
        Encoder.load(dense_folder)
    path.write_text("3")
    with pytest.raises(CheckpointError, match=f"{path.name}: expected"):
        Encoder.load(dense_folder)
