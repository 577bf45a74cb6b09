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


@pytest.mark.parametrize("text", ["the cat " * 30, "the </s> cat " * 30])
@pytest.mark.parametrize("max_length", range(16, 30))
def test_what_follows_a_cut_text_is_not_pooled(max_length, text, tokenizer):
    prepared = prepare(SPEC, [text], ['Say "{text}" now'], tokenizer)
    tokens = tokenise(tokenizer, prepared, max_length, offsets=True, split_special=True)
    ((start, stop),) = pooled_spans(SPEC, tokens, prepared, ['Say "{text}" now'], tokenizer)
    pieces = [tokenizer.backend.id_to_token(int(i)) for i in tokens.ids[start:stop]]
    assert tokens.truncated[0] and 0 < stop - start < max_length
    assert joined(pieces).strip(' "') in text


def test_a_row_without_an_instruction_is_pooled_as_it_is_alone(tokenizer):
    prepared = prepare(SPEC, ["the cat", "the cat"], ["", "Query: "], tokenizer)
    tokens = tokenise(tokenizer, prepared, 64, offsets=True)
    alone, asked = pooled_spans(SPEC, tokens, prepared, ["", "Query: "], tokenizer)
    assert alone.tolist() == [0, tokens.lengths[0]] and asked[0] > 1


def test_a_token_belongs_to_a_span_if_it_covers_one_of_its_characters():
    offsets = np.array([[0, 0], [0, 3], [3, 7], [7, 9], [0, 0]])
    special = np.array([True, False, False, False, True])
    assert char_span_to_tokens(offsets, special, 0, 9) == (1, 4)
    assert char_span_to_tokens(offsets, special, 4, 5) == (2, 3)
    assert char_span_to_tokens(offsets, special, 6, 8) == (2, 4)
    assert char_span_to_tokens(offsets, special, 5, 5) == (0, 0)
    assert char_span_to_tokens(offsets, special, 9, 12) == (0, 0)


def split_tokens(tokenizer, text, instruction, max_length=64):
    prepared = prepare(SPEC, [text], [instruction], tokenizer)
    return tokenise(tokenizer, prepared, max_length, offsets=True, split_special=True), prepared.strings[0]


def test_special_tokens_of_an_instruction_stay_where_those_of_a_text_are_split(tokenizer):
    tokens, string = split_tokens(tokenizer, "a </s> b", "<s>Say {text} now</s> end")
    pieces = [tokenizer.backend.id_to_token(int(i)) for i in tokens.ids]
    assert pieces[:2] == ["<s>", "<s>"] and pieces.count("</s>") == 1
    assert joined(pieces[1:]) == string == "<s>Say a </s> b now</s> end"
    plain, _ = split_tokens(tokenizer, "a </s> b", "Say {text} now")  # nothing special around it: as a whole
    own = tokenizer.encode(["Say a </s> b now"], 64, split_special=True)
    assert plain.ids.tolist() == own.ids.tolist()
    text_pieces = [string[a:b] for a, b in tokens.offsets[~tokens.special]]
    assert "".join(text_pieces).replace(" ", "") == string.replace(" ", "")


def test_rows_that_are_split_stand_in_their_places(tokenizer):
    texts = ["the cat", "a </s> b", "", "a dog </s>", "x"]
    spec = replace(SPEC)
    prepared = prepare(spec, texts, ["<s>Say {text}</s>"] * 5, tokenizer)
    together = tokenise(tokenizer, prepared, 64, offsets=True, split_special=True)
    starts = np.cumsum(together.lengths) - together.lengths
    for row, text in enumerate(texts):
        alone, _ = split_tokens(tokenizer, text, "<s>Say {text}</s>")
        own = slice(starts[row], starts[row] + together.lengths[row])
        np.testing.assert_array_equal(together.ids[own], alone.ids)
        np.testing.assert_array_equal(together.offsets[own], alone.offsets)
        np.testing.assert_array_equal(together.special[own], alone.special)


@pytest.mark.parametrize("room", range(12, 30))
def test_a_split_text_is_cut_and_what_follows_it_stays(tokenizer, room):
    text = "the </s> cat " * 8
    tokens, _ = split_tokens(tokenizer, text, "<s>Say {text} now</s>", max_length=room)
    pieces = [tokenizer.backend.id_to_token(int(i)) for i in tokens.ids]
    assert room - 2 <= len(pieces) <= room and tokens.truncated[0]
    assert pieces[-1] == "</s>" and pieces.count("</s>") == 1 and joined(pieces).endswith(" now</s>")
    assert joined(pieces[1:]).removeprefix("<s>Say ").removesuffix(" now</s>").strip() in text


@pytest.mark.parametrize("text", ["the cat " * 30, "the </s> cat " * 30])
def test_an_instruction_that_leaves_no_room_is_refused_with_and_without_an_end(tokenizer, text):
    for instruction in ("Say it again and again: ", "Say it again and again: {text} end"):
        with pytest.raises(ValueError, match=r"the instruction alone has .* nothing is left of the text"):
            split_tokens(tokenizer, text, instruction, max_length=6)
