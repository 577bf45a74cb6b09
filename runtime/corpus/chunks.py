"""Texts longer than the model may read, split into overlapping chunks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flashvec.runtime.corpus.settings import JobSettings

OVERLAP = 8  # a chunk shares an eighth of its tokens with the next, so that a sentence at the seam is whole in one
MAX_TOKENS = 1 << 30


class Chunk(NamedTuple):
    """A piece of a text."""

    text: str
    num_tokens: int


def chunk_texts(encoder: Any, text: str, settings: JobSettings) -> list[Chunk]:
    """A text's chunks: itself where it fits, else runs of its tokens that each fit.

    Raises:
        ValueError: the prompt leaves no room.
    """
    limit = settings.max_length or encoder.spec.max_length
    room = limit - _overhead(encoder, settings)
    if room < 2:
        raise ValueError(f"max_length is {limit}, and prompt and special tokens leave {room} tokens of a text")
    room = min(room, encoder.spec.document_limit or room)  # a longer chunk would be cut once more
    if len(text) <= room // 4:  # a tokenizer makes at most four tokens of a character's bytes
        return [Chunk(text, 1)]
    tokens = encoder.tokenizer.encode([text], MAX_TOKENS, offsets=True)
    offsets = tokens.offsets[~tokens.special]
    if len(offsets) <= room:
        return [Chunk(text, len(offsets))]
    chunks, start = [], 0
    while True:
        stop = min(start + room, len(offsets))
        piece, stop = _fitting(encoder, text, offsets, start, stop, room)
        chunks.append(Chunk(piece, stop - start))
        if stop == len(offsets):
            return chunks
        start = max(stop - room // OVERLAP, start + 1)


def _fitting(encoder: Any, text: str, offsets: np.ndarray, start: int, stop: int, room: int) -> tuple[str, int]:
    """Tokens [start, stop) as text; shorter where that text alone makes more tokens than it had in its place."""
    while True:
        piece = text[offsets[start, 0] : offsets[stop - 1, 1]]
        excess = int(encoder.tokenizer.count([piece])[0]) - room
        if excess <= 0 or stop - start == 1:
            return piece, stop
        stop = max(stop - excess, start + 1)


def _overhead(encoder: Any, settings: JobSettings) -> int:
    """Tokens around a text: special ones, the template and the prompt."""
    from flashvec.runtime import prepare

    instruction = settings.instruction
    if settings.prompt_name is not None:
        instruction = encoder.spec.prompts.get(settings.prompt_name)
    elif instruction is None and encoder.spec.default_prompt_name is not None:
        instruction = encoder.spec.prompts.get(encoder.spec.default_prompt_name)
    prepared = prepare.prepare(encoder.spec, ["x"], None if not instruction else [instruction], encoder.tokenizer)
    return int(encoder.tokenizer.count(prepared.strings, special=True)[0])


def mean_of_chunks(
    encoder: Any, vectors: np.ndarray, parts: Sequence[Sequence[Chunk]], settings: JobSettings
) -> np.ndarray:
    """Each text's mean over its chunks, weighted by their tokens, at unit length where vectors are: fp32 [n, d]."""
    normalize = encoder.spec.normalize if settings.normalize is None else settings.normalize
    out = np.empty((len(parts), vectors.shape[1]), np.float32)
    at = 0
    for i, chunks in enumerate(parts):
        own = vectors[at : at + len(chunks)]
        at += len(chunks)
        if len(chunks) == 1:
            out[i] = own[0]
            continue
        weights = np.array([chunk.num_tokens for chunk in chunks], np.float64)
        mean = weights @ own.astype(np.float64) / weights.sum()
        out[i] = mean / max(np.linalg.norm(mean), 1e-12) if normalize else mean
    return out
