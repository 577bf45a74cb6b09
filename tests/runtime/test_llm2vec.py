"""LLM2Vec: how a chain of adapters is found, and the reference's rules against a second writing of them.

The reference (llm2vec 0.2.3) needs a transformers of 2024, so its rules are written down here once more, from
its text: `Reference` follows `LLM2Vec.encode` step by step over transformers' own model and tokenizer, in
padded batches.
"""

import json
import shutil
import warnings

import numpy as np
import peft
import pytest
import torch
from parity import note
from tiny_models import PROJECTIONS, TEXTS, tiny_adapter, tiny_model, tiny_tokenizer, unit
from transformers import AutoTokenizer

from flashvec import Encoder
from flashvec.kernels.linear import unpacked
from flashvec.runtime.checkpoint.llm2vec import TEMPLATES
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.texts import TruncationWarning
from flashvec.runtime.tokenize import Tokenizer

LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA2 = "meta-llama/Llama-2-7b-chat-hf"
QWEN2 = "Qwen/Qwen2-7B-Instruct"
SHEARED = "princeton-nlp/Sheared-LLaMA-1.3B"
INSTRUCTIONS = ["Retrieve similar text:", "", "  given a query, find: ", "x", "", "a b c", "Query:", ""]
TOLERANCE = 1e-5
CHAIN = "LLM2Vec, base and two adapters"


class Reference:
    """`LLM2Vec.encode`: separator, word-wise cut, template, left padding, mask by count, pooling."""

    SEPARATOR = "!@#$%^&*()"

    def __init__(self, model, tokenizer, base, pooling="mean", max_length=512, doc_max_length=400, skip=True):
        self.model, self.tokenizer, self.base, self.pooling = model, tokenizer, base, pooling
        self.max_length, self.doc_max_length, self.skip = max_length, doc_max_length, skip
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"

    def count(self, text):
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_length])

    def joined(self, instruction, text):
        n = self.count(text)
        while n > self.doc_max_length:
            text = " ".join(text.split()[: int(len(text.split()) * (self.doc_max_length / n))])
            n = self.count(text)
        return f"{instruction.strip()} {self.SEPARATOR}{text}" if instruction else self.SEPARATOR + text

    def wrapped(self, text):
        if self.base == LLAMA3:
            return "<|start_header_id|>user<|end_header_id|>\n\n" + text.strip() + "<|eot_id|>"
        if self.base in ("mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-chat-hf"):
            text = "[INST] " + text.strip() + " [/INST]"
        if self.base in ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct"):
            text = "<|im_start|>user\n" + text.strip() + "<|im_end|>"
        if self.pooling == "eos_token":
            if self.base == "meta-llama/Meta-Llama-3-8B":
                text = text.strip() + "<|end_of_text|>"
            else:
                eos = {"llama": " </s>", "mistral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}
                text = text.strip() + eos[self.model.config.model_type]
        return text

    @torch.no_grad()
    def encode(self, texts, instructions=None):
        instructions = instructions or [""] * len(texts)
        pairs = zip(instructions, texts, strict=True)
        parts = [self.wrapped(self.joined(*pair)).split(self.SEPARATOR) for pair in pairs]
        batch = self.tokenizer(
            ["".join(p) for p in parts],
            padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        hidden = self.model(**batch).last_hidden_state
        mask = torch.zeros_like(batch["attention_mask"])
        for row, part in zip(mask, parts, strict=True):
            n = self.count(part[1]) if len(part) > 1 else 0
            if n:
                row[-n:] = 1
        lengths = (mask if self.skip else batch["attention_mask"]).sum(1)
        if self.pooling == "mean":
            return torch.stack([h[-n:].mean(0) for h, n in zip(hidden, lengths, strict=True)])
        if self.pooling == "weighted_mean":
            weights = [torch.arange(1.0, n + 1) / torch.arange(1.0, n + 1).sum() for n in lengths.tolist()]
            return torch.stack([(h[-len(w) :] * w[:, None]).sum(0) for h, w in zip(hidden, weights, strict=True)])
        if self.pooling == "bos_token":
            return hidden[batch["input_ids"] == self.tokenizer.bos_token_id]
        return hidden[:, -1]


SPECIALS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<eos>",
    "<|endoftext|>",
)


def base_model(folder, family="llama", **keys):
    """A base as it is published: language-model head, tokenizer; returns its decoder."""
    folder.mkdir(parents=True)
    tiny_tokenizer(folder, specials=SPECIALS)
    return tiny_model(folder, family, causal_lm=True, **keys).model


def adapter(decoder, folder, base, *, mntp=False, settings=None, **keys):
    """Train one adapter as LLM2Vec does, over the headless model; returns the merged decoder.

    Args:
        base: what adapter_config.json names.
        mntp: put config.json and a tokenizer beside it, as the published MNTP models have them.
        settings: llm2vec_config.json.
    """
    decoder.config._name_or_path = str(base)
    merged = tiny_adapter(decoder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(base), "auto_mapping": {"base_model_class": "LlamaBiModel"}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if mntp:
        own = {
            "architectures": ["LlamaEncoderModel"],
            "_name_or_path": str(base),
            "auto_map": {"AutoModel": "m.X"},
            **keys,
        }
        (folder / "config.json").write_text(json.dumps(merged.config.to_dict() | own))
        tiny_tokenizer(folder, specials=(*SPECIALS, "_"))
    if settings is not None:
        (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    return merged


@pytest.fixture
def chain(tmp_path):
    """base, base-mntp and base-mntp-supervised beside each other; the fully merged bidirectional decoder."""
    decoder = base_model(tmp_path / "base", is_causal=False)
    decoder = adapter(decoder, tmp_path / "base-mntp", tmp_path / "base", mntp=True, _name_or_path=LLAMA3)
    settings = {"pooling_mode": "mean", "max_length": 96, "doc_max_length": 60, "skip_instruction": True}
    decoder = adapter(decoder, tmp_path / "base-mntp-supervised", tmp_path / "base", settings=settings)
    return tmp_path, decoder


def difference(ours, theirs, what="LLM2Vec, merged folder"):
    assert ours.shape == tuple(theirs.shape) and theirs.abs().max() > 0.1
    found = float((torch.from_numpy(ours) - theirs).abs().max() / theirs.abs().max().clamp_min(1))
    return note("layout", what, "the reference's rules", found)


# --- the reference's rules ----------------------------------------------------------------------------------

LONG = (
    "the dough has to rise again and again " * 15,
    "one\ntwo\tthree   four " * 40,
    "left !@#$%^&*() right",
    "a !@#$%^&*() b !@#$%^&*() c",
    "trailing space \n",
)


@pytest.mark.parametrize(
    ("base", "pooling", "family"),
    [
        *((SHEARED, mode, "llama") for mode in ("mean", "weighted_mean", "eos_token", "last_token", "bos_token")),
        *((base, mode, "llama") for base in (LLAMA3, LLAMA2) for mode in ("mean", "eos_token")),
        *((base, mode, "qwen2") for base in (QWEN2, "Qwen/Qwen2.5-7B") for mode in ("mean", "eos_token")),
        (LLAMA2, "weighted_mean", "mistral"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*longer than max_length")
def test_compat_equals_the_reference(base, pooling, family, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    tiny_tokenizer(folder, specials=SPECIALS)
    model = tiny_model(folder, family, is_causal=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaBiModel"], "_name_or_path": base, "is_causal": None}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"pooling_mode": pooling, "max_length": 96, "doc_max_length": 60, "skip_instruction": True}
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    reference = Reference(model, AutoTokenizer.from_pretrained(folder), base, pooling, 96, 60)
    encoder = Encoder.load(folder, compat="llm2vec", dtype="float32")
    assert encoder.spec.span == "count_from_right" and not encoder.spec.normalize

    texts = [*TEXTS, *LONG]
    for instructions in (None, [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(len(texts))]):
        ours = encoder.embed(texts, instruction=instructions)
        assert difference(ours, reference.encode(texts, instructions)) < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_that_is_asked_for_decides_about_the_token_at_the_end(pooling, tmp_path):
    base_model(tmp_path / "base")
    (tmp_path / "base" / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "eos_token"}))
    as_stated = Encoder.load(tmp_path / "base", compat="llm2vec", dtype="float32").spec
    asked = Encoder.load(tmp_path / "base", compat="llm2vec", dtype="float32", pooling=pooling).spec
    assert as_stated.text_suffix and asked.text_suffix == (as_stated.text_suffix if pooling == "last" else "")


def test_a_long_word_is_cut_to_nothing_as_in_the_reference(tmp_path):
    """The cut drops whole words. Real tokens are pooled then; the reference pools its padding too."""
    base_model(tmp_path / "base")
    encoder = Encoder.load(tmp_path / "base", compat="llm2vec", dtype="float32")
    word, empty = encoder.embed(["nospaces" * 200, ""])
    assert np.array_equal(word, empty) and np.isfinite(word).all()


@pytest.mark.parametrize("text", ["word " * 70, "nospaces" * 40, "</s> word " * 70], ids=["words", "one", "special"])
def test_what_is_cut_by_words_is_counted(text, tmp_path):
    """Cut to `doc_max_length` it is shorter than `max_length`, and one long word is gone altogether."""
    base_model(tmp_path / "base")
    settings = {"max_length": 500, "doc_max_length": 60}
    (tmp_path / "base" / "llm2vec_config.json").write_text(json.dumps(settings))
    encoder = Encoder.load(tmp_path / "base", compat="llm2vec", dtype="float32")
    with pytest.warns(TruncationWarning, match="1 of 2 texts were longer than doc_max_length=60 or max_length=500 tok"):
        encoder.embed(["short", text])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embed(["short", "x"])


def test_split_special_keeps_the_template_whole_or_is_refused(chain):
    folder, _ = chain
    encoder = Encoder.load(folder / "base-mntp-supervised", dtype="float32")
    assert np.array_equal(encoder.embed(TEXTS[2]), encoder.embed(TEXTS[2], split_special=True))
    encoder = Encoder.load(folder / "base-mntp-supervised", dtype="float32", compat="llm2vec")
    for embed in (encoder.embed, encoder.embed_tokens):
        with pytest.raises(ValueError, match="split_special and compat='llm2vec' do not go together"):
            embed([TEXTS[2]], split_special=True)


@pytest.mark.parametrize("compat", ["llm2vec", None])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_without_skip_instruction_all_tokens_are_pooled(pooling, compat, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    tiny_tokenizer(folder, specials=SPECIALS)
    model = tiny_model(folder, is_causal=False)
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": LLAMA3, "is_causal": None}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"pooling_mode": pooling, "skip_instruction": False}
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    reference = Reference(model, AutoTokenizer.from_pretrained(folder), LLAMA3, pooling, skip=False)
    encoder = Encoder.load(folder, compat=compat, dtype="float32")
    texts, theirs = list(TEXTS), reference.encode(list(TEXTS), INSTRUCTIONS)
    ours = encoder.embed(texts, instruction=INSTRUCTIONS)
    assert difference(ours, theirs if compat else unit(theirs)) < TOLERANCE


def test_our_own_rules_agree_with_the_reference_where_both_are_defined(chain):
    """No separator, no long document, a border that no token spans: the same vectors, normalised."""
    folder, decoder = chain
    tokenizer = AutoTokenizer.from_pretrained(folder / "base-mntp")
    encoder = Encoder.load(folder / "base-mntp-supervised", dtype="float32")
    assert encoder.spec.span == "template" and encoder.spec.template == TEMPLATES[LLAMA3]
    texts = ["summit", "a decoder reads everything", "The cat sleeps."]
    theirs = Reference(decoder, tokenizer, LLAMA3, "mean", 96, 60).encode(texts)
    assert difference(encoder.embed(texts), unit(theirs), CHAIN) < TOLERANCE


# --- chains -------------------------------------------------------------------------------------------------


def test_second_adapter_finds_the_mntp_adapter_beside_it(chain, caplog):
    folder, decoder = chain
    tokenizer = AutoTokenizer.from_pretrained(folder / "base-mntp")
    reference = Reference(decoder, tokenizer, LLAMA3, "mean", 96, 60)
    encoder = Encoder.load(folder / "base-mntp-supervised", compat="llm2vec", dtype="float32")
    assert difference(encoder.embed(list(TEXTS)), reference.encode(list(TEXTS)), CHAIN) < TOLERANCE
    assert "the weights are those of base" in caplog.text
    assert "base-mntp, then base-mntp-supervised" in caplog.text
    spec = encoder.spec
    assert (spec.layout, spec.attention, spec.pooling) == ("llm2vec", "bidirectional", ("mean",))
    assert (spec.max_length, spec.document_max_length, spec.base_model) == (96, 60, LLAMA3)


def test_the_mntp_tokenizer_is_used(chain):
    folder, _ = chain
    found = {
        model: Encoder.load(folder / model, dtype="float32").tokenizer.backend.to_str()
        for model in ("base", "base-mntp", "base-mntp-supervised")
    }
    assert found["base-mntp"] == Tokenizer.from_folder(folder / "base-mntp").backend.to_str() != found["base"]
    assert found["base-mntp-supervised"] == found["base-mntp"]


def same(a, b):
    return np.array_equal(a.embed(list(TEXTS)), b.embed(list(TEXTS)))


def test_every_way_to_name_the_chain_gives_the_same_bits(chain):
    folder, _ = chain
    base, mntp, second = (folder / name for name in ("base", "base-mntp", "base-mntp-supervised"))
    whole = Encoder.load(second, dtype="float32")
    assert same(whole, Encoder.load(mntp, adapters=[second], dtype="float32"))
    assert same(whole, Encoder.load(base, adapters=[mntp, second], dtype="float32"))
    assert same(whole, Encoder.load(str(mntp), adapters=str(second), dtype="float32"))
    assert not same(whole, Encoder.load(mntp, dtype="float32"))
    assert not same(whole, Encoder.load(base, adapters=[second], dtype="float32"))


def test_merged_once_in_fp32_then_rounded_once(chain):
    folder, decoder = chain
    encoder = Encoder.load(folder / "base-mntp-supervised", dtype="bfloat16")
    truth = decoder.layers[1].self_attn.o_proj.weight
    out = unpacked(encoder.decoder.layers[1].out)
    assert torch.isclose(out.float(), truth, rtol=2**-8, atol=1e-6).all()
    assert (out == truth.bfloat16()).float().mean() > 0.99  # but for sums that fall on a rounding border


def test_mntp_training_output_without_config(chain):
    """What MNTP training leaves: an adapter that names its base, no config.json beside it."""
    folder, _ = chain
    whole = Encoder.load(folder / "base-mntp", dtype="float32")
    (folder / "base-mntp" / "config.json").unlink()
    config = json.loads((folder / "base" / "config.json").read_text()) | {"_name_or_path": LLAMA3}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert same(whole, Encoder.load(folder / "base-mntp", dtype="float32"))


def test_merged_folder(chain):
    folder, decoder = chain
    merged = folder / "merged"
    decoder.save_pretrained(merged)
    assert all(not name.startswith("model.") for name in decoder.state_dict())
    config = json.loads((merged / "config.json").read_text()) | {
        "architectures": ["LlamaBiModel"],
        "_name_or_path": LLAMA3,
    }
    (merged / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "base-mntp-supervised" / "llm2vec_config.json", merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "base-mntp" / name, merged)
    ours, chained = (
        Encoder.load(merged, dtype="float32"),
        Encoder.load(folder / "base-mntp-supervised", dtype="float32"),
    )
    assert np.abs(ours.embed(list(TEXTS)) - chained.embed(list(TEXTS))).max() < TOLERANCE
    assert ours.spec == chained.spec


def test_folders_moved_together_are_found(chain, tmp_path):
    """adapter_config.json names a path that is gone; the base lies beside the adapter."""
    folder, _ = chain
    whole = Encoder.load(folder / "base-mntp-supervised", dtype="float32")
    for name in ("base", "base-mntp", "base-mntp-supervised"):
        shutil.move(folder / name, folder / "elsewhere" / name)
    assert same(whole, Encoder.load(folder / "elsewhere" / "base-mntp-supervised", dtype="float32"))


def test_missing_mntp_adapter(chain):
    folder, _ = chain
    shutil.rmtree(folder / "base-mntp")
    with pytest.raises(
        CheckpointError, match=r"mntp-supervised: was trained on top of the MNTP adapter base-mntp.*adapters="
    ):
        Encoder.load(folder / "base-mntp-supervised")
    (folder / "base-mntp-supervised").rename(folder / "renamed")
    with pytest.raises(CheckpointError, match=r"renamed: does not tell whether an MNTP adapter.*load\(base_or_mntp"):
        Encoder.load(folder / "renamed")


@pytest.mark.parametrize("base", ["someone/no-such-model", None, "/no/such/folder", "x" * 999])
def test_missing_base(base, chain):
    folder, _ = chain
    shutil.rmtree(folder / "base")
    path = folder / "base-mntp" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(CheckpointError, match=r"/adapter_config\.json: base_model_name_or_path.*adapters=\["):
        Encoder.load(folder / "base-mntp", local_files_only=True)


def test_adapters_in_a_circle(chain):
    folder, _ = chain
    for one, other in (("base-mntp", "second"), ("second", "base-mntp")):
        if not (folder / one).exists():
            shutil.copytree(folder / "base-mntp", folder / one)
        path = folder / one / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / other)}
        path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="more than 4 adapters name one another"):
        Encoder.load(folder / "base-mntp")


def test_bare_adapter_on_a_plain_decoder(tmp_path, caplog):
    """No mark of LLM2Vec: the base's own rules, with its notice."""
    decoder = base_model(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    model = peft.get_peft_model(decoder, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    encoder = Encoder.load(tmp_path / "tuned", dtype="float32")
    assert encoder.spec.layout == "hf" and encoder.spec.span == "offsets" and encoder.spec.template is None
    assert "was not trained for" in caplog.text
    assert same(encoder, Encoder.load(tmp_path / "base", adapters=tmp_path / "tuned", dtype="float32"))
    assert not same(encoder, Encoder.load(tmp_path / "base", dtype="float32"))


def test_settings_are_checked(chain):
    folder, _ = chain
    path = folder / "base-mntp-supervised" / "llm2vec_config.json"
    for values, named in (
        ({"pooling_mode": "median"}, r"pooling_mode is 'median'.*pass pooling="),
        ({"pooling_mode": ["mean"]}, r"pooling_mode is \['mean'\].*pass pooling="),
        ({"max_length": -1}, "max_length is -1"),
        ({"doc_max_length": "long"}, "doc_max_length is 'long'"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=rf"llm2vec_config\.json: {named}"):
            Encoder.load(folder / "base-mntp-supervised")
    assert Encoder.load(folder / "base-mntp", pooling="max", max_length=33).spec.max_length == 33
    with pytest.raises(ValueError, match="max_length is 513, the model has 512"):
        Encoder.load(folder / "base-mntp", max_length=513)


def test_compat_drops_windows_and_loads_plain_decoders(tmp_path):
    base_model(tmp_path / "base", "mistral", sliding_window=4)
    assert Encoder.load(tmp_path / "base").spec.decoder.layer_windows == (4, 4, 4)
    spec = Encoder.load(tmp_path / "base", compat="llm2vec").spec
    assert spec.decoder.layer_windows == (None, None, None) and spec.compat == "llm2vec"
