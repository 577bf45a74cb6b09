"""Special tokens and rules of a folder's files; folders written for Hugging Face; damaged files."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_checkpoint
from tokenizer_samples import FAST, KINDS, NAMES, TEXTS, backend_of, rows_of, write_folder
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from flashvec.runtime import tokenizer_files
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.tokenize import Tokenizer


def test_special_tokens_of_the_configuration(tmp_path: Path) -> None:
    backend = Backend.from_str(backend_of("llama2").to_str())
    backend.add_special_tokens([AddedToken("<pad>", special=True)])
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": None,
        "mask_token": "_",
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend, config | FAST))
    assert tokenizer.bos_id == 1 and tokenizer.eos_id is None  # said to be none: not looked for
    assert tokenizer.pad_id == backend.token_to_id("<pad>")  # named nowhere: by its usual name
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((1,), ())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_id == theirs.mask_token_id
    assert tokenizer.encode(["a_b cat"], 32).ids.tolist() == theirs("a_b cat")["input_ids"]  # "_" now stands alone


def test_special_tokens_map_and_added_tokens_of_older_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, backend_of("llama2"), FAST)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": "</s>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 900}))
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 2) == (theirs.bos_token_id, theirs.pad_token_id)
    assert tokenizer.encode(["cat <extra>"], 32).ids.tolist() == theirs("cat <extra>")["input_ids"]


@pytest.mark.parametrize(
    "more",
    [
        {"extra_special_tokens": ["dog"]},
        {"extra_special_tokens": {"animal_token": "dog"}},
        {"additional_special_tokens": ["dog"]},
        {"animal_token": "dog"},
        {"added_tokens_decoder": {"9": {"content": "dog", "special": False, "lstrip": True}}},
        {"pad_token": "[PAD]"},
        {"add_prefix_space": True},
    ],
)
def test_tokens_that_only_the_configuration_has(tmp_path: Path, more: dict) -> None:
    write_folder(tmp_path, backend_of("llama3"), NAMES | FAST | more)
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "hot  dogs[PAD] x"):
        assert tokenizer.encode([text], 99).ids.tolist() == (theirs(text)["input_ids"] or [2])


@pytest.mark.parametrize("kind", ["llama2", "gpt2", "llama3", "unigram"])
def test_eos_is_added_where_the_configuration_says_so(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST | {"add_eos_token": True, "add_bos_token": False})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.suffix_ids == (2,)
    assert tokenizer.prefix_ids == ((1,) if kind == "llama2" else ())  # the template adds it: false changes nothing
    assert tokenizer.encode(["the cat sat on the mat"], 4).ids[-1] == 2
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text, ids in zip(TEXTS, rows_of(tokenizer.encode(TEXTS, 6)), strict=True):
        assert ids == theirs(text, truncation=True, max_length=6)["input_ids"]


def test_bos_is_added_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = NAMES | FAST | {"add_eos_token": True, "add_bos_token": True}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend_of("gpt2"), config))
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((1,), (2,))
    assert Tokenizer.from_backend(backend_of("gpt2"), bos_id=1, add_bos=True).prefix_ids == (1,)


def test_a_llama_folder_follows_tokenizer_json(tmp_path: Path) -> None:
    """transformers 5 rebuilds LlamaTokenizer from its class: other ids for a leading space (see the module)."""
    write_folder(tmp_path, backend_of("llama2"), NAMES | {"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    plain = ["the cat sat on the mat", "东京都是日本的首都，人口很多。", "naïve café", "x\ny", ""]
    assert rows_of(tokenizer.encode(plain, 99)) == [theirs(text)["input_ids"] for text in plain]
    spaced = " the cat"
    assert tokenizer.encode([spaced], 99).ids.tolist() == backend_of("llama2").encode(spaced).ids


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_opens_in_transformers(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST | {"model_max_length": 77, "padding_side": "left"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.pad_token_id == tokenizer.eos_id == 2
    assert theirs.model_max_length == 77 and theirs.padding_side == "left"
    again = Tokenizer.from_folder(tmp_path / "saved")
    for max_length in (3, 512):
        rows = rows_of(tokenizer.encode(TEXTS, max_length))
        assert rows == rows_of(again.encode(TEXTS, max_length))
        found = theirs(TEXTS, truncation=True, max_length=max_length)
        assert set(found) == {"input_ids", "attention_mask"}
        assert rows == [ids or [2] for ids in found["input_ids"]]


MODEL_TYPES = {
    "qwen": ["qwen2", "qwen3"],
    "llama3": ["llama"],
    "llama2": ["llama", "mistral"],
    "gemma": ["gemma3_text"],
}


@pytest.mark.parametrize(("kind", "model_type"), [(k, name) for k, names in MODEL_TYPES.items() for name in names])
def test_saved_folder_beside_a_model(tmp_path: Path, kind: str, model_type: str) -> None:
    """transformers picks the tokenizer's class by the model's type too; the ids stay the same."""
    Tokenizer.from_backend(backend_of(kind), bos_id=1, eos_id=2, unk_id=0, add_eos=True).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(TEXTS, rows_of(tokenizer.encode(TEXTS, 9)), strict=True):
        assert ids == theirs(text, truncation=True, max_length=9)["input_ids"] and ids[-1] == 2


def test_saving_needs_a_token_to_pad_with(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_backend(backend_of("gpt2"), bos_id=1)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<s>"
    with pytest.raises(ValueError, match="to pad with"):
        Tokenizer.from_backend(backend_of("llama2")).save(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    for damaged in ("", "{}", "[]", backend_of("gpt2").to_str()[:-50]):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
            Tokenizer.from_folder(tmp_path)
    backend_of("gpt2").save(str(tmp_path / "tokenizer.json"))
    for damaged, message in (
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "expected a JSON object"),
        ('{"eos_token": 3}', "eos_token"),
        ('{"added_tokens_decoder": {"x": {}}}', "added tokens"),
        ('{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ('{"extra_special_tokens": 3}', "extra_special_tokens"),
        ('{"extra_special_tokens": [3]}', "extra_special_tokens"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("add_eos_token", "yes"), ("add_bos_token", 1)])
def test_what_would_be_passed_over_is_refused(tmp_path: Path, key: str, value: object) -> None:
    tiny_checkpoint(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key} is {value!r}; "):
        Tokenizer.from_folder(tmp_path)


def test_texts_to_be_cut_on_the_left_are_said_to_keep_their_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_checkpoint(tmp_path, "llama")
    for side, said in (("right", 0), (None, 0), ("left", 1)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"truncation_side": side}))
        Tokenizer.from_folder(tmp_path)
        assert caplog.text.count("here long texts keep their starts") == said


def test_dropout_of_a_tokenizer_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_checkpoint(tmp_path)
    path = tmp_path / "tokenizer.json"
    sure = tokenizer_files.read_backend(tmp_path).encode(TEXTS[0]).ids
    values = json.loads(path.read_text())
    values["model"]["dropout"] = 0.9
    path.write_text(json.dumps(values))
    assert tokenizer_files.read_backend(tmp_path).encode(TEXTS[0]).ids == sure and "dropout" in caplog.text
