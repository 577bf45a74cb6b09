"""Texts to token ids with the Rust tokenizer, as flat int32 arrays; the ids are Hugging Face's.

What a folder's tokenizer.json says is done: its template decides what is added before and after a text,
whatever `add_bos_token: false` in tokenizer_config.json says (transformers 5 does the same). Two rules go beyond:

- `add_eos_token: true` (`add_bos_token: true`) there adds the token where the template does not. E5-Mistral
  and its kin pool that token; transformers 5 drops the setting without a word beside a tokenizer.json.
- A text that gives no token at all becomes one end-of-text token, so that it has a vector.

Long texts are cut on the right: `truncation_side` is not followed, nor `split_special_tokens`, which is an argument.

transformers 5 rebuilds some tokenizers from their class instead of reading tokenizer.json (LlamaTokenizer
beside a Llama config). Its ids then differ from tokenizer.json's, and from those the models were trained on,
where a text starts with a space and after a special token inside a text. Here tokenizer.json counts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Encoding

from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.precut import boundary_pattern
from flashvec.runtime.tokenizer_files import (
    SpecialTokens,
    add_template,
    read_backend,
    read_config,
    template_ids,
    write_tokenizer,
)

CHUNK_TEXTS = 512  # texts handed to Rust at once: enough for all its threads
CHUNK_CHARS = 1 << 21  # and no more characters than this: an encoding takes some 100 bytes a token while it lives
# First cut of a long text, in characters. English has 4 to 5 a token, so that most texts pass at once; one
# with more is cut again at twice the length.
CUT_CHARS_PER_TOKEN = 8
CUT_CHARS_EXTRA = 64

Encode = Callable[..., list[Encoding]]  # encode_batch or encode_batch_fast


@dataclass(frozen=True)
class Tokens:
    """Tokens of n texts, end to end.

    Attributes:
        ids: int32 [T], special tokens included.
        lengths: int32 [n], tokens of each text, at least 1.
        truncated: bool [n], True where tokens of the text were left out.
        offsets: int32 [T, 2], the characters each token stands for, in code points of the text as given;
            (0, 0) for those of the template. None unless asked for.
        special: bool [T], True for tokens the template added. A special token written out in a text is not.
            None unless offsets were asked for.
        text_sizes: int64 [n], characters that were kept of what a user gave, where more is written around it; what
            follows a text begins right after them. None unless `prepare.tokenise` made the tokens.
    """

    ids: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    offsets: np.ndarray | None = None
    special: np.ndarray | None = None
    text_sizes: np.ndarray | None = None


class Tokenizer:
    """A Rust tokenizer and what surrounds a text: `prefix_ids` before, `suffix_ids` after.

    Attributes:
        backend: our own copy; its truncation and padding are off.
        bos_id, eos_id, pad_id, mask_id: None where the model has no such token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        """Takes over `backend`; `from_folder` and `from_backend` are the ways in."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._special = special
        self.bos_id, self.eos_id = special.bos_id, special.eos_id
        self.pad_id, self.mask_id = special.pad_id, special.mask_id
        self.prefix_ids, self.suffix_ids = template_ids(backend)
        if unknown := [i for i in (*self.prefix_ids, *self.suffix_ids) if backend.id_to_token(i) is None]:
            raise ValueError(f"its post_processor adds the token {unknown[0]}, which the vocabulary does not have")
        before, after = self.prefix_ids, self.suffix_ids
        if special.add_bos and self.bos_id is not None and self.bos_id not in before:
            before = (self.bos_id, *before)
        if special.add_eos and self.eos_id is not None and self.eos_id not in after:
            after = (*after, self.eos_id)
        if (before, after) != (self.prefix_ids, self.suffix_ids):
            self.prefix_ids, self.suffix_ids = add_template(backend, before, after)
        self._blank_ids = special.blank_ids()
        if not (self._blank_ids or before or after):
            raise ValueError("the tokenizer has no special token at all: an empty text would have no tokens")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, and special tokens from the configuration files beside it.

        Raises:
            CheckpointError: a missing, damaged or oversized file, named, with the cure.
        """
        backend = read_backend(Path(folder))
        special = read_config(Path(folder), backend)
        try:
            return cls(backend, special)
        except ValueError as error:
            raise CheckpointError(f"{Path(folder) / 'tokenizer.json'}: {error}") from None

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        mask_id: int | None = None,
        unk_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> "Tokenizer":
        """Wrap a copy of `backend`; `add_bos` and `add_eos` add the token where the template does not.

        Raises:
            ValueError: an id that `backend` does not have, or no special token at all.
        """
        special = SpecialTokens(bos_id, eos_id, pad_id, mask_id, unk_id, add_bos, add_eos)
        for name in ("bos_id", "eos_id", "pad_id", "mask_id", "unk_id"):
            value = getattr(special, name)
            if value is not None and backend.id_to_token(value) is None:
                raise ValueError(f"{name} is {value}, a token that the tokenizer does not have")
        return cls(_copy(backend), special)

    def encode(
        self, texts: Sequence[str], max_length: int, *, offsets: bool = False, split_special: bool = False
    ) -> Tokens:
        """Tokenise, cutting what does not fit on the right; `prefix_ids` and `suffix_ids` always stay.

        Args:
            texts: str without surrogates (see `as_texts`).
            max_length: tokens a text may have, special tokens included.
            offsets: also give each token's characters; slower.
            split_special: treat special tokens written out in a text as plain characters. Without it they
                become those tokens, as in Hugging Face.

        Raises:
            ValueError: `max_length` leaves no room for a token of text.
        """
        fixed = len(self.prefix_ids) + len(self.suffix_ids)
        room = max_length - fixed
        if room < 1:
            least = f"{fixed + 1}: {fixed} special token{'s' * (fixed > 1)} and one of text"
            raise ValueError(f"max_length is {max_length}; the least is {least}")
        backend = self._splitting_backend if split_special else self.backend
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        rows: list[_Row] = []
        for first, heads in self._chunks(texts, CUT_CHARS_PER_TOKEN * room + CUT_CHARS_EXTRA):
            encodings = _tokens_of(encode, heads)
            self._lengthen(encode, texts[first : first + len(heads)], heads, encodings, room)
            rows += [self._row(encoding, room, offsets) for encoding in encodings]
        return _join(rows, offsets)

    def encode_joined(self, rows: Sequence["Joined"], max_length: int, *, offsets: bool = False) -> Tokens:
        """As `encode`, of rows that `join` made."""
        room = max_length - len(self.prefix_ids) - len(self.suffix_ids)
        return _join([self._row(row, room, offsets) for row in rows], offsets)

    def join(self, parts: Sequence[tuple[str, bool]]) -> "Joined":
        """Tokens of strings side by side; with True, special tokens written out in that string are plain characters."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for string, split_special in parts:
            backend = self._splitting_backend if split_special else self.backend
            encoding = _tokens_of(backend.encode, string)
            ids += encoding.ids
            offsets += [(start + first, start + stop) for first, stop in encoding.offsets]
            start += len(string)
        return Joined(ids, offsets)

    def special_places(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are written out in a text: first character and one past the last of each."""
        return [match.span() for match in self._special_strings.finditer(text)]

    def count(self, texts: Sequence[str], *, special: bool = False) -> np.ndarray:
        """Tokens of each text, uncut: int64 [n]; with `special`, those that `encode` adds are counted too."""
        counts = np.zeros(len(texts), dtype=np.int64)
        for first, chunk in self._chunks(texts, None):
            encodings = _tokens_of(self.backend.encode_batch_fast, chunk)
            counts[first : first + len(chunk)] = [len(encoding) for encoding in encodings]
        if special:
            counts = np.maximum(counts + len(self.prefix_ids) + len(self.suffix_ids), 1)
        return counts

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that transformers >= 5 and sentence-transformers >= 6 give our ids.

        Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json. A pad token is always named:
        the model's, else the end-of-text, unknown or begin-of-text token.

        Raises:
            ValueError: the tokenizer has none of these tokens.
        """
        write_tokenizer(Path(folder), self.backend, self._special)

    @cached_property
    def _splitting_backend(self) -> tokenizers.Tokenizer:
        # A second copy: the switch is a setting of the tokenizer, and other threads may be encoding with it.
        backend = _copy(self.backend)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _special_strings(self) -> re.Pattern[str]:
        added = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _boundary(self) -> re.Pattern[str] | None:
        return boundary_pattern(self.backend)

    def _head(self, text: str, limit: int) -> str:
        """The start of a text, at least `limit` characters, whose tokens are the text's own first tokens."""
        if len(text) <= limit or self._boundary is None:
            return text
        match = self._boundary.search(text, limit)
        return text[: match.start()] if match else text

    def _chunks(self, texts: Sequence[str], limit: int | None) -> Iterator[tuple[int, list[str]]]:
        """Runs of texts to tokenise together, cut to some `limit` characters; and the number of the first."""
        if isinstance(texts, str):
            raise TypeError("texts is a str: give a list of str")
        first, chars = 0, 0
        heads: list[str] = []
        for i, text in enumerate(texts):
            head = text if limit is None else self._head(text, limit)
            if heads and (len(heads) == CHUNK_TEXTS or chars + len(head) > CHUNK_CHARS):
                yield first, heads
                first, chars, heads = i, 0, []
            heads.append(head)
            chars += len(head)
        if heads:
            yield first, heads

    def _lengthen(
        self, encode: Encode, texts: Sequence[str], heads: list[str], encodings: list[Encoding], room: int
    ) -> None:
        """Where a head gave no more than `room` tokens, take twice the text; changes `heads` and `encodings`."""
        while True:
            is_cut = [len(head) < len(text) for head, text in zip(heads, texts, strict=True)]
            short = [i for i, encoding in enumerate(encodings) if is_cut[i] and len(encoding) <= room]
            if not short:
                return
            for i in short:
                heads[i] = self._head(texts[i], 2 * len(heads[i]))
            longer = _tokens_of(encode, [heads[i] for i in short])
            for i, encoding in zip(short, longer, strict=True):
                encodings[i] = encoding

    def _row(self, encoding: "Encoding | Joined", room: int, offsets: bool) -> "_Row":
        text_ids, truncated = encoding.ids[:room], len(encoding) > room
        before, after = self.prefix_ids, self.suffix_ids
        if not (text_ids or before or after):
            before = self._blank_ids
        ids = np.array([*before, *text_ids, *after], dtype=np.int32)
        if not offsets:
            return _Row(ids, truncated, None, None)
        text = slice(len(before), len(before) + len(text_ids))
        special = np.ones(len(ids), dtype=bool)
        special[text] = False
        spans = np.zeros((len(ids), 2), dtype=np.int32)
        if text_ids:
            spans[text] = encoding.offsets[:room]
        return _Row(ids, truncated, spans, special)


@dataclass(frozen=True)
class Joined:
    """Tokens of strings that were tokenised apart, and the characters of the whole that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


class _Row(NamedTuple):
    """One text's part of `Tokens`."""

    ids: np.ndarray
    truncated: bool
    offsets: np.ndarray | None
    special: np.ndarray | None


class TokenizerError(ValueError):
    """The tokenizer's library fails at a text."""


def _tokens_of(encode: Callable[..., Any], given: Any) -> Any:
    """Tokens without the template's.

    Raises:
        TokenizerError: the library panics, as where its regular expressions give up: that is no `Exception`, and would
            end a worker or a server's only thread.
    """
    try:
        return encode(given, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer fails at a text: {error}") from None


def _join(rows: list[_Row], offsets: bool) -> Tokens:
    return Tokens(
        ids=_concatenate((0,), np.int32, (row.ids for row in rows)),
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        truncated=np.array([row.truncated for row in rows], dtype=bool),
        offsets=_concatenate((0, 2), np.int32, (row.offsets for row in rows)) if offsets else None,
        special=_concatenate((0,), np.bool_, (row.special for row in rows)) if offsets else None,
    )


def _concatenate(empty: tuple[int, ...], dtype: type, parts: Iterable[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([np.zeros(empty, dtype), *(part for part in parts if part is not None)])


def _copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(backend.to_str())
