"""Rows of an input as the job sees them: a text or the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flashvec.runtime.corpus.settings import JobSettings


class Bad(NamedTuple):
    """Why a row has no vector. The message never quotes the row."""

    code: str
    message: str


NULL = Bad("null", "the text is null or missing")
EMPTY = Bad("empty", "the text is empty or white space")
NOT_UTF8 = Bad("invalid_utf8", "the text is not valid UTF-8")
SURROGATE = Bad("surrogate", "the text has half of a surrogate pair, left by a wrong decoding")
TOO_LARGE = Bad("too_large", "the record is larger than 16 MiB")
BROKEN_JSON = Bad("broken_json", "the line is not a JSON object")
BROKEN_CSV = Bad(
    "broken_csv", "the record does not follow the CSV rules or has another number of fields than the header"
)
NO_ID = Bad("no_id", "the id is null or missing")
NO_TOKENS = Bad("no_tokens", "the tokenizer's library fails at the text")
NOT_FINITE = Bad("not_finite", "the model gave a vector with NaN or infinite values, or beyond what float16 holds")


_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


@dataclass
class Rows:
    """Consecutive rows of one input file.

    Attributes:
        file: number of the file in the plan.
        places: int64 [n], row number or first byte.
        texts: one per row; "" where `bad` has the row.
        bad: number within these rows -> reason.
        columns: id and passthrough columns, n values each; "id" is the id's.
    """

    file: int
    places: np.ndarray
    texts: list[str]
    bad: dict[int, Bad]
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.texts)


def make_rows(
    file: int,
    places: np.ndarray,
    fields: Mapping[str, Sequence[Any]],
    bad: dict[int, Bad],
    columns: dict[str, pa.Array],
    settings: JobSettings,
) -> Rows:
    """Join and judge the text of each row.

    Args:
        fields: text column -> str, bytes (not UTF-8), None or a value of a wrong type, for each row.
        bad: rows already known to be bad.
    """
    bad = dict(bad)
    texts: list[str] = []
    names = list(fields)
    for i, values in enumerate(zip(*fields.values(), strict=True)):
        found = bad[i] if i in bad else _join(dict(zip(names, values, strict=True)), settings)
        if isinstance(found, Bad):
            bad[i], found = found, ""
        texts.append(found)
    if "id" in columns:
        for number in np.flatnonzero(columns["id"].is_null().to_numpy(zero_copy_only=False)).tolist():
            bad.setdefault(number, NO_ID)
            texts[number] = ""
    return Rows(file, places, texts, bad, columns)


def _join(values: dict[str, Any], settings: JobSettings) -> str | Bad:
    if all(value is None for value in values.values()):
        return NULL
    for name, value in values.items():
        if isinstance(value, bytes):
            return NOT_UTF8
        if value is None:
            values[name] = ""  # of a template's columns some may be missing
        elif not isinstance(value, str):
            return Bad("wrong_type", f"the text is {type(value).__name__}, not a string")
    if not any(value.strip() for value in values.values()):
        return EMPTY
    text = settings.join(values)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return SURROGATE
    return text


def strings(array: pa.Array) -> list[Any]:
    """Values of a text column: str, None, or bytes where a value is not UTF-8."""
    if pa.types.is_dictionary(array.type):  # a value that comes often is one str, however large it is
        used = array.indices.drop_null().unique()  # few of a dictionary that serves a whole file
        values = dict(zip(used.to_pylist(), strings(array.dictionary.take(used)), strict=True))
        return [values.get(i) for i in array.indices.to_pylist()]
    try:
        array.validate(full=True)
        found: list[Any] = array.to_pylist()
        return found
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return [_decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]


def check_bounds(array: pa.Array) -> None:
    """Do an Arrow file's offsets and indices stay inside its data; Arrow itself follows them unseen.

    Text that is not UTF-8 passes where it is a column's own: that is for `strings` and `sound` to find.

    Raises:
        pa.ArrowInvalid: they do not.
    """
    if pa.types.is_dictionary(array.type):
        check_bounds(array.dictionary)
        array.indices.validate()
        bounds = pc.min_max(array.indices).as_py()  # of none, or nulls alone: None
        if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(array.dictionary):
            raise pa.ArrowInvalid("an index is beyond its dictionary")
        return
    types, kind = pa.types, array.type
    if kind in _AS_BYTES:
        array.view(_AS_BYTES[kind]).validate(full=True)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        empty = pa.large_list(pa.null()) if types.is_large_list(kind) else pa.list_(pa.null())
        inside = [pa.nulls(len(array.values))]
        own = pa.Array.from_buffers(empty, len(array), array.buffers()[:2], offset=array.offset, children=inside)
        own.validate(full=True)
        check_bounds(array.values)
    elif types.is_fixed_size_list(kind):
        check_bounds(array.values)
    elif types.is_struct(kind):
        for i in range(kind.num_fields):
            check_bounds(array.field(i))
    else:  # what values mean is not asked: a date64 that is no whole day goes through
        array.validate(full=not types.is_primitive(kind))


def sound(array: pa.Array) -> pa.Array:
    """A column with null for text that is not UTF-8, as line-based formats give it: parts must be readable."""
    is_dictionary = pa.types.is_dictionary(array.type)
    kind = array.type.value_type if is_dictionary else array.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        return array
    try:
        (array.dictionary if is_dictionary else array).validate(full=True)
        return array
    except pa.ArrowInvalid:
        return pa.array([value if isinstance(value, str) else None for value in strings(array)], pa.large_string())


def without_views(kind: pa.DataType) -> pa.DataType:
    """A type with its views of strings and bytes, as Polars writes them into Arrow files, as plain ones.

    pyarrow takes no rows of views and decodes no dictionary of them, but casts either.
    """
    types = pa.types
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, without_views(kind.value_type), kind.ordered)
    if types.is_map(kind):
        return pa.map_(_field_without_views(kind.key_field), _field_without_views(kind.item_field), kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct([_field_without_views(field) for field in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_field_without_views(kind.value_field), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_field_without_views(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_field_without_views(kind.value_field))
    return kind


def _field_without_views(field: pa.Field) -> pa.Field:
    return field.with_type(without_views(field.type))


def _decoded(value: bytes | None) -> Any:
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
