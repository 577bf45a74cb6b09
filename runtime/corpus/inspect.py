"""Are the columns that a job needs in its inputs, and of what type are they: asked before any work."""

import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashvec.runtime.corpus.readers import json_constant, open_arrow, open_parquet, read_rows
from flashvec.runtime.corpus.records import Stream, csv_header, read_lines
from flashvec.runtime.corpus.rows import without_views
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import Source, SourceError, at_once, fault

SAMPLED_LINES = 100  # of a JSON lines file, to see its keys
MORE_LINES = 100_000  # where a column that was asked for is not among them
OPEN = pa.null()  # a type that only the values tell
DELIMITERS = {"csv": ";\t|", "tsv": ",;|"}  # what separates fields in files that are not as their ending says
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # no UTF-8 text begins so


class Inspected:
    """What planning needs to know of one file.

    Attributes:
        schema: columns and types; `OPEN` where only text decides.
        group_rows: rows of each row group (Parquet, Arrow), else none.
        data_start: first byte of the first record (CSV), else 0.
        is_empty: a file without a byte, which has no columns to be asked for.
    """

    def __init__(
        self, schema: pa.Schema, group_rows: Sequence[int] = (), data_start: int = 0, is_empty: bool = False
    ) -> None:
        self.schema, self.group_rows, self.data_start = schema, tuple(group_rows), data_start
        self.is_empty = is_empty

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


def inspect_sources(sources: Sequence[Source]) -> list[Inspected]:
    """Look into every file, at its footer or first lines.

    Raises:
        SourceError: one of them cannot be read.
    """
    return at_once(_inspect, sources)


def resolve_columns(
    settings: JobSettings, sources: Sequence[Source], inspected: Sequence[Inspected]
) -> tuple[JobSettings, pa.Schema]:
    """The settings with their text column named, and the types of the id and passthrough columns.

    Raises:
        SourceError: a column that a file lacks or that is no text, or types that differ between files.
    """
    filled = [(source, found) for source, found in zip(sources, inspected, strict=True) if not found.is_empty]
    if not filled:
        raise SourceError(f"{sources[0].uri}: the inputs hold no rows")
    if not settings.text_fields():
        settings = replace(settings, text_columns=(_guess_text(filled[0][0], filled[0][1].schema),))
    wanted = {} if settings.id_column is None else {"id": settings.id_column}
    wanted |= {name: name for name in settings.columns}
    types: dict[str, pa.DataType] = {}
    named = {*settings.text_fields(), *wanted.values()}
    for source, found in filled:
        if source.format == "jsonl" and not named <= set(found.schema.names):
            found.schema = _json_schema(source, MORE_LINES)
        for name in settings.text_fields():
            kind = _column(source, found.schema, name, "the text column")
            if not (_is_text(kind) or kind == OPEN):
                raise SourceError(f"{source.uri}: the text column {name!r} is {kind}, not text")
        for own, name in wanted.items():
            kind = plain_type(_column(source, found.schema, name, "the column"))
            if own == "id" and not (_is_text(kind) or pa.types.is_integer(kind)):
                raise SourceError(f"{source.uri}: the id column {name!r} is {kind}; ids are text or integers")
            if own not in types:
                _refuse_unwritable(source, name, kind)
            if types.setdefault(own, kind) != kind:
                raise SourceError(f"{source.uri}: column {name!r} is {kind}, in an earlier file it is {types[own]}")
    return settings, pa.schema(list(types.items()))


def check_unique_ids(settings: JobSettings, sources: Sequence[Source], spans: Iterable[tuple[int, int, int]]) -> None:
    """Refuse ids that come twice; holds 8 bytes for each.

    Args:
        spans: file number, start and stop of all that is read.

    Raises:
        ValueError: some do; the message says how many.
    """
    import xxhash

    if settings.id_column is None:
        raise ValueError("unique_ids (--unique-ids) needs id_column (--id-column)")
    only_ids = replace(settings, columns=())
    hashes: list[np.ndarray] = []
    for file, start, stop in spans:
        for rows in read_rows(file, sources[file], start, stop, only_ids):
            ids = [str(value) for value in rows.columns["id"].to_pylist() if value is not None]
            hashes.append(np.array([xxhash.xxh3_64_intdigest(value.encode()) for value in ids], dtype=np.uint64))
    together = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    twice = int((together[1:] == together[:-1]).sum())
    if twice:
        raise ValueError(f"column {settings.id_column!r}: {twice} of {len(together)} ids are repetitions of another")


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type under which a column is written: one kind of text, no dictionaries, no views."""
    kind = without_views(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.large_string() if kind == OPEN or _is_text(kind) else kind


def _refuse_unwritable(source: Source, name: str, kind: pa.DataType) -> None:
    """Types that Arrow has and a part, which is Parquet, cannot hold, as intervals of months, days and nanoseconds."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([(name, kind)])).close()
    except pa.ArrowException as error:
        raise SourceError(f"{source.uri}: column {name!r} is {kind}, which no part can hold ({error})") from None


def _inspect(source: Source) -> Inspected:
    try:
        return _look_into(source)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{source.uri}: {fault(error)} ({str(error).splitlines()[0][:200]})") from None


def _look_into(source: Source) -> Inspected:
    if source.format == "parquet":
        with open_parquet(source) as file:
            metadata = file.metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            return Inspected(file.schema_arrow, rows)
    if source.format == "arrow":
        with open_arrow(source) as reader:
            return Inspected(reader.schema, [len(reader.get_batch(i)) for i in range(reader.num_record_batches)])
    with closing(Stream(source)) as stream:
        first = stream.read(4)
    if not first:  # also of compressed files
        return Inspected(pa.schema([]), is_empty=True)  # as jobs that write many files leave: no rows, no complaint
    _refuse_other_contents(source, first)
    if source.format in ("csv", "tsv"):
        names, start = csv_header(source)
        return Inspected(pa.schema([(name, pa.large_string()) for name in names]), data_start=start)
    if source.format == "text":
        return Inspected(pa.schema([("text", pa.large_string())]))
    return Inspected(_json_schema(source))


def _refuse_other_contents(source: Source, first: bytes) -> None:
    """Files that are no UTF-8 text: read as such they would be rows of nonsense, some of them with a vector.

    Raises:
        SourceError: says what the first bytes are of, and the cure.
    """
    if first.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise SourceError(f"{source.uri}: is UTF-16; convert it, as with iconv -f utf-16 -t utf-8")
    if 0 in first[:2]:  # one of two bytes of a Latin letter; every byte of it is valid UTF-8
        order = "be" if first[0] == 0 else "le"
        raise SourceError(f"{source.uri}: seems to be UTF-16; convert it, as with iconv -f utf-16{order} -t utf-8")
    for magic, ending in MAGIC.items():
        if first.startswith(magic):
            raise SourceError(f"{source.uri}: is compressed, and its name does not say so: add {ending} to it")


def _json_schema(source: Source, lines: int = SAMPLED_LINES) -> pa.Schema:
    """Keys of the first lines; a key whose values are all text is text, others are open or of a wrong type."""
    texts: dict[str, set[bool]] = {}
    for record in islice(read_lines(source, 0), lines):
        try:
            row = json.loads((record.content or b"").decode("utf-8-sig"), parse_constant=json_constant)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            for name, value in row.items():
                texts.setdefault(name, set()).update(() if value is None else (isinstance(value, str),))
    kinds = {name: pa.float64() if kinds == {False} else OPEN for name, kinds in texts.items()}
    return pa.schema(list(kinds.items()))


def _guess_text(source: Source, schema: pa.Schema) -> str:
    _refuse_no_object(source, schema)
    texts = [field.name for field in schema if _is_text(field.type) or field.type == OPEN]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        if found := [c for c in DELIMITERS.get(source.format, "") if len(schema) == 1 and c in texts[0]]:
            raise SourceError(
                f"{source.uri}: the only column is {texts[0]!r}. Are its fields separated by {found[0]!r}? "
                f"Write them as {source.format.upper()}, or name the column with text_columns"
            )
        return str(texts[0])
    listed = ", ".join(texts) or "no column of text"
    raise SourceError(f"{source.uri}: which column is the text? Name it with text_columns; there is {listed}")


def _column(source: Source, schema: pa.Schema, name: str, role: str) -> pa.DataType:
    _refuse_no_object(source, schema)
    if name not in schema.names:
        listed = ", ".join(schema.names) or "none"
        where = f" in its first {MORE_LINES:,} lines" if source.format == "jsonl" else ""
        raise SourceError(f"{source.uri}: {role} {name!r} is missing{where}; columns are {listed}")
    if schema.names.count(name) > 1:
        raise SourceError(f"{source.uri}: {role} {name!r} is there {schema.names.count(name)} times: rename one")
    kind = schema.field(name).type
    return pa.large_string() if source.format == "jsonl" and role == "the column" else kind


def _refuse_no_object(source: Source, schema: pa.Schema) -> None:
    if source.format == "jsonl" and not schema.names:
        raise SourceError(
            f"{source.uri}: none of its first lines is a JSON object with keys: write one on each line, "
            "as jq -c '.[]' does of a list"
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
