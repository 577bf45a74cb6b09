"""`Encoder` as its user meets it: what goes in, what comes out, what is refused."""

import dataclasses
import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from gguf_samples import write_quantised
from parity import note
from tiny_models import TEXTS, hugging_face_states, unit
from transformers import AutoTokenizer

from flashvec import Encoder
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.text_runner import TextRunner
from flashvec.runtime.texts import TruncationWarning
from flashvec.runtime.windows import RunSettings

# --- vectors ---------------------------------------------------------------------------------------


def test_is_hugging_faces_mean(enc, folder):
    vectors = enc.embed(list(TEXTS))
    assert vectors.shape == (len(TEXTS), 32) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        want = unit(hugging_face_states(folder, text).mean(0))
        found = np.abs(vector - want.numpy()).max()
        assert note("layout", "Hugging Face decoder, mean", "transformers", found) <= 1e-5


def test_causal_last(folder):
    enc = Encoder.load(folder, dtype="float32", attention="causal", pooling="last")
    for text in TEXTS:
        want = unit(hugging_face_states(folder, text, is_causal=True)[-1])
        found = np.abs(enc.embed(text) - want.numpy()).max()
        assert note("layout", "Hugging Face decoder, last token", "transformers", found) <= 1e-5


def test_first_layers_only(folder):
    enc = Encoder.load(folder, dtype="float32", layers=2)
    want = unit(hugging_face_states(folder, TEXTS[0], num_hidden_layers=2).mean(0))
    assert np.abs(enc.embed(TEXTS[0]) - want.numpy()).max() <= 1e-5
    assert enc.spec.decoder.num_layers == 2
    with pytest.raises(ValueError, match="layers is 4, the model has 3"):
        Encoder.load(folder, layers=4)


def test_several_poolings_are_concatenated(folder, enc):
    both = Encoder.load(folder, dtype="float32", pooling=["cls", "mean"]).embed(TEXTS[1], normalize=False)
    assert both.shape == (64,)
    np.testing.assert_array_equal(both[32:], enc.embed(TEXTS[1], normalize=False))


def test_instruction_attends_but_is_not_pooled(enc, folder):
    prompt = "Query: "
    states = hugging_face_states(folder, prompt + TEXTS[1])
    offsets = AutoTokenizer.from_pretrained(folder)(prompt + TEXTS[1], return_offsets_mapping=True).offset_mapping
    own = [i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)]
    want = unit(states[own].mean(0)).numpy()
    np.testing.assert_allclose(enc.embed(TEXTS[1], instruction=prompt), want, atol=1e-5)
    assert np.abs(enc.embed(TEXTS[1]) - want).max() > 1e-3


def test_instruction_around_a_text(enc):
    around = enc.embed("cat", instruction='The word "{text}" means')
    assert np.abs(around - enc.embed("cat", instruction='The word "')).max() > 1e-4
    with pytest.raises(ValueError, match="more than once"):
        enc.embed("cat", instruction="{text} {text}")


def test_instruction_for_each_text(enc):
    mixed = enc.embed(["cat", "cat"], instruction=["Query: ", "Passage: "])
    np.testing.assert_array_equal(mixed[0], enc.embed("cat", instruction="Query: "))
    np.testing.assert_array_equal(mixed[1], enc.embed("cat", instruction="Passage: "))
    with pytest.raises(ValueError, match="instruction has 1 entry for 2 texts"):
        enc.embed(["a", "b"], instruction=["x"])


def test_prompts_by_name(folder):
    enc = Encoder.load(folder, dtype="float32")
    enc.spec = dataclasses.replace(enc.spec, prompts={"query": "Query: "}, default_prompt_name="query")
    plain = enc.embed("cat", instruction="Query: ")
    np.testing.assert_array_equal(enc.embed("cat"), plain)
    np.testing.assert_array_equal(enc.embed("cat", prompt_name="query"), plain)
    np.testing.assert_array_equal(enc.encode_query("cat"), plain)
    with pytest.raises(ValueError, match="this model's prompts are: query"):
        enc.embed("cat", prompt_name="document")
    with pytest.raises(ValueError, match="not both"):
        enc.embed("cat", prompt_name="query", instruction="x")


def test_a_suffix_survives_truncation(folder):
    enc = Encoder.load(folder, dtype="float32", pooling="last", attention="causal")
    template = 'The text "{text}" in one word:'
    with pytest.warns(TruncationWarning):
        cut = enc.embed_tokens(["prices rose " * 100], instruction=template, max_length=40)[0]
    whole = enc.embed_tokens(["prices"], instruction=template)[0]
    assert len(cut.ids) <= 40 and cut.ids[-6:].tolist() == whole.ids[-6:].tolist()
    with pytest.raises(ValueError, match="instruction alone has"):
        enc.embed("prices rose", instruction=template, max_length=5)


def test_what_follows_a_cut_text_is_no_part_of_its_vector(enc):
    text, (before, after) = "prices rose " * 100, ('The text "', '" in one word:')
    with pytest.warns(TruncationWarning):
        tokens = enc.embed_tokens([text], instruction=before + "{text}" + after, max_length=40)[0]
        vector = enc.embed(text, instruction=before + "{text}" + after, max_length=40)
    stop = tokens.offsets.max() - len(after)
    inside = [i for i, (a, b) in enumerate(tokens.offsets) if b > len(before) and a < stop]
    assert 0 < len(inside) < 40
    np.testing.assert_allclose(vector, unit(tokens.vectors[inside].mean(0)), atol=1e-6)


def test_an_empty_instruction_is_none_whatever_the_others_have(enc):
    texts = ["a decoder reads everything", "the cat"]
    mixed = enc.embed(texts, instruction=["", "Query: "])
    np.testing.assert_array_equal(mixed[0], enc.embed(texts[0], instruction=""))
    np.testing.assert_array_equal(mixed[0], enc.embed(texts[0]))
    np.testing.assert_array_equal(mixed[1], enc.embed(texts[1], instruction="Query: "))


# --- shapes and formats ----------------------------------------------------------------------------


def test_shapes(enc):
    assert enc.embed("cat").shape == (32,)
    assert enc.embed([]).shape == (0, 32)
    assert enc.embed([], output="torch").shape == (0, 32)
    assert enc.embed_tokens([]) == [] and list(enc.embed_iter([])) == []


@pytest.mark.parametrize(
    "kind", [tuple, iter, np.array, lambda x: np.array(x, dtype=object), pd.Series, lambda x: (t for t in x)]
)
def test_any_iterable_of_texts(enc, kind):
    np.testing.assert_array_equal(enc.embed(kind(list(TEXTS))), enc.embed(list(TEXTS)))


def test_empty_and_blank_texts_are_finite(enc):
    vectors = enc.embed(["", " ", "\n", "cat"])
    assert np.isfinite(vectors).all()
    states = enc.embed_tokens([""])[0]
    assert states.ids.tolist() == list(enc.tokenizer.prefix_ids)  # an empty text is its BOS
    np.testing.assert_allclose(vectors[0], unit(states.vectors)[0], atol=1e-6)
    assert np.isfinite(enc.embed("", instruction="Query: ")).all()


def test_count_tokens(enc, folder):
    want = [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(list(TEXTS)).input_ids]
    assert enc.count_tokens(list(TEXTS)).tolist() == want
    assert enc.count_tokens(TEXTS[0]) == want[0]
    wrapped = [f"Say {text} now" for text in TEXTS]
    counted = enc.count_tokens(list(TEXTS), instruction="Say {text} now")
    assert counted.tolist() == enc.count_tokens(wrapped).tolist()


def test_one_warning_for_all_that_were_cut(enc):
    with pytest.warns(TruncationWarning, match="2 of 3 texts were longer than max_length=6 tokens") as caught:
        cut = enc.embed(["a", TEXTS[3], TEXTS[5]], max_length=6)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert np.isfinite(cut).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enc.embed(["a"], max_length=6)
    with pytest.raises(ValueError, match="max_length is 513, the model has 512 positions"):
        enc.embed("a", max_length=513)


def test_special_token_strings_in_a_text(enc, folder):
    text = "a </s> b"
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert enc.embed_tokens([text])[0].ids.tolist() == ids  # kept, as Hugging Face keeps them
    split = enc.embed_tokens([text], split_special=True)[0]
    assert enc.tokenizer.eos_id not in split.ids.tolist()
    assert np.abs(enc.embed(text) - enc.embed(text, split_special=True)).max() > 1e-3


# --- sentence-transformers' names ----------------------------------------------------------------------


def test_synonyms(enc):
    texts = list(TEXTS)
    np.testing.assert_array_equal(enc.encode(texts), enc.embed(texts))
    np.testing.assert_array_equal(enc.encode(texts, normalize_embeddings=True, batch_size=2), enc.embed(texts))
    assert isinstance(enc.encode(texts, convert_to_tensor=True), torch.Tensor)
    assert isinstance(enc.encode(texts, convert_to_numpy=False), list)
    assert enc.encode("cat", output_value="token_embeddings").shape[1] == 32
    np.testing.assert_array_equal(enc.encode_document(texts), enc.embed(texts))
    scores = enc.similarity(enc.embed(texts), enc.embed(texts[:2]))
    assert scores.shape == (len(texts), 2) and torch.allclose(scores.diagonal(), torch.ones(2))


# --- loading --------------------------------------------------------------------------------------


def test_a_plain_decoder_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING, "flashvec"):
        Encoder.load(folder)
    assert "bidirectional attention and mean pooling, which it was not trained for" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flashvec"):
        Encoder.load(folder, attention="bidirectional", pooling="mean")
    assert not caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "both"}, "attention is 'both', known are bidirectional, causal"),
        ({"pooling": "median"}, "pooling is 'median', known are mean"),
        ({"dtype": "int4"}, "dtype is 'int4', known are float32"),
        ({"max_length": 513}, "max_length is 513, the model has 512 positions"),
        ({"truncate_dim": 99}, "truncate_dim is 99, the model's vectors have 32"),
        ({"compat": "hf"}, "compat is 'hf'"),
        ({"device": "all"}, "device='all'"),
        ({"layers": 0}, "layers is 0"),
        ({"truncate_dim": 0}, "truncate_dim is 0; expected at least 1"),
        ({"pooling": []}, "names none"),
    ],
)
def test_refuses_arguments_by_name(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Encoder.load(folder, **arguments)


@pytest.mark.parametrize("given", [{"max_length": "5"}, {"truncate_dim": 5.5}, {"layers": True}])
def test_refuses_what_is_no_whole_number(folder, given):
    with pytest.raises(TypeError, match="expected a whole number"):
        Encoder.load(folder, **given)


@pytest.mark.parametrize("given", [{"max_length": 4.5}, {"truncate_dim": "8"}, {"batch_tokens": True}])
def test_a_call_refuses_what_is_no_whole_number(folder, given):
    encoder = Encoder.load(folder)
    with pytest.raises(TypeError, match=f"{next(iter(given))} is .*; expected a whole number"):
        encoder.embed(["a"], **given)
    assert encoder.embed(["a"], truncate_dim=np.int64(8)).shape == (1, 8)


def test_a_folder_has_no_revision_and_a_model_has_a_name(folder):
    with pytest.raises(CheckpointError, match="revision is 'main', but this is a place on this machine"):
        Encoder.load(folder, revision="main")
    with pytest.raises(CheckpointError, match="the model's name is empty"):
        Encoder.load("")


def test_a_hub_id_without_network_is_one_line():
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder here, and the hub could not") as error:
        Encoder.load("nobody/nothing", local_files_only=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "texts", [None, 3, b"bytes", {"a": 1}, ["a", None], ["a", 3], [["a"]], [b"a"], ["a", float("nan")]]
)
def test_refuses_what_is_no_text(enc, texts):
    with pytest.raises((TypeError, ValueError), match="texts"):
        enc.embed(texts)


def test_lone_surrogates_lose_nothing(enc):
    with pytest.warns(UserWarning, match="surrogate"):
        vectors = enc.embed(["a", "b \ud800 c"])
    assert np.isfinite(vectors).all()


def test_megabytes_of_text(enc):
    with pytest.warns(TruncationWarning):
        long = enc.embed("Mix flour and water. " * 100_000, max_length=64)
    with pytest.warns(TruncationWarning):
        np.testing.assert_array_equal(long, enc.embed("Mix flour and water. " * 100, max_length=64))


def test_workers_and_budget_change_no_bits(folder, enc):
    texts = [" ".join(TEXTS[i % 8] for i in range(k % 7 + 1)) for k in range(40)]
    want = enc.embed(texts)
    many = Encoder.load(folder, dtype="float32")
    many.workers = 2
    threads = torch.get_num_threads()
    for budget in (1, 64, 500):
        np.testing.assert_array_equal(many.embed(texts, batch_tokens=budget), want)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        enc.embed("x", batch_tokens=0)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_default_device_of_torch_is_not_where_it_runs(tmp_path, folder, kind):
    model = folder if kind == "folder" else write_quantised(tmp_path / "model.gguf")

    def results() -> list[np.ndarray]:
        enc = Encoder.load(model, dtype="float32", device="cpu")
        enc.whiten(TEXTS)
        enc.calibrate(TEXTS)
        vectors = enc.embed(TEXTS, out=np.empty((len(TEXTS), enc.spec.embedding_size), np.float32))
        parts = enc.embed(TEXTS, spans=[[(0, 1)]] * len(TEXTS))
        return [vectors, *parts.spans, enc.embed(TEXTS, precision="int8"), enc.similarity(vectors, vectors).numpy()]

    want = results()
    with torch.device("meta"):
        found = results()
    assert all(map(np.array_equal, found, want))


def test_counts_what_it_ran(enc):
    runner = TextRunner(enc.spec, enc.decoder, enc.tokenizer)
    vectors = runner._embed_rows(list(TEXTS), None, RunSettings(batch_tokens=30), None, None, on_device=False)
    np.testing.assert_array_equal(vectors, enc.embed(list(TEXTS)))
    assert (runner.num_texts_run, runner.num_tokens_run) == (len(TEXTS), enc.count_tokens(list(TEXTS)).sum())


def test_progress_bar_goes_to_stderr(enc, capsys):
    enc.embed(list(TEXTS), show_progress=True)
    captured = capsys.readouterr()
    assert not captured.out and "embedding" in captured.err


def test_prints_what_it_is(enc):
    assert repr(enc) == "Encoder(llama, bidirectional, mean, dim=32, max_length=512, float32 on cpu)"
    assert "pooling        mean over all tokens" in str(enc.spec)
