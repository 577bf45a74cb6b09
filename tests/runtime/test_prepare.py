"""What is written around a text and which tokens are pooled, layout by layer of rules."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_tokenizer

from flashvec.runtime.prepare import char_span_to_tokens, pooled_spans, prepare, tokenise
from flashvec.runtime.spec import DecoderSpec, ModelSpec
from flashvec.runtime.tokenize import Tokenizer

SPEC = ModelSpec(DecoderSpec("llama", 420, 4, 4, 1, 1, 1, 4, 512, 1e-6), "bidirectional", ("mean",), "hf")
TEMPLATE = replace(SPEC, layout="llm2vec", span="template", template="[INST] {text} [/INST]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def pooled_pieces(spec, tokenizer, text, instruction=None, max_length=64):
    """The strings of the tokens that are pooled."""
    instructions = None if instruction is None else [instruction]
    prepared = prepare(spec, [text], instructions, tokenizer)
    tokens = tokenise(tokenizer, prepared, max_length, offsets=True)
    ((start, stop),) = pooled_spans(spec, tokens, prepared, instructions, tokenizer)
    return [tokenizer.backend.id_to_token(int(i)) for i in tokens.ids[start:stop]], prepared.strings[0]


def joined(pieces):
    return "".join(pieces).replace("Ġ", " ")


def test_plain_pools_everything_without_an_instruction(tokenizer):
    pieces, string = pooled_pieces(SPEC, tokenizer, "the cat")
    assert pieces[0] == "<s>" and joined(pieces[1:]) == string == "the cat"


def test_plain_pools_the_texts_own_characters_with_one(tokenizer):
    pieces, string = pooled_pieces(SPEC, tokenizer, "the cat", "Query: ")
    assert joined(pieces).strip() == "the cat" and string == "Query: the cat"
    pieces, string = pooled_pieces(SPEC, tokenizer, "the cat", 'Word "{text}" means:')
    assert string == 'Word "the cat" means:'
    assert joined(pieces).strip('"') == "the cat"


def test_prompt_tokens(tokenizer):
    spec = replace(SPEC, span="prompt_tokens")
    pieces, _ = pooled_pieces(spec, tokenizer, "the cat", "Query: ")
    assert pieces[0] == "<s>" and joined(pieces[1:]) == "Query: the cat"
    counted = 1 + int(tokenizer.count(["Query: "])[0])
    own, _ = pooled_pieces(replace(spec, include_prompt=False), tokenizer, "the cat", "Query: ")
    assert own == pieces[counted:]


def test_template_pools_text_and_suffix(tokenizer):
    pieces, string = pooled_pieces(TEMPLATE, tokenizer, " the cat ", " Retrieve: ")
    assert string == "[INST] Retrieve:  the cat [/INST]"
    assert joined(pieces).strip() == "the cat [/INST]"
    pieces, string = pooled_pieces(TEMPLATE, tokenizer, "the cat")
    assert string == "[INST] the cat [/INST]" and joined(pieces).strip() == "the cat [/INST]"


def test_count_from_right_follows_the_reference(tokenizer):
    spec = replace(TEMPLATE, span="count_from_right", compat="llm2vec", normalize=False)
    pieces, string = pooled_pieces(spec, tokenizer, "the cat", "Retrieve:")
    assert string == "[INST] Retrieve: the cat [/INST]"
    assert len(pieces) == int(tokenizer.count(["the cat [/INST]"])[0])


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, span="prompt_tokens", include_prompt=False), TEMPLATE])
@pytest.mark.parametrize("instruction", [None, "Query: "])
def test_nothing_to_pool_pools_everything(spec, instruction, tokenizer):
    pieces, _ = pooled_pieces(spec, tokenizer, "", instruction)
    assert pieces


@pytest.mark.parametrize("max_length", range(12, 40))
def test_what_follows_a_text_is_never_cut(max_length, tokenizer):
    prepared = prepare(SPEC, ["flour and water 你好 " * 9, "cat"], ['A "{text}" B:'] * 2, tokenizer)
    tokens = tokenise(tokenizer, prepared, max_length, offsets=True)
    assert tokens.truncated.tolist() == [True, False]
    assert tokens.lengths[0] <= max_length
    ending = tokenizer.encode(['A "cat" B:'], 64).ids[-3:]
    assert tokens.ids[: tokens.lengths[0]][-3:].tolist() == ending.tolist()


def test_a_token_belongs_to_a_span_if_it_covers_one_of_its_characters():
    offsets = np.array([[0, 0], [0, 3], [3, 7], [7, 9], [0, 0]])
    special = np.array([True, False, False, False, True])
    assert char_span_to_tokens(offsets, special, 0, 9) == (1, 4)
    assert char_span_to_tokens(offsets, special, 4, 5) == (2, 3)
    assert char_span_to_tokens(offsets, special, 6, 8) == (2, 4)
    assert char_span_to_tokens(offsets, special, 5, 5) == (0, 0)
    assert char_span_to_tokens(offsets, special, 9, 12) == (0, 0)
