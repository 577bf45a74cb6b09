"""Where shards begin and end: by footers, by a counting pass, or by bytes cut at a line's end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flashvec.runtime.corpus.inspect import Inspected
from flashvec.runtime.corpus.records import next_line_start, read_lines, read_records
from flashvec.runtime.corpus.sources import Source, SourceError, at_once

SAMPLED_BYTES, SAMPLED_PLACES = 256 << 10, 4  # of a line-based file, for the mean length of its lines


class Piece(NamedTuple):
    """Rows of one file: row numbers, or bytes at which records begin, in [start, stop)."""

    file: int
    start: int
    stop: int


@dataclass
class Shard:
    """Consecutive pieces. `num_rows` is what they hold, by estimate where lines were not counted."""

    pieces: list[Piece] = field(default_factory=list)
    num_rows: int = 0


def cut(sources: Sequence[Source], inspected: Sequence[Inspected], size: int) -> list[Shard]:
    """Shards of about `size` rows over all files in order; exactly so where rows are counted.

    Raises:
        SourceError: a file that is damaged, found by the counting pass.
    """
    shards = [Shard()]
    means = at_once(lambda source: _mean_line(source) if _is_cut_by_bytes(source) else 0.0, sources)
    for number, (source, found, mean) in enumerate(zip(sources, inspected, means, strict=True)):
        room = size - shards[-1].num_rows
        for start, stop, num_rows in _cut_file(source, found, mean, room, size):
            if shards[-1].num_rows >= size:
                shards.append(Shard())
            shards[-1].pieces.append(Piece(number, start, stop))
            shards[-1].num_rows += num_rows
    if not shards[-1].pieces:
        shards.pop()
    if not shards:
        raise SourceError("the inputs hold no rows")
    return shards


def _is_cut_by_bytes(source: Source) -> bool:
    """Lines of an uncompressed file can be found from any byte; others are counted."""
    return bool(source.size) and source.compression is None and source.format in ("text", "jsonl")


def _cut_file(source: Source, found: Inspected, mean: float, room: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and rows of each cut: the first holds up to `room` rows, or `size` where there is no room."""
    room = room or size
    if source.counts_rows:
        start = 0
        while start < found.num_rows:
            stop = min(start + room, found.num_rows)
            yield start, stop, stop - start
            start, room = stop, size
    elif _is_cut_by_bytes(source):
        yield from _by_bytes(source, mean, room, size)
    elif source.size:
        yield from _count(source, found.data_start, room, size)


def _count(source: Source, start: int, room: int, size: int) -> Iterator[tuple[int, int, int]]:
    num_rows, stop = 0, start
    for record in read_records(source, start):
        num_rows, stop = num_rows + 1, record.stop
        if num_rows == room:
            yield start, stop, num_rows
            start, num_rows, room = stop, 0, size
    if num_rows:
        yield start, stop, num_rows


def _by_bytes(source: Source, mean: float, room: int, size: int) -> Iterator[tuple[int, int, int]]:
    start = 0
    while start < source.size:
        wanted = start + max(int(room * mean), 1)
        stop = source.size if wanted >= source.size else next_line_start(source, wanted)
        yield start, stop, room if stop < source.size else max(1, min(room, round((stop - start) / mean)))
        start, room = stop, size


def _mean_line(source: Source) -> float:
    """Of lines at several places: one large record, or a file sorted by length, must not size all shards."""
    apart = source.size // SAMPLED_PLACES
    starts = [0]
    if apart > SAMPLED_BYTES:
        starts += [next_line_start(source, place * apart) for place in range(1, SAMPLED_PLACES)]
    num_bytes = num_lines = 0
    for start in starts:
        for record in read_lines(source, start, start + SAMPLED_BYTES):
            num_bytes, num_lines = num_bytes + record.stop - record.start, num_lines + 1
    return num_bytes / max(num_lines, 1)
