"""What an `Encoder`'s arguments may not be is said at once, by name; what it warns of, on the caller's line."""

import copy
import pickle
import re
from functools import partial

import numpy as np
import pytest

from flashvec import Encoder
from flashvec.runtime.integrations.sentence_transformers import FlashvecSentenceTransformer
from flashvec.runtime.texts import TextWarning, TruncationWarning
from flashvec.runtime.whitening import check_power


@pytest.mark.parametrize(
    "given", [{"pooling": 5}, {"pooling": [5]}, {"adapters": None}, {"adapters": [3]}, {"device": 5}, {"device": [5]}]
)
def test_what_is_no_name(folder, given):
    ((name, value),) = given.items()
    with pytest.raises(TypeError, match=f"{name} is {re.escape(repr(value))}"):
        Encoder.load(folder, **given)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model is NoneType: give a folder, a \.gguf file or a hub id"):
        Encoder.load(None)


def test_what_is_not_loaded():
    for given in (("a/model",), ()):
        with pytest.raises(TypeError, match=r"it is loaded: Encoder\.load\((.a/model.|model)\)"):
            Encoder(*given)


def test_parts_may_be_given_by_name(enc):
    made = Encoder(spec=enc.spec, decoder=enc.decoder, tokenizer=enc.tokenizer, heads=enc.heads)
    assert np.array_equal(made.embed("A cat."), enc.embed("A cat."))


def test_what_is_no_prompts_name(enc):
    for method in (enc.embed, enc.encode, partial(enc.encode, output_value="token_embeddings")):
        with pytest.raises(ValueError, match=r"prompt_name is \['query'\]; this model's prompts are: none"):
            method(["a"], prompt_name=["query"])


def test_a_folder_is_not_replaced_for_a_word_that_says_no(enc, tmp_path):
    enc.save(tmp_path / "saved")
    with pytest.raises(TypeError, match="overwrite is 'no'; expected True or False"):
        enc.save(tmp_path / "saved", overwrite="no")


@pytest.mark.parametrize(
    "given", [{"normalize": "false"}, {"split_special": "no"}, {"normalize": np.array([1, 2])}, {"show_progress": "no"}]
)
def test_what_is_not_true_or_false(enc, given):
    with pytest.raises(TypeError, match=f"{next(iter(given))} is .*; expected True or False"):
        enc.embed(["a"], **given)


def test_truths_of_numpy_and_of_the_synonym(enc):
    assert np.array_equal(enc.embed(["a"], normalize=np.True_), enc.embed(["a"], normalize=True))
    with pytest.raises(TypeError, match="normalize_embeddings is 'no'; expected True or False"):
        enc.encode(["a"], normalize_embeddings="no")


@pytest.mark.parametrize(
    ("max_length", "message"), [(0, "expected at least 1"), (1, "1 special token and one of text")]
)
def test_a_length_that_holds_no_text(enc, max_length, message):
    with pytest.raises(ValueError, match=f"max_length is {max_length}; .*{message}"):
        enc.embed(["a"], max_length=max_length)


@pytest.mark.parametrize("power", ["a", True, None])
def test_a_power_that_is_no_number(power):
    with pytest.raises(TypeError, match=f"power is {power!r}; expected a number"):
        check_power(power)


def test_parts_settings(enc):
    for shift in ("a", 1.5, None):
        with pytest.raises(TypeError, match=r"shift is .*; expected a whole number"):
            enc.embed_words([["a"]], shift=shift)
    with pytest.raises(TypeError, match="normalize is 'no'; expected True or False"):
        enc.embed_tokens(["a"], normalize="no")
    with pytest.raises(TypeError, match="normalize is 'no'; expected True or False"):
        enc.embed_spans(["a"], [[]], normalize="no")


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_not_copied_by_accident(enc, send, wrapped):
    with pytest.raises(TypeError, match="load it in each process"):
        send(FlashvecSentenceTransformer(enc) if wrapped else enc)
    twin = copy.copy(enc)
    assert twin.decoder is enc.decoder and np.array_equal(twin.embed(["x"]), enc.embed(["x"]))


@pytest.mark.parametrize(
    "method",
    [
        lambda enc, text: enc.encode([text]),
        lambda enc, text: enc.encode_query([text]),
        lambda enc, text: enc.embed_words([text.split()]),
        lambda enc, text: enc.calibrate([text, "a"]),
        lambda enc, text: list(enc.embed_iter([text])),
    ],
)
@pytest.mark.parametrize(("text", "kind"), [("word " * 600, TruncationWarning), ("\ud800", TextWarning)])
def test_a_warning_is_of_the_callers_line(folder, method, text, kind):
    encoder = Encoder.load(folder, dtype="float32")
    with pytest.warns(kind) as caught:
        method(encoder, text)
    assert {warning.filename for warning in caught} == {__file__}
