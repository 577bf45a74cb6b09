"""From a user's text and instruction to the string that is tokenised, and to the tokens that are pooled.

Layouts differ in three rules: what is written around a text, which of its tokens are pooled, and what truncation may
cut. They are told apart by `ModelSpec.span`:

    offsets           plain decoders: all tokens; with an instruction just those that cover the text's characters
    prompt_tokens     sentence-transformers: all tokens, or all after the prompt's own token count
    template          LLM2Vec: instruction, BOS and the template's prefix attend but are not pooled, its suffix is
    count_from_right  the LLM2Vec reference to the letter: as many tokens from the right as the text has alone
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.tokenize import Joined, Tokenizer, Tokens

SEPARATOR = "!@#$%^&*()"  # the reference joins instruction and text with it; here only `compat` knows it
PLACEHOLDER = "{text}"
MAX_PROMPT_TOKENS = 2**20


@dataclass(frozen=True)
class Prepared:
    """Strings to tokenise: `before + text + after`, row by row."""

    before: list[str]
    texts: list[str]
    after: list[str]
    pooled: list[str] | None = None  # count_from_right: the part whose own token count is pooled
    cut: list[bool] | None = None  # `compat`: was a text cut by words already

    @property
    def strings(self) -> list[str]:
        parts = zip(self.before, self.texts, self.after, strict=True)
        return [before + text + after for before, text, after in parts]


def prepare(
    spec: ModelSpec, texts: Sequence[str], instructions: Sequence[str] | None, tokenizer: Tokenizer
) -> Prepared:
    """Write instruction and template around each text.

    Args:
        instructions: one per text, or None. With `{text}` in it an instruction is a template of its own; not so the
            prompts of a sentence-transformers folder, which that library writes before a text as they stand.

    Raises:
        ValueError: an instruction with more than one `{text}`.
    """
    if spec.compat == "llm2vec":
        return _prepare_reference(spec, texts, instructions, tokenizer)
    literal = set(spec.prompts.values()) if spec.layout == "sentence-transformers" else ()
    before, after = [], []
    for instruction in instructions if instructions is not None else [""] * len(texts):
        head, found, tail = (instruction, "", "") if instruction in literal else instruction.partition(PLACEHOLDER)
        if PLACEHOLDER in tail:
            raise ValueError(f"instruction holds {PLACEHOLDER} more than once: {instruction[:80]!r}")
        if spec.layout == "llm2vec" and head and not found:
            head = head.strip() + " "
        prefix, _, suffix = (spec.template or PLACEHOLDER).partition(PLACEHOLDER)
        before.append(prefix + head)
        after.append(tail + suffix + spec.text_suffix)
    wrapped = spec.layout == "llm2vec" and (spec.template or spec.text_suffix)
    return Prepared(before, [text.rstrip() for text in texts] if wrapped else list(texts), after)


def _prepare_reference(
    spec: ModelSpec, texts: Sequence[str], instructions: Sequence[str] | None, tokenizer: Tokenizer
) -> Prepared:
    """`LLM2Vec.encode`'s own preparation (llm2vec 0.2.3): cut by words, join by the separator, wrap, split again."""
    strings, pooled, cut = [], [], []
    limit = spec.document_max_length or spec.max_length
    for i, whole in enumerate(texts):
        text = _cut_by_words(whole, limit, spec.max_length, tokenizer)
        cut.append(text is not whole)
        instruction = instructions[i] if instructions is not None else ""
        joined = f"{instruction.strip()} {SEPARATOR}{text}" if instruction else SEPARATOR + text
        if spec.template or spec.text_suffix:  # text that nothing is written around stays as it is
            joined = joined.strip()
        wrapped = (spec.template or PLACEHOLDER).replace(PLACEHOLDER, joined) + spec.text_suffix
        parts = wrapped.split(SEPARATOR)
        strings.append("".join(parts))
        pooled.append(parts[1] if len(parts) > 1 else "")
    return Prepared([""] * len(texts), strings, [""] * len(texts), pooled, cut)


def _cut_by_words(text: str, limit: int, max_length: int, tokenizer: Tokenizer) -> str:
    """Drop words from the right until at most `limit` tokens are left, in the reference's steps."""
    num_tokens = min(int(tokenizer.count([text])[0]), max_length)
    while num_tokens > limit:
        words = text.split()
        text = " ".join(words[: int(len(words) * limit / num_tokens)])
        num_tokens = min(int(tokenizer.count([text])[0]), max_length)
    return text


def tokenise(
    tokenizer: Tokenizer, prepared: Prepared, max_length: int, *, offsets: bool, split_special: bool = False
) -> Tokens:
    """Tokenise; where a row is too long, its text is cut and what follows the text stays.

    A prompt's end often decides the vector (last-token pooling reads it), so truncation never takes it.

    Raises:
        ValueError: what stands around a text leaves no room for it.
    """
    strings, sizes = prepared.strings, np.array([len(text) for text in prepared.texts], dtype=np.int64)
    odd = [i for i, text in enumerate(prepared.texts) if tokenizer.special_places(text)] if split_special else []
    for i in odd:
        strings[i] = ""
    tokens = tokenizer.encode(strings, max_length, offsets=offsets)
    too_long = [int(i) for i in np.flatnonzero(tokens.truncated)]
    _check_room(tokenizer, prepared, too_long, max_length)
    if any(prepared.after[i] for i in too_long):
        for i in too_long:
            if prepared.after[i]:
                sizes[i] = _size_that_fits(tokenizer, prepared, i, max_length)
                strings[i] = prepared.before[i] + prepared.texts[i][: sizes[i]] + prepared.after[i]
        truncated = tokens.truncated
        tokens = tokenizer.encode(strings, max_length, offsets=offsets)
        tokens = replace(tokens, truncated=truncated | tokens.truncated)
    tokens = replace(tokens, text_sizes=sizes)
    if odd:
        tokens = _with_split_rows(tokens, odd, tokenizer, prepared, max_length, offsets)
    return tokens if prepared.cut is None else replace(tokens, truncated=tokens.truncated | prepared.cut)


def _check_room(tokenizer: Tokenizer, prepared: Prepared, rows: Sequence[int], max_length: int) -> None:
    for before, after in dict.fromkeys((prepared.before[i], prepared.after[i]) for i in rows):
        fixed = int(tokenizer.count([before + after], special=True)[0]) if before or after else 0
        if fixed >= max_length:
            raise ValueError(
                f"the instruction alone has {fixed} tokens, max_length is {max_length}: nothing is left of the text"
            )


def _size_that_fits(tokenizer: Tokenizer, prepared: Prepared, row: int, max_length: int) -> int:
    """The largest `size` found with which `before + text[:size] + after` holds at most `max_length` tokens."""
    before, text, after = prepared.before[row], prepared.texts[row], prepared.after[row]
    room = max_length - int(tokenizer.count([after])[0])
    while True:
        head = tokenizer.encode([before + text], room, offsets=True)
        assert head.offsets is not None
        size = max(int(head.offsets[:, 1].max()) - len(before), 0)
        string = before + text[:size] + after
        if size == 0 or int(tokenizer.count([string], special=True)[0]) <= max_length:
            return size
        room -= 1


def _with_split_rows(
    tokens: Tokens, rows: Sequence[int], tokenizer: Tokenizer, prepared: Prepared, max_length: int, offsets: bool
) -> Tokens:
    """`tokens` with the rows whose texts hold special tokens' strings, which are plain characters in them.

    Those of the template and of the instruction remain what they are: a row is tokenised in three parts, and the
    middle one, between the last special token before the text and the first one after it, has none.
    """
    made = [_split_row(tokenizer, prepared, row, max_length) for row in rows]
    split = tokenizer.encode_joined([row for row, _ in made], max_length, offsets=offsets)
    at = {row: place for place, row in enumerate(rows)}
    assert tokens.text_sizes is not None
    lengths, truncated, sizes = tokens.lengths.copy(), tokens.truncated.copy(), tokens.text_sizes.copy()
    lengths[list(rows)] = split.lengths
    truncated[list(rows)] = split.truncated | [size < sizes[row] for row, (_, size) in zip(rows, made, strict=True)]
    sizes[list(rows)] = [size for _, size in made]

    def merged(normal: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        if normal is None or other is None:
            return None
        own = np.split(normal, np.cumsum(tokens.lengths)[:-1])
        new = np.split(other, np.cumsum(split.lengths)[:-1])
        return np.concatenate([new[at[i]] if i in at else part for i, part in enumerate(own)])

    ids = merged(tokens.ids, split.ids)
    assert ids is not None
    offsets_T2, special = merged(tokens.offsets, split.offsets), merged(tokens.special, split.special)
    return Tokens(ids, lengths, truncated, offsets_T2, special, sizes)


def _split_row(tokenizer: Tokenizer, prepared: Prepared, row: int, max_length: int) -> tuple[Joined, int]:
    """The row's tokens, its text cut where something follows it that has to stay; and how much of it was kept."""
    before, text, after = prepared.before[row], prepared.texts[row], prepared.after[row]
    head = max((stop for _, stop in tokenizer.special_places(before)), default=0)
    tail = min((start for start, _ in tokenizer.special_places(after)), default=len(after))
    room = max_length - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    while True:
        middle = before[head:] + text + after[:tail]
        found = tokenizer.join([(before[:head], False), (middle, True), (after[tail:], False)])
        excess = len(found) - room
        if excess > 0:
            _check_room(tokenizer, prepared, [row], max_length)
        if excess <= 0 or not after or not text:
            return found, len(text)
        inside = [first for first, _ in found.offsets if len(before) < first < len(before) + len(text)]
        text = text[: inside[-excess] - len(before)] if len(inside) >= excess else ""


def pooled_spans(
    spec: ModelSpec, tokens: Tokens, prepared: Prepared, instructions: Sequence[str] | None, tokenizer: Tokenizer
) -> np.ndarray:
    """Which tokens of each text its vector is made of.

    Returns:
        int64 [n, 2]: first token and one past the last, counted from the text's first token. Never empty: where a
        rule leaves nothing (an empty text) all tokens are pooled.
    """
    n = tokens.lengths.astype(np.int64)
    spans = np.stack([np.zeros_like(n), n], 1)
    if spec.span == "count_from_right":
        assert prepared.pooled is not None
        counts = np.minimum(tokenizer.count(prepared.pooled), n)
        spans[:, 0] = np.where(counts > 0, n - counts, 0)
    elif spec.span == "prompt_tokens":
        if instructions is not None and not spec.include_prompt:
            spans[:, 0] = _prompt_lengths(prepared, tokenizer)
    elif spec.span == "template" or instructions is not None:
        own = text_token_spans(tokens, [len(b) for b in prepared.before], [len(t) for t in prepared.texts])
        if spec.span == "template":
            spans[:, 0] = own[:, 0]
        elif instructions is not None:  # a row without one is pooled as it is alone, whatever the others have
            has_one = np.array([bool(instruction) for instruction in instructions], dtype=bool)
            spans[has_one] = own[has_one]
    empty = (spans[:, 1] <= spans[:, 0]) | (spans[:, 0] >= n)
    spans[empty] = np.stack([np.zeros_like(n), n], 1)[empty]
    return spans


def _prompt_lengths(prepared: Prepared, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of each prompt tokenised alone, without a special one at the end, as sentence-transformers counts."""
    special = {number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    distinct = dict.fromkeys(prepared.before, 0)
    for prompt in filter(None, distinct):
        ids = tokenizer.encode([prompt], MAX_PROMPT_TOKENS).ids
        distinct[prompt] = len(ids) - (int(ids[-1]) in special)
    return np.array([distinct[prompt] for prompt in prepared.before], dtype=np.int64)


def text_token_spans(tokens: Tokens, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """The tokens that cover at least one character of [start, start + size) in each row: int64 [n, 2].

    Where a text was cut the range ends with it: what follows the text stands in the place of the rest.
    """
    assert tokens.offsets is not None and tokens.special is not None and tokens.text_sizes is not None
    spans = np.zeros((len(tokens.lengths), 2), dtype=np.int64)
    row_starts = np.concatenate([[0], np.cumsum(tokens.lengths, dtype=np.int64)])
    kept = np.minimum(sizes, tokens.text_sizes).tolist()
    for i, (start, size) in enumerate(zip(starts, kept, strict=True)):
        rows = slice(row_starts[i], row_starts[i + 1])
        spans[i] = char_span_to_tokens(tokens.offsets[rows], tokens.special[rows], start, start + size)
    return spans


def char_span_to_tokens(offsets: np.ndarray, special: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """First and one past the last token that overlap characters [start, stop); (0, 0) if none does."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop) & ~special)
    return (int(inside[0]), int(inside[-1]) + 1) if stop > start and len(inside) else (0, 0)
