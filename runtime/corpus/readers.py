"""From a range of an input file to rows, whatever its format; memory is bounded by a batch, not by the file."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashvec.runtime.corpus import rows as reasons
from flashvec.runtime.corpus.records import MAX_RECORD, Record, csv_header, read_records
from flashvec.runtime.corpus.rows import Bad, Rows, check_bounds, make_rows, sound, strings, without_views
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import Source, SourceError, fault, open_source
from flashvec.runtime.corpus.storage import is_uri

BATCH_ROWS = 4096
BATCH_BYTES = 16 << 20
MAX_ROW_GROUP = 4 << 30  # bytes of the columns that are read, decompressed
THRIFT_LIMIT = 100 << 20
STREAM_START = b"\xff\xff\xff\xff"  # of an Arrow stream's first message; a file has ARROW1 before it


def read_rows(file: int, source: Source, start: int, stop: int, settings: JobSettings) -> Iterator[Rows]:
    """Rows of a file whose place lies in [start, stop), in order.

    Args:
        file: the file's number in the plan.
        settings: with `text_columns` or `text_template` set.

    Raises:
        SourceError: the file is gone, damaged, or lacks a column.
    """
    try:
        if source.format == "parquet":
            yield from _tables(file, start, stop, _parquet(source, start, stop, settings), settings)
        elif source.format == "arrow":
            yield from _tables(file, start, stop, _arrow(source, start, stop, settings), settings)
        else:
            yield from _records(file, source, start, stop, settings)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{source.uri}: {fault(error)} ({str(error).splitlines()[0][:200]})") from None


def open_parquet(source: Source, shared: Sequence[str] = ()) -> pq.ParquetFile:
    """A Parquet file, with bounds on what its header may claim.

    Args:
        shared: text columns whose values are held once each, as the file has them, however many rows name one.

    Raises:
        SourceError: no Parquet file, or a cut-off one.
    """
    file = open_source(source)
    try:
        return pq.ParquetFile(
            file,
            page_checksum_verification=True,
            thrift_string_size_limit=THRIFT_LIMIT,
            thrift_container_size_limit=THRIFT_LIMIT,
            read_dictionary=shared,
        )
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{source.uri}: no readable Parquet file ({str(error).splitlines()[0][:200]})") from None


def open_arrow(source: Source, columns: Sequence[str] | None = None) -> pa.ipc.RecordBatchFileReader:
    """An Arrow IPC file; of the named columns alone where they are named: others are not decompressed.

    Raises:
        SourceError: no Arrow file, or a cut-off one.
    """
    try:
        file = open_source(source) if is_uri(source.uri) else pa.memory_map(source.uri)
        reader = pa.ipc.open_file(file)
        if columns is None:
            return reader
        fields = [reader.schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
    except (pa.ArrowException, OSError) as error:
        if _is_stream(source):
            raise SourceError(
                f"{source.uri}: an Arrow stream, as the cache of Hugging Face datasets has them, whose rows cannot be "
                "found without reading all: write it as a file (pyarrow.ipc.new_file) or as Parquet"
            ) from None
        raise SourceError(f"{source.uri}: no readable Arrow file ({str(error).splitlines()[0][:200]})") from None


def _is_stream(source: Source) -> bool:
    """Does it begin as an Arrow stream does: with a message, and no word of its own."""
    with open_source(source) as file:
        return bool(file.read(len(STREAM_START)) == STREAM_START)


def _wanted(settings: JobSettings) -> list[str]:
    own = [settings.id_column] if settings.id_column is not None else []
    return list(dict.fromkeys([*settings.text_fields(), *own, *settings.columns]))


def _parquet(source: Source, start: int, stop: int, settings: JobSettings) -> Iterator[tuple[int, pa.RecordBatch]]:
    wanted = _wanted(settings)
    written = {settings.id_column, *settings.columns}  # in the type that the file states
    with open_parquet(source, [name for name in settings.text_fields() if name not in written]) as file:
        groups: list[int] = []
        first, at, size = 0, 0, BATCH_ROWS
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            if at + group.num_rows > start and at < stop:
                if not groups:
                    first = at
                groups.append(i)
                held = _bytes_of(group, wanted)
                size = max(1, min(size, BATCH_BYTES * group.num_rows // max(held, 1)))
                if held > MAX_ROW_GROUP:
                    raise SourceError(
                        f"{source.uri}: row group {i} has {held} bytes of what is read: write smaller ones"
                    )
            at += group.num_rows
        for batch in file.iter_batches(size, row_groups=groups, columns=wanted, use_threads=False):
            yield first, batch
            first += len(batch)


def _bytes_of(group: Any, wanted: Sequence[str]) -> int:
    """Uncompressed size of some columns of a row group; a nested one's leaves are named after it."""
    leaves = (group.column(i) for i in range(group.num_columns))
    return sum(
        leaf.total_uncompressed_size
        for leaf in leaves
        if any(leaf.path_in_schema == name or leaf.path_in_schema.startswith(f"{name}.") for name in wanted)
    )


def _arrow(source: Source, start: int, stop: int, settings: JobSettings) -> Iterator[tuple[int, pa.RecordBatch]]:
    starts, wanted = _batch_starts(source), _wanted(settings)
    with open_arrow(source, wanted) as file:
        for i in range(max(0, bisect_right(starts, start) - 1), file.num_record_batches):
            if starts[i] >= stop:
                return
            batch = file.get_batch(i).select(wanted)
            for name in wanted:
                check_bounds(batch.column(name))
            for offset in range(0, len(batch), BATCH_ROWS):
                yield starts[i] + offset, batch.slice(offset, BATCH_ROWS)


@lru_cache(maxsize=64)
def _batch_starts(source: Source) -> tuple[int, ...]:
    """The first row of each batch: the file does not list them, so they are read once and not for every shard."""
    with open_arrow(source) as file:
        names = file.schema.names[:1]
    with open_arrow(source, names) as file:
        counts = [len(file.get_batch(i)) for i in range(file.num_record_batches)]
    return tuple(accumulate(counts, initial=0))[:-1]


def _tables(
    file: int, start: int, stop: int, batches: Iterator[tuple[int, pa.RecordBatch]], settings: JobSettings
) -> Iterator[Rows]:
    for at, batch in batches:
        if at >= stop:
            return
        low, high = max(start - at, 0), min(stop - at, len(batch))
        if low >= high:
            continue
        part = batch.slice(low, high - low)
        arrays = {name: _without_views(part.column(name)) for name in _wanted(settings)}
        fields = {name: strings(arrays[name]) for name in settings.text_fields()}
        bad = {
            i: reasons.TOO_LARGE
            for i, values in enumerate(zip(*fields.values(), strict=True))
            if sum(len(v) for v in values if v is not None) > MAX_RECORD
        }
        columns = {name: sound(arrays[name]) for name in settings.columns}
        if settings.id_column is not None:
            columns = {"id": sound(arrays[settings.id_column]), **columns}
        yield make_rows(file, np.arange(at + low, at + high), fields, bad, columns, settings)


def _without_views(array: pa.Array) -> pa.Array:
    kind = without_views(array.type)
    return array if kind == array.type else array.cast(kind)


def _records(file: int, source: Source, start: int, stop: int, settings: JobSettings) -> Iterator[Rows]:
    names = _csv_names(source) if source.format in ("csv", "tsv") else ()
    held: list[Record] = []
    size = 0
    for record in read_records(source, start, stop):
        held.append(record)
        size += record.stop - record.start if record.content is not None else 0
        if len(held) == BATCH_ROWS or size > BATCH_BYTES:
            yield _line_rows(file, source, held, names, settings)
            held, size = [], 0
    if held:
        yield _line_rows(file, source, held, names, settings)


@lru_cache(maxsize=4096)
def _csv_names(source: Source) -> tuple[str, ...]:
    """Column names, read once and not for every shard."""
    return tuple(csv_header(source)[0])


def _line_rows(file: int, source: Source, records: list[Record], names: Sequence[str], settings: JobSettings) -> Rows:
    bad: dict[int, Bad] = {}
    objects: list[dict[str, Any]] = []
    for i, record in enumerate(records):
        found = _parse(source, record, names)
        if isinstance(found, Bad):
            bad[i], found = found, {}
        objects.append(found)
    fields = {name: [row.get(name) for row in objects] for name in settings.text_fields()}
    columns = {name: _text_column([row.get(name) for row in objects]) for name in settings.columns}
    if settings.id_column is not None:
        columns = {"id": _text_column([row.get(settings.id_column) for row in objects]), **columns}
    places = np.array([record.start for record in records], dtype=np.int64)
    return make_rows(file, places, fields, bad, columns, settings)


def _parse(source: Source, record: Record, names: Sequence[str]) -> dict[str, Any] | Bad:
    if record.content is None:
        return reasons.TOO_LARGE
    if source.format in ("csv", "tsv"):
        if record.fields is None or len(record.fields) != len(names):
            return reasons.BROKEN_CSV
        return {name: _utf8(value) for name, value in zip(names, record.fields, strict=True)}
    text = _utf8(record.content)
    if isinstance(text, str) and record.start == 0:
        text = text.removeprefix("\ufeff")
    if source.format == "text":
        return {"text": text}
    if isinstance(text, bytes):
        return reasons.NOT_UTF8
    try:
        value = json.loads(text, parse_constant=json_constant)
    except (ValueError, RecursionError):
        return reasons.BROKEN_JSON
    return value if isinstance(value, dict) else reasons.BROKEN_JSON


def _utf8(content: bytes) -> str | bytes:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content


def json_constant(name: str) -> float | None:
    """No JSON, yet what Python writes: NaN, by which tables say that nothing is there, and the infinities."""
    return None if name == "NaN" else float(name)


def _text_column(values: list[Any]) -> pa.Array:
    """Values of JSON or CSV as a text column: strings as they are, others as JSON, what cannot be text as null."""
    texts = []
    for value in values:
        if value is not None and not isinstance(value, str | bytes):
            value = json.dumps(value, ensure_ascii=False, sort_keys=True)
        if isinstance(value, bytes) or (value is not None and not value.isascii() and not _encodes(value)):
            value = None
        texts.append(value)
    return pa.array(texts, pa.large_string())


def _encodes(value: str) -> bool:
    try:
        value.encode()
        return True
    except UnicodeEncodeError:
        return False
