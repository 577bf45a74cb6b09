"""Records of line-based files (text, JSON lines, CSV) as bytes, each with the place where it begins.

Places are bytes of the decompressed file. A record longer than `MAX_RECORD` is skipped over in blocks, never held.
"""

import csv
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from flashvec.runtime.corpus.sources import Source, SourceError, fault, open_source

MAX_RECORD = 16 << 20  # bytes
MAX_QUOTE_LINES = 100  # of a CSV record, with a quote on each that ends a field of several lines
MAX_RATIO = 250  # decompressed to compressed bytes, past the first MAX_RECORD of them
BLOCK, SMALL_BLOCK = 1 << 20, 1 << 16


class Record(NamedTuple):
    """One record."""

    start: int
    stop: int  # where the next one begins
    content: bytes | None  # without its line end; None: longer than MAX_RECORD
    fields: list[bytes] | None = None  # CSV only; None with content: a broken record


class Stream:
    """A file's decompressed bytes from some place on.

    Raises:
        SourceError: damaged or cut-off compression, or far more bytes than a text file compresses to.
    """

    def __init__(self, source: Source, start: int = 0) -> None:
        self.source, self.at = source, 0
        self._raw = open_source(source)
        self._file: Any = self._raw
        if source.compression is not None:
            self._file = pa.CompressedInputStream(self._raw, source.compression)
            while self.at < start:
                if not self.read(min(BLOCK, start - self.at)):
                    raise SourceError(f"{source.uri}: ends at byte {self.at}, before the rows of this shard")
        else:
            self._raw.seek(start)
            self.at = start

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes; none at the end."""
        try:
            block: bytes = self._file.read(size)
        except OSError as error:
            what = f"{fault(error)} near byte {self.at} ({_first_line(error)})"
            raise SourceError(f"{self.source.uri}: {what}") from None
        self.at += len(block)
        if self.source.compression is not None:
            if not block and self._raw.tell() < self.source.size:
                raise SourceError(f"{self.source.uri}: damaged: compressed data ends before the file does")
            if self.at > MAX_RECORD + MAX_RATIO * self.source.size:
                raise SourceError(f"{self.source.uri}: grows more than {MAX_RATIO}-fold when decompressed: refused")
        return block

    def close(self) -> None:
        self._raw.close()


def read_lines(source: Source, start: int, stop: int | None = None) -> Iterator[Record]:
    """Lines that begin in [start, stop); `start` must be the beginning of one."""
    stream = Stream(source, start)
    try:
        yield from _lines(stream, start, stop)
    finally:
        stream.close()


def _lines(stream: Stream, start: int, stop: int | None) -> Iterator[Record]:
    at, rest, skipped = start, b"", 0  # `rest` begins at `at`; `skipped` bytes of an endless line came before it
    while stop is None or at < stop:
        block = stream.read(BLOCK if stop is None else min(BLOCK, max(stop - at, SMALL_BLOCK)))
        if not block:
            size = skipped + len(rest)
            if size:
                yield Record(at, at + size, None if skipped or size > MAX_RECORD else rest)
            return
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if stop is not None and at >= stop:
                return
            size = skipped + len(line) + 1
            yield Record(at, at + size, None if size > MAX_RECORD else line.removesuffix(b"\r"))
            at, skipped = at + size, 0
        if len(rest) > MAX_RECORD or skipped:
            skipped, rest = skipped + len(rest), b""


class _Lines:
    """Lines for the csv module, which says how many it took by taking them. Bytes go through as Latin-1."""

    def __init__(self, source: Source, start: int) -> None:
        self.records = read_lines(source, start)
        self.stop = start
        self.taken: list[Record] = []  # by the record that is being read
        self.waiting: deque[Record] = deque()  # taken by one that was none
        self.num_bytes = self.quote_lines = 0  # of lines after a record's first

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        record = self.waiting.popleft() if self.waiting else next(self.records)
        self.taken.append(record)
        self.stop = record.stop
        if record.content is None:
            return "\n"
        content = record.content.removeprefix(BOM_UTF8) if record.start == 0 else record.content
        if len(self.taken) > 1:
            self._check(content)
        return content.decode("latin-1") + "\n"

    def begin(self) -> None:
        """A record begins with the next line."""
        self.taken.clear()
        self.num_bytes = self.quote_lines = 0

    def _check(self, content: bytes) -> None:
        """A further line of a record. Where each line's quotes end one field and open another, it would never end."""
        self.num_bytes += len(content)
        self.quote_lines += b'"' in content.replace(b'""', b"")
        if self.num_bytes > MAX_RECORD or self.quote_lines > MAX_QUOTE_LINES:
            raise csv.Error("a record without end")

    def give_back(self) -> None:
        """All lines of a broken record but its first: a stray quote must not take what follows it."""
        self.waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        self.stop = self.taken[0].stop


def read_csv(source: Source, start: int, stop: int | None = None) -> Iterator[Record]:
    """Records of a CSV or TSV file that begin in [start, stop), the header's too; quoted fields may hold lines."""
    csv.field_size_limit(MAX_RECORD)
    lines = _Lines(source, start)
    rows = csv.reader(lines, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    at = start
    try:
        while stop is None or at < stop:
            lines.begin()
            try:
                fields: list[bytes] | None = [field.encode("latin-1") for field in next(rows)]
            except StopIteration:
                return
            except csv.Error:
                fields = None
                lines.give_back()
                rows = csv.reader(lines, delimiter="\t" if source.format == "tsv" else ",", strict=True)
            is_too_long = any(line.content is None for line in lines.taken)
            if fields != [] or is_too_long:  # a blank line is no record
                yield Record(at, lines.stop, None if is_too_long else b"", fields)
            at = lines.stop
    finally:
        lines.records.close()  # type: ignore[attr-defined]


def read_records(source: Source, start: int, stop: int | None = None) -> Iterator[Record]:
    """Records that begin in [start, stop), whatever the line-based format."""
    if source.format in ("csv", "tsv"):
        return read_csv(source, start, stop)
    lines = read_lines(source, start, stop)
    if source.format == "text":
        return lines
    return (line for line in lines if line.content is None or line.content.strip())  # a blank line is no record


def csv_header(source: Source) -> tuple[list[str], int]:
    """Column names of a CSV or TSV file, and where its first record begins.

    Raises:
        SourceError: an empty file, or names that are not text or come twice; what a spreadsheet leaves empty may.
    """
    record = next(read_csv(source, 0), None)
    if record is None or not record.fields:
        raise SourceError(f"{source.uri}: no header line")
    try:
        names = [name.decode("utf-8-sig" if i == 0 else "utf-8") for i, name in enumerate(record.fields)]
    except UnicodeDecodeError:
        raise SourceError(f"{source.uri}: the header line is not UTF-8") from None
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise SourceError(f"{source.uri}: the header names the column {name!r} twice: rename one")
        seen.add(name)
    return names, record.stop


def next_line_start(source: Source, at: int) -> int:
    """The first place at or after `at` where a line of an uncompressed file begins; its size where none does."""
    with open_source(source) as file:
        at = max(at - 1, 0)
        file.seek(at)
        while block := file.read(1 << 16):
            found = block.find(b"\n")
            if found >= 0:
                return min(at + found + 1, source.size)
            at += len(block)
    return source.size


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
