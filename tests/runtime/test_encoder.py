"""`Encoder` as its user meets it: what goes in, what comes out, what is refused."""

import dataclasses
import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from parity import note
from tiny_models import TEXTS, tiny_adapter, tiny_checkpoint, unit
from transformers import AutoConfig, AutoModel, AutoTokenizer

from flashvec import Encoder
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.encoder import TruncationWarning
from flashvec.runtime.parts import SpanVectors, TokenVectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def enc(folder):
    return Encoder.load(folder, dtype="float32")


def hugging_face_states(folder, text, is_causal=False, **config):
    hf_config = AutoConfig.from_pretrained(folder, **config)
    hf_config.is_causal = is_causal
    model = AutoModel.from_pretrained(folder, config=hf_config).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(ids).last_hidden_state[0]


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


def test_normalize_and_truncate(enc):
    raw = enc.embed(TEXTS[0], normalize=False)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    cut = enc.embed(TEXTS[0], truncate_dim=8)
    np.testing.assert_allclose(cut, raw[:8] / np.linalg.norm(raw[:8]), atol=1e-6)
    with pytest.raises(ValueError, match="truncate_dim is 33, the vectors have 32"):
        enc.embed("x", truncate_dim=33)


def test_torch_output(enc):
    vectors = enc.embed(list(TEXTS), output="torch")
    assert isinstance(vectors, torch.Tensor) and vectors.device == enc.device
    np.testing.assert_array_equal(vectors.numpy(), enc.embed(list(TEXTS)))
    with pytest.raises(ValueError, match="output is 'jax'"):
        enc.embed("x", output="jax")


def test_writes_into_an_array_or_memmap(enc, tmp_path, monkeypatch):
    out = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, (len(TEXTS), 32))
    assert enc.embed(list(TEXTS), out=out) is out
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), enc.embed(list(TEXTS)))
    with pytest.raises(ValueError, match=r"out has shape \(2, 2\)"):
        enc.embed("x", out=np.zeros((2, 2)))
    monkeypatch.setattr(enc, "_embed_rows", lambda *rest: pytest.fail("it worked before it looked"))
    for wrong in (np.zeros((len(TEXTS), 31), np.float32), np.zeros((len(TEXTS), 32), np.int32)):
        with pytest.raises(ValueError, match="out has"):
            enc.embed(list(TEXTS), out=wrong)


def test_precisions(folder):
    enc = Encoder.load(folder, dtype="float32")
    full = enc.embed(list(TEXTS))
    np.testing.assert_array_equal(enc.embed(list(TEXTS), precision="float16"), full.astype(np.float16))
    np.testing.assert_array_equal(enc.embed(list(TEXTS), precision="ubinary"), np.packbits(full > 0, axis=1))
    assert enc.embed(list(TEXTS), precision="binary").dtype == np.int8
    with pytest.raises(ValueError, match=r"calibrate\(texts\)"):
        enc.embed("x", precision="int8")
    with pytest.raises(ValueError, match="precision is 'int4'"):
        enc.embed("x", precision="int4")
    enc.calibrate(TEXTS)
    small = enc.embed(list(TEXTS), precision="int8")
    assert small.dtype == np.int8
    low, high = (np.array(r) for r in enc.spec.int8_ranges)
    back = (small.astype(np.float32) + 128) / 255 * (high - low) + low
    assert np.abs(back - full).max() <= (high - low).max() / 255 * 1.01
    assert small.min() == -128 and small.max() == 127  # the calibration texts' own ends


def test_integers_are_written_into_what_holds_them(folder):
    enc = Encoder.load(folder, dtype="float32")
    enc.calibrate(TEXTS)
    wide = enc.embed(list(TEXTS), precision="uint8", out=np.zeros((len(TEXTS), 32), np.int16))
    np.testing.assert_array_equal(wide, enc.embed(list(TEXTS), precision="uint8"))
    for precision, dtype in (("uint8", np.int8), ("int8", np.uint8), ("ubinary", np.int8), ("binary", np.uint8)):
        out = np.zeros((len(TEXTS), 4 if "binary" in precision else 32), dtype)
        with pytest.raises(ValueError, match=f"out has dtype {out.dtype}, the vectors are "):
            enc.embed(list(TEXTS), precision=precision, out=out)
    assert enc.embed(["x"], out=np.zeros((1, 32), np.float16)).any()
    with pytest.raises(TypeError, match=r"out is list: give a numpy array or memmap of shape \(1, 32\)"):
        enc.embed(["x"], out=[0.0])


def test_int8_ranges_are_those_of_the_vectors_they_are_used_on(folder, tmp_path):
    enc, texts = Encoder.load(folder, dtype="float32"), list(TEXTS)
    with pytest.raises(TypeError, match="texts is a str"):
        enc.calibrate("one text")
    enc.calibrate(texts)
    for precision in ("int8", "uint8"):  # cut vectors have unit length again: values outside the whole ones' ranges
        with pytest.raises(ValueError, match=r"for 8 dim.* are for 32\): call enc.calibrate\(texts, truncate_dim=8"):
            enc.embed(texts, truncate_dim=8, precision=precision)
    enc.calibrate(texts, truncate_dim=8)
    small = enc.embed(texts, truncate_dim=8, precision="uint8")
    assert (small.min(0) == 0).all() and (small.max(0) == 255).all()
    with pytest.raises(
        ValueError, match=r"32 dimensions \(the encoder's are for 8\): call enc.calibrate\(texts\) once"
    ):
        enc.embed(texts, precision="int8")
    enc.save(tmp_path / "cut")
    again = Encoder.load(tmp_path / "cut", dtype="float32")
    np.testing.assert_array_equal(again.embed(texts, truncate_dim=8, precision="uint8"), small)
    enc.calibrate(texts, normalize=False)
    whole = enc.embed(texts, normalize=False, precision="int8")
    np.testing.assert_array_equal(enc.embed(texts, normalize=False, truncate_dim=8, precision="int8"), whole[:, :8])


def test_int8_ranges_do_not_outlive_the_vectors_they_were_measured_on(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    tiny_adapter(model, tmp_path / "adapter")
    enc = Encoder.load(tmp_path / "model", dtype="float32")
    enc.calibrate(TEXTS)
    enc.save(tmp_path / "saved")
    others = [{"attention": "causal"}, {"pooling": "max"}, {"layers": 2}, {"truncate_dim": 8}]
    for change in (*others, {"adapters": tmp_path / "adapter"}):
        changed = Encoder.load(tmp_path / "saved", dtype="float32", **change)
        assert changed.spec.int8_ranges is None
        changed.save(tmp_path / "changed", overwrite=True)
        assert Encoder.load(tmp_path / "changed", dtype="float32").spec.int8_ranges is None
    for same in ({"max_length": 64}, {"layers": 3}, {"pooling": "mean", "attention": "bidirectional"}):
        assert Encoder.load(tmp_path / "saved", **same).spec.int8_ranges == enc.spec.int8_ranges
    enc.spec = dataclasses.replace(enc.spec, normalize=False)  # here a cut is the start of the whole vector
    enc.save(tmp_path / "raw")
    cut = Encoder.load(tmp_path / "raw", truncate_dim=8).spec.int8_ranges
    assert cut == tuple(side[:8] for side in enc.spec.int8_ranges)


# --- streams, counts, tokens, words, spans ------------------------------------------------------------


def test_stream_is_bounded_and_in_order(enc):
    drawn = []

    def stream():
        for i in range(25):
            drawn.append(i)
            yield TEXTS[i % len(TEXTS)]

    vectors = enc.embed_iter(stream(), window=10)
    first = next(vectors)
    assert len(drawn) == 10
    rest = list(vectors)
    np.testing.assert_array_equal(np.stack([first, *rest]), enc.embed([TEXTS[i % len(TEXTS)] for i in range(25)]))
    with pytest.raises(TypeError, match="iterable of str"):
        next(enc.embed_iter("cat"))


def test_a_stream_refuses_what_embed_refuses(enc):
    for texts, message in (
        (pd.DataFrame({"text": ["a"]}), r"texts is a table \(DataFrame\)"),
        ({"a": "b"}, "texts is a dict"),
        ({"a", "b"}, "texts is a set"),
        (None, "texts is None"),
    ):
        with pytest.raises(TypeError, match=message):
            list(enc.embed_iter(texts))
    given = iter(["a", "b", "c", "d", "e", None, "g"])
    vectors = enc.embed_iter(given, window=2)
    assert len([next(vectors) for _ in range(4)]) == 4
    with pytest.raises(TypeError, match=r"texts\[5\] is None, a missing value"):
        next(vectors)
    with pytest.raises(ValueError, match="window is 0; expected at least 1"):
        list(enc.embed_iter(["a"], window=0))
    with pytest.raises(ValueError, match="one instruction for all texts"):
        list(enc.embed_iter(["a"], instruction=np.array(["x"])))
    for refused in ({"spans": [[(0, 1)]]}, {"out": np.zeros((1, 32))}):
        (name,) = refused
        with pytest.raises(TypeError, match=f"'{name}' is no argument here .*: call embed for {name}"):
            list(enc.embed_iter(["a"], **refused))


def test_a_stream_takes_embeds_arguments(enc):
    settings = {"instruction": "Query: ", "truncate_dim": 8, "precision": "float16", "max_length": 30}
    with pytest.warns(TruncationWarning) as caught:
        got = np.stack(list(enc.embed_iter(iter(TEXTS), window=5, **settings)))
    assert caught[0].filename == __file__
    with pytest.warns(TruncationWarning):
        np.testing.assert_array_equal(got, enc.embed(list(TEXTS), **settings))


def test_token_states_and_offsets(enc, folder):
    for text, got in zip(TEXTS, enc.embed_tokens(TEXTS), strict=True):
        want = hugging_face_states(folder, text)
        assert (unit(got.vectors) - unit(want)).abs().max() <= 1e-5
        assert isinstance(got, TokenVectors)
        assert got.offsets.shape == (len(want), 2) and got.ids.dtype == np.int32
        assert got.offsets[1:, 1].max() == len(text)


def test_words(enc):
    words = [["Mix", "flour", "and", "water"], ["x"], []]
    got = enc.embed_words(words)
    assert [w.shape for w in got] == [(4, 32), (1, 32), (0, 32)]
    tokens = enc.embed_tokens(["Mix flour and water"])[0]
    flour = [i for i, (a, b) in enumerate(tokens.offsets) if b > 4 and a < 9]
    np.testing.assert_allclose(got[0][1], tokens.vectors[flour].mean(0), atol=1e-6)
    with pytest.raises(TypeError, match=r"words\[0\] must be a list of str"):
        enc.embed_words("cat")
    with pytest.raises(TypeError, match=r"words\[0\] must be a list of str"):
        enc.embed_words(["Mix", "flour"])


@pytest.mark.parametrize("bos", [True, False])
def test_words_read_from_the_position_before(bos, tmp_path):
    """MNTP's shift: the first word reads BOS; without BOS its first piece has no place left of it."""
    tiny_checkpoint(tmp_path, bos=bos)
    enc = Encoder.load(tmp_path, dtype="float32")
    words = ["x", "Mix", "flour", "unheardof"]
    got = enc.embed_words([words], shift=1)[0]
    tokens = enc.embed_tokens([" ".join(words)])[0]
    at = 0
    for word, vector in zip(words, got, strict=True):
        own = [i for i, (a, b) in enumerate(tokens.offsets) if b > at and a < at + len(word)]
        places = [i - 1 for i in own if i]
        want = tokens.vectors[places].mean(0) if places else np.zeros(32)
        np.testing.assert_allclose(vector, want, atol=1e-6)
        at += len(word) + 1
    assert got[0].any() == bos and got[1:].any(1).all()
    with pytest.raises(ValueError, match="shift is -1"):
        enc.embed_words([words], shift=-1)


def test_spans_documents_and_tokens_from_one_forward(enc, monkeypatch):
    calls = []
    run = type(enc.decoder).run
    monkeypatch.setattr(type(enc.decoder), "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    text = "Mix flour and water"
    result = enc.embed([text, "x"], spans=[[(0, 9), (4, 9), (0, len(text))], []])
    assert len(calls) == 1 and isinstance(result, SpanVectors)
    np.testing.assert_array_equal(result.documents, enc.embed([text, "x"]))
    assert [s.shape for s in result.spans] == [(3, 32), (0, 32)]
    inside = [i for i, (a, b) in enumerate(result.tokens[0].offsets) if b > 4 and a < 9]
    np.testing.assert_allclose(result.spans[0][1], unit(result.tokens[0].vectors[inside].mean(0)), atol=1e-6)
    with pytest.raises(ValueError, match="spans has 1 entries for 2 texts"):
        enc.embed_spans(["a", "b"], [[]])
    with pytest.raises(ValueError, match=r"spans\[0\] has \(0, 9\); text 0 has 1 characters"):
        enc.embed_spans(["a"], [[(0, 9)]])


def test_parts_refuse_by_row(enc):
    for words in ([["a"], None], [["a"], 3], [["a"], ["b", None]], [["a"], "b"]):
        with pytest.raises(TypeError, match=r"words\[1\] must be a list of str, as in \[\['A'"):
            enc.embed_words(words)
    with pytest.raises(TypeError, match="words is NoneType: give lists of str"):
        enc.embed_words(None)
    for ranges in (None, 3, (0, 1), [(0,)], [(0, 1, 2)], [None], [(0.0, 1.0)], [("0", "1")]):
        with pytest.raises(TypeError, match=r"spans\[1\] is .*: it must be a list of pairs of int, as in \[\[\(0, 4\)"):
            enc.embed_spans(["cat", "dog"], [[(0, 1)], ranges])
    with pytest.raises(TypeError, match="spans is NoneType: give one list per text"):
        enc.embed_spans(["cat"], None)
    arrays = enc.embed_spans(["cat"], np.array([[[0, 3], [1, 2]]]))
    np.testing.assert_array_equal(arrays.spans[0], enc.embed_spans(["cat"], [[(0, 3), (1, 2)]]).spans[0])
    with pytest.raises(TypeError, match=r"'precision' is no argument here .*max_length, .*: call embed for precision"):
        enc.embed_tokens(["cat"], precision="int8")
    with pytest.raises(TypeError, match=r"'maxlength' is no argument here .*show_progress\)$"):
        enc.embed_spans(["cat"], [[]], maxlength=3)


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
    ],
)
def test_refuses_arguments_by_name(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Encoder.load(folder, **arguments)


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


def test_progress_bar_goes_to_stderr(enc, capsys):
    enc.embed(list(TEXTS), show_progress=True)
    captured = capsys.readouterr()
    assert not captured.out and "embedding" in captured.err


def test_prints_what_it_is(enc):
    assert repr(enc) == "Encoder(llama, bidirectional, mean, dim=32, max_length=512, float32 on cpu)"
    assert "pooling        mean over all tokens" in str(enc.spec)


# --- spans under prompts and templates -------------------------------------------------------------------


def test_spans_count_from_the_texts_own_first_character(folder):
    """Whatever a template or a prompt writes in front of a text, a span names the text's characters."""
    enc = Encoder.load(folder, dtype="float32")
    text, span = "Mix flour and water", (4, 9)
    enc.spec = dataclasses.replace(enc.spec, layout="llm2vec", span="template", template="[INST] {text} [/INST]")
    enc.spec = dataclasses.replace(enc.spec, prompts={"query": "Bake: "}, default_prompt_name="query")
    before = "[INST] Bake: "
    tokens = enc.embed_tokens([text], instruction="Bake: ")[0]
    first, last = (len(before) + c for c in span)
    inside = [i for i, (a, b) in enumerate(tokens.offsets) if b > first and a < last]
    for chosen in ({}, {"prompt_name": "query"}, {"instruction": "Bake: "}):
        got = enc.embed([text], spans=[[span]], **chosen)
        np.testing.assert_allclose(got.spans[0][0], unit(tokens.vectors[inside].mean(0)), atol=1e-6)
        np.testing.assert_array_equal(got.documents, enc.embed([text], **chosen))
    words = enc.embed_words([text.split()])[0]
    np.testing.assert_allclose(words[1], tokens.vectors[inside].mean(0), atol=1e-6)


@pytest.mark.parametrize("split_special", [False, True])
def test_words_after_a_cut_have_zero_rows(folder, split_special):
    """A template's end stands right after the words that were kept: its states belong to none of the others."""
    enc = Encoder.load(folder, dtype="float32")
    enc.spec = dataclasses.replace(enc.spec, layout="llm2vec", span="template", template="[INST] {text} [/INST]")
    words = ["prices", "</s>", "rose"] * 20
    with pytest.warns(TruncationWarning):
        tokens = enc.embed_tokens([" ".join(words)], max_length=40, split_special=split_special)[0]
        got = enc.embed_words([words], max_length=40, split_special=split_special)[0]
    kept = tokens.offsets.max() - len("[INST] ") - len(" [/INST]")
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    assert got.any(1).tolist() == (starts < kept).tolist() and 0 < got.any(1).sum() < len(words) - 9


def test_a_span_over_the_spaces_that_a_template_drops_is_empty(folder):
    enc = Encoder.load(folder, dtype="float32")
    enc.spec = dataclasses.replace(enc.spec, layout="llm2vec", span="template", template="[INST] {text} [/INST]")
    spans = enc.embed_spans(["cat   "], [[(0, 3), (3, 6)]]).spans[0]
    assert spans.any(1).tolist() == [True, False]


def test_spans_refuse_what_they_cannot_follow(folder, enc):
    for argument in ({"precision": "float16"}, {"truncate_dim": 8}, {"output": "torch"}, {"out": np.zeros((1, 32))}):
        with pytest.raises(ValueError, match=f"spans gives .*{next(iter(argument))}"):
            enc.embed(["cat"], spans=[[(0, 3)]], **argument)
    with pytest.raises(ValueError, match="compat='llm2vec' rewrites texts"):
        Encoder.load(folder, dtype="float32", compat="llm2vec").embed(["cat"], spans=[[(0, 3)]])
