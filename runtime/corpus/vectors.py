"""From a window's texts to vectors: repeated texts once, known ones not at all, long ones in chunks."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.rows import NO_TOKENS, NOT_FINITE
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.windows import Window
from flashvec.runtime.tokenize import TokenizerError

HASH_BYTES = 16
WITHOUT = {-1: NOT_FINITE, -2: NO_TOKENS}  # in the place of a vector's number: why there is none


class TextEncoder(Protocol):
    """What a shard needs of an `Encoder`; chunking needs its `tokenizer` and `spec` too."""

    @property
    def embed(self) -> Callable[..., Any]:
        """Of a list of texts and `embed_settings`: [n, d] fp32, finite or not, in order."""


class KnownVectors(Protocol):
    """Vectors of an earlier job."""

    def find(self, hashes: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Which of the hashes are known (bool [n]), and the vectors of those."""


@dataclass(frozen=True)
class Counts:
    """What happened to a window's rows."""

    duplicates: int
    reused: int
    truncated: int


class Vectors:
    """Makes the vectors of one shard, window by window."""

    def __init__(self, plan: Plan, encoder: TextEncoder, known: KnownVectors | None = None) -> None:
        self.plan, self.encoder, self.known = plan, encoder, known
        settings = plan.settings
        self.prompt = json.dumps([settings.instruction, settings.prompt_name]).encode()
        width = plan.vector_type()
        self.empty = np.zeros((0, width.list_size), width.value_type.to_pandas_dtype())
        self.kept: list[np.ndarray] = []  # a window's new vectors each; none kept without dedupe
        self.places: dict[bytes, int] = {}  # hash -> number among all kept vectors, or of `WITHOUT`
        self.num_kept = 0

    def make(self, window: Window) -> tuple[Window, list[bytes], np.ndarray, Counts]:
        """Vectors of a window.

        Returns:
            The window, with chunks as rows of their own and rows without a (finite) vector marked bad; hashes and
            vectors [n, d] of its good rows, in order; and the counts.
        """
        if self.plan.settings.long == "chunk" and self.plan.settings.chunks == "rows":
            window = self._expand(window)
        good = [i for i in range(len(window.texts)) if i not in window.bad]
        hashes = keys = [self.hash(window.texts[i]) for i in good]
        if not self.plan.settings.dedupe:  # every row is its own, and nothing is kept for later windows
            self.places, self.kept, self.num_kept = {}, [], 0
            keys = [key + number.to_bytes(4, "big") for number, key in enumerate(hashes)]
        fresh: dict[bytes, str] = {}
        duplicates = 0
        for i, key in zip(good, keys, strict=True):
            again = key in self.places or key in fresh
            duplicates += again
            if not again:
                fresh[key] = window.texts[i]
        reused, truncated = self._add(fresh)
        at = np.array([self.places[key] for key in keys], dtype=np.int64)
        has_one = at >= 0
        bad = {**window.bad, **{good[i]: WITHOUT[at[i]] for i in np.flatnonzero(~has_one)}}
        together = self.kept[0] if len(self.kept) == 1 else np.concatenate([self.empty, *self.kept])
        self.kept = [together]
        own = [key for key, is_there in zip(hashes, has_one, strict=True) if is_there]
        return replace(window, bad=bad), own, together[at[has_one]], Counts(duplicates, reused, truncated)

    def hash(self, text: str) -> bytes:
        """xxh3 (128 bits) of prompt and text: equal hashes have equal vectors."""
        return xxhash.xxh3_128_digest(self.prompt + b"\0" + text.encode())

    def _add(self, fresh: dict[bytes, str]) -> tuple[int, int]:
        """Keep the vectors of new texts; how many came from the earlier job, and how many texts were cut."""
        keys = list(fresh)
        is_known = np.zeros(len(keys), dtype=bool)
        if self.known is not None and keys:
            is_known, vectors = self.known.find([key[:HASH_BYTES] for key in keys])
            self._keep([key for key, known in zip(keys, is_known, strict=True) if known], vectors)
        keys = [key for key, known in zip(keys, is_known, strict=True) if not known]
        if not keys:
            return int(is_known.sum()), 0
        found, truncated, failing = embed_but_failing(self._embed, [fresh[key] for key in keys])
        vectors = np.concatenate([np.zeros((0, self.plan.dim), np.float32), *found])
        self.places.update((keys[i], -2) for i in failing)
        keys = [key for i, key in enumerate(keys) if i not in failing]
        finite = np.isfinite(vectors).all(1)
        if self.plan.settings.precision == "float16":  # vectors that are not of unit length may be beyond it
            with np.errstate(over="ignore"):
                finite &= np.isfinite(vectors.astype(np.float16)).all(1)
        self.places.update((key, -1) for key, is_finite in zip(keys, finite, strict=True) if not is_finite)
        self._keep(
            [key for key, is_finite in zip(keys, finite, strict=True) if is_finite],
            narrow(vectors[finite], self.plan.settings.precision, self.plan.int8_ranges),
        )
        return int(is_known.sum()), truncated

    def _keep(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self.places.update(zip(keys, range(self.num_kept, self.num_kept + len(keys)), strict=True))
        self.kept.append(vectors)
        self.num_kept += len(keys)

    def _embed(self, texts: list[str]) -> tuple[np.ndarray, int]:
        if self.plan.settings.long == "chunk" and self.plan.settings.chunks == "mean":
            from flashvec.runtime.corpus.chunks import chunk_texts, mean_of_chunks

            parts = [chunk_texts(self.encoder, text, self.plan.settings) for text in texts]
            flat, truncated = embed_texts(
                self.encoder, [chunk.text for part in parts for chunk in part], self.plan.settings
            )
            return mean_of_chunks(self.encoder, flat, parts, self.plan.settings), truncated
        return embed_texts(self.encoder, texts, self.plan.settings)

    def _expand(self, window: Window) -> Window:
        from flashvec.runtime.corpus.chunks import chunk_texts

        texts: list[str] = []
        rows: list[int] = []
        numbers: list[int] = []
        bad = {}
        for i, text in enumerate(window.texts):
            parts, why = [""], window.bad.get(i)
            if why is None:
                try:
                    parts = [chunk.text for chunk in chunk_texts(self.encoder, text, self.plan.settings)]
                except TokenizerError:
                    why = NO_TOKENS
            if why is not None:
                bad[len(texts)] = why
            texts += parts
            rows += [i] * len(parts)
            numbers += range(len(parts))
        take = np.array(rows, dtype=np.int64)
        return replace(
            window,
            files=window.files[take],
            places=window.places[take],
            texts=texts,
            bad=bad,
            columns=window.columns.take(pa.array(take)) if window.columns.num_columns else window.columns,
            chunks=np.array(numbers, dtype=np.int32),
        )


def embed_texts(encoder: TextEncoder, texts: list[str], settings: JobSettings) -> tuple[np.ndarray, int]:
    """fp32 [n, d] and how many texts were cut, as the settings say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = encoder.embed(texts, **embed_settings(settings))
    return vectors, sum(getattr(warning.message, "num_texts", 0) for warning in caught)


def embed_but_failing(
    embed: Callable[[list[str]], tuple[np.ndarray, int]], texts: list[str]
) -> tuple[list[np.ndarray], int, set[int]]:
    """Vectors in pieces, in order, and how many texts were cut, of those that the tokenizer does not fail at.

    The numbers of the others come last. They are found by halves: a window seldom has one.
    """
    try:
        vectors, truncated = embed(texts)
        return [vectors], truncated, set()
    except TokenizerError:
        if len(texts) == 1:
            return [], 0, {0}
    half = len(texts) // 2
    one, cut_one, failing = embed_but_failing(embed, texts[:half])
    two, cut_two, others = embed_but_failing(embed, texts[half:])
    return one + two, cut_one + cut_two, failing | {half + i for i in others}


def embed_settings(settings: JobSettings) -> dict[str, Any]:
    """Arguments of `Encoder.embed` that a job's settings amount to."""
    return {
        "instruction": settings.instruction,
        "prompt_name": settings.prompt_name,
        "normalize": settings.normalize,
        "truncate_dim": settings.dims,
        "max_length": settings.max_length,
        "show_progress": False,
    }


def narrow(vectors: np.ndarray, precision: str, ranges: Any) -> np.ndarray:
    """fp32 vectors in the job's precision."""
    if precision in ("float32", "float16"):
        return vectors.astype(precision, copy=False)
    from flashvec.runtime.pooling import quantize

    return quantize(vectors, "ubinary" if precision == "binary" else precision, ranges)
