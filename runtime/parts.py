"""Vectors of parts of texts: tokens, words, spans."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F

from flashvec.runtime import prepare
from flashvec.runtime.options import Instruction, RunOptions
from flashvec.runtime.program import embedding_program
from flashvec.runtime.text_runner import TextRunner
from flashvec.runtime.texts import as_texts, check_truth, check_whole
from flashvec.runtime.windows import Done, RunSettings, run_settings

# Ends of messages: what an argument should have looked like.
WORDS = "as in [['A', 'text'], ['Another', 'one']]"
RANGES = "as in [[(0, 4), (5, 9)], []] for two texts"


class TokenVectors(NamedTuple):
    """One text's tokens: `vectors` fp32 [len, d], `offsets` int32 [len, 2] characters, `ids` int32 [len]."""

    vectors: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray


class SpanVectors(NamedTuple):
    """One forward, three grains: `documents` [n, d], `spans` one [s, d] per text, `tokens` one `TokenVectors` each."""

    documents: np.ndarray
    spans: list[np.ndarray]
    tokens: list[TokenVectors]


class PartVectors(TextRunner):
    """`Encoder`'s methods that look inside a text."""

    def embed_tokens(
        self,
        texts: str | Iterable[str],
        *,
        instruction: Instruction = None,
        normalize: bool = False,
        **run: Unpack[RunOptions],
    ) -> list[TokenVectors]:
        """The final state of every token, special tokens included.

        Args:
            texts: as in `embed`; a str gives a list of one.
            instruction: as in `embed`; its tokens and a template's are part of the result; offsets count from the
                first character of all that is read.
            normalize: L2-normalise each token's vector.
            run: `max_length`, `batch_tokens`, `split_special`, `show_progress`.

        Returns:
            One `TokenVectors` per text: vectors fp32 [len, D], offsets int32 [len, 2], ids int32 [len].

        Raises:
            TypeError, ValueError: as `embed`.
        """
        settings = run_settings(run)
        check_truth("normalize", normalize)
        rows, _ = as_texts(texts)
        return self._tokens_of_rows(rows, self._instructions(instruction, None, len(rows)), settings, normalize)

    def embed_words(
        self,
        words: Iterable[Sequence[str]],
        *,
        instruction: Instruction = None,
        normalize: bool = False,
        shift: int = 0,
        **run: Unpack[RunOptions],
    ) -> list[np.ndarray]:
        """One vector per word of texts that are already split: the mean of the word's token states.

        Args:
            words: lists of words; they are joined by single spaces.
            instruction: as in `embed`, before each list.
            normalize: give every word's vector unit length.
            shift: as in `embed_spans`.
            run: as in `embed_tokens`.

        Returns:
            One fp32 [words, D] array per list; a word without a token (cut off by `max_length`, or moved out of the
            text by `shift`) has a zero row.

        Raises:
            TypeError, ValueError: what is no list of words, by its row, and what `embed_spans` refuses.
        """
        if not isinstance(words, Iterable):
            raise TypeError(f"words is {type(words).__name__}: give lists of str, {WORDS}")
        lists: list[list[str]] = []
        spans: list[list[tuple[int, int]]] = []
        for row, given in enumerate(words):
            is_list = isinstance(given, Iterable) and not isinstance(given, str | set | frozenset | Mapping)
            word_list = list(given) if is_list else []
            if not is_list:
                raise TypeError(f"words[{row}] must be a list of str, {WORDS}; it is {type(given).__name__}")
            for place, word in enumerate(word_list):
                if not isinstance(word, str):
                    kind = type(word).__name__
                    raise TypeError(f"words[{row}] must be a list of str, {WORDS}; its word {place} is {kind}")
            lists.append(word_list)
            stops = np.cumsum([len(w) + 1 for w in word_list], dtype=np.int64) - 1
            spans.append([(int(s) - len(w), int(s)) for s, w in zip(stops, word_list, strict=True)])
        check_truth("normalize", normalize)
        texts = [" ".join(w) for w in lists]
        return self.embed_spans(texts, spans, instruction=instruction, normalize=normalize, shift=shift, **run).spans

    def embed_spans(
        self,
        texts: Iterable[str],
        spans: Sequence[Sequence[tuple[int, int]]],
        *,
        instruction: Instruction = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        shift: int = 0,
        **run: Unpack[RunOptions],
    ) -> SpanVectors:
        """Documents, parts of them and their tokens from one forward: every part has seen the whole text.

        Args:
            texts: n texts.
            spans: for each text, character ranges (start, stop) of the text as given, whatever a template or an
                instruction puts before it; they may nest and overlap.
            instruction, prompt_name: as in `embed`.
            normalize: for document and span vectors; default the layout's rule.
            shift: read each span's states this many tokens further left. 1 suits a model trained to predict masked
                tokens from the position before them (MNTP): the state that speaks of token i lies at i - 1.
            run: as in `embed_tokens`.

        Returns:
            `SpanVectors`. A span is the mean of the final states of the tokens that overlap it (before dense heads);
            one without any (cut off, or empty) is a zero row.

        Raises:
            TypeError: no (start, stop) pairs of int, by the row, or what `embed` refuses.
            ValueError: a wrong number of lists, a range outside its text, a negative shift, or a model loaded with
                `compat`.
        """
        check_whole("shift", shift)
        if normalize is not None:
            check_truth("normalize", normalize)
        if shift < 0:
            raise ValueError(f"shift is {shift}; expected 0, or how many tokens to the left")
        if self.spec.compat:
            raise ValueError(
                f"compat={self.spec.compat!r} rewrites texts before it reads them: spans name nothing there"
            )
        settings = run_settings(run)
        rows, _ = as_texts(texts)
        ranges = _checked_spans(spans, rows)
        instructions = self._instructions(instruction, prompt_name, len(rows))
        return self._spans_of_rows(rows, instructions, settings, normalize, ranges, shift)

    def _tokens_of_rows(
        self, rows: list[str], instructions: list[str] | None, run: RunSettings, normalize: bool
    ) -> list[TokenVectors]:
        result: list[TokenVectors] = [None] * len(rows)  # type: ignore[list-item]
        program = embedding_program(self.spec, self.heads, vectors=False, states=True)
        for done in self._run(rows, instructions, run, program, offsets=True):
            for row, vectors in zip(done.rows, _token_vectors(done), strict=True):
                if normalize:
                    vectors = vectors._replace(vectors=F.normalize(torch.from_numpy(vectors.vectors)).numpy())
                result[row] = vectors
        return result

    def _spans_of_rows(
        self,
        rows: list[str],
        instructions: list[str] | None,
        run: RunSettings,
        normalize: bool | None,
        spans: Sequence[Sequence[tuple[int, int]]],
        shift: int = 0,
    ) -> SpanVectors:
        wanted = self.spec.normalize if normalize is None else normalize
        documents = np.zeros((len(rows), self.spec.embedding_size), np.float32)
        parts = [np.zeros((len(ranges), self.spec.decoder.hidden_size), np.float32) for ranges in spans]
        tokens: list[TokenVectors] = [None] * len(rows)  # type: ignore[list-item]
        program = embedding_program(self.spec, self.heads, states=True, normalize=normalize)
        for done in self._run(rows, instructions, run, program, offsets=True):
            window = done.window
            documents[done.rows] = done.ran.outputs[0].numpy()
            for row, local, own in zip(done.rows, done.ran.indices, _token_vectors(done), strict=True):
                tokens[row] = own
                assert window.tokens.special is not None and window.tokens.text_sizes is not None
                special = window.tokens.special[window.own(local)]
                before, size = window.text_starts[local], int(window.tokens.text_sizes[local])
                for i, (start, stop) in enumerate(spans[row]):
                    stop = min(stop, size)  # past a cut stands what follows the text, not the rest of it
                    first, last = prepare.char_span_to_tokens(own.offsets, special, before + start, before + stop)
                    first, last = max(first - shift, 0), last - shift
                    if last > first:
                        part = own.vectors[first:last].mean(0, dtype=np.float64).astype(np.float32)
                        parts[row][i] = part / max(float(np.linalg.norm(part)), 1e-12) if wanted else part
        return SpanVectors(documents, parts, tokens)


def _checked_spans(spans: Any, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Each text's character ranges, as plain pairs."""
    if isinstance(spans, str) or not isinstance(spans, Iterable):
        raise TypeError(f"spans is {type(spans).__name__}: give one list per text, {RANGES}")
    rows = list(spans)
    if len(rows) != len(texts):
        raise ValueError(f"spans has {len(rows)} entries for {len(texts)} texts: give one list per text")
    checked = []
    for row, (ranges, text) in enumerate(zip(rows, texts, strict=True)):
        try:
            pairs = [(index(start), index(stop)) for start, stop in ranges]
        except (TypeError, ValueError):
            given = repr(ranges)[:80]
            raise TypeError(f"spans[{row}] is {given}: it must be a list of pairs of int, {RANGES}") from None
        for start, stop in pairs:
            if not 0 <= start <= stop <= len(text):
                raise ValueError(f"spans[{row}] has ({start}, {stop}); text {row} has {len(text)} characters")
        checked.append(pairs)
    return checked


def _token_vectors(done: Done) -> list[TokenVectors]:
    """Final states of a pack's tokens, one entry per text."""
    tokens, indices = done.window.tokens, done.ran.indices
    states_TD = done.ran.outputs[-1].numpy()
    if done.ran.outputs[-1].is_pinned():
        states_TD = states_TD.copy()  # page-locked memory is scarce, and a caller may keep what it gets
    assert tokens.offsets is not None
    result = []
    for local, state in zip(indices, np.split(states_TD, np.cumsum(tokens.lengths[indices])[:-1]), strict=True):
        own = done.window.own(local)
        result.append(TokenVectors(state, tokens.offsets[own], tokens.ids[own]))
    return result
