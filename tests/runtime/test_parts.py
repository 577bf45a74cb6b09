"""Vectors of parts of texts: tokens, words, spans; also under prompts, templates and cuts."""

import dataclasses

import numpy as np
import pytest
from tiny_models import TEXTS, hugging_face_states, tiny_checkpoint, unit

from flashvec import Encoder
from flashvec.runtime.parts import SpanVectors, TokenVectors
from flashvec.runtime.texts import TruncationWarning


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


def test_words_of_unit_length_and_behind_an_instruction(enc):
    words = [["Mix", "flour"], ["x"]]
    plain, unit = enc.embed_words(words), enc.embed_words(words, normalize=True)
    for a, b in zip(plain, unit, strict=True):
        np.testing.assert_allclose(b, a / np.linalg.norm(a, axis=1, keepdims=True), atol=1e-6)
    asked = enc.embed_words(words, instruction="Find: ")
    spans = enc.embed_spans(["Mix flour", "x"], [[(0, 3), (4, 9)], [(0, 1)]], instruction="Find: ", normalize=False)
    assert all(np.array_equal(a, b) for a, b in zip(asked, spans.spans, strict=True))
    assert not np.allclose(asked[0], plain[0], atol=1e-3)
    with pytest.raises(TypeError, match="'truncate_dim' is no argument here"):
        enc.embed_words(words, truncate_dim=8)


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
    unordered = ([["a"], {"b", "c"}], [["a"], {"b": 1}])
    for words in ([["a"], None], [["a"], 3], [["a"], ["b", None]], [["a"], "b"], *unordered):
        with pytest.raises(TypeError, match=r"words\[1\] must be a list of str, as in \[\['A'"):
            enc.embed_words(words)
    for words, named in ((["a", "b"], r"words\[0\] .*; it is str"), ([["a", 3]], r"words\[0\] .*; its word 1 is int")):
        with pytest.raises(TypeError, match=named):
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
