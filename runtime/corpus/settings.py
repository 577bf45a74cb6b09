"""What a corpus job does with each row: everything here decides bytes of the output and is part of the plan."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMATS = ("parquet", "npy")
PRECISIONS = ("float32", "float16", "int8", "binary")
LONG = ("truncate", "chunk")
CHUNKS = ("mean", "rows")
SHARD_SIZE = 32_768  # rows: 75 MB of fp32 vectors at 576 dimensions, a few minutes of work lost at worst
RESERVED = ("file", "row", "chunk", "hash", "vector")  # columns that a part has of its own

_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class JobSettings:
    """How rows become vectors.

    Attributes:
        text_columns: the column that is embedded; none: `text`, or the only text column there is. Those of a template
            are its own.
        text_template: several columns in one text, as "{title}\\n{body}".
        id_column: written beside each vector; from JSON lines and CSV as text, from tables in its own type.
        columns: further columns written beside each vector, likewise.
        instruction, prompt_name, max_length, normalize: as in `Encoder.embed`.
        long: "truncate" cuts a text of more than `max_length` tokens, "chunk" splits it into overlapping ones.
        chunks: "mean" gives a split text the mean of its chunks, "rows" gives each chunk a row.
        dims: keep the leading dimensions.
        precision: float32, float16, int8 (ranges measured once a job) or binary.
        shard_size: rows of a shard, the unit of work and of output.
        dedupe: encode a text that comes again in a shard once.
        format: parquet, or npy with a Parquet file of ids beside each.
    """

    text_columns: tuple[str, ...] = ()
    text_template: str | None = None
    id_column: str | None = None
    columns: tuple[str, ...] = ()
    instruction: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    long: str = "truncate"
    chunks: str = "mean"
    dims: int | None = None
    precision: str = "float32"
    normalize: bool | None = None
    shard_size: int = SHARD_SIZE
    dedupe: bool = True
    format: str = "parquet"

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("long", self.long, LONG)
        _one_of("chunks", self.chunks, CHUNKS)
        for name in ("text_columns", "columns"):
            if isinstance(given := getattr(self, name), str):
                raise ValueError(f"{name} is {given!r}; give a tuple of names: ({given!r},)")
            if not isinstance(given, list | tuple):
                raise ValueError(f"{name} is {given!r}; give a tuple of names")
            object.__setattr__(self, name, tuple(given))  # as a plan gives them back
            if other := [value for value in given if not isinstance(value, str)]:
                raise ValueError(f"{name} holds {other[0]!r:.80}; give names")
        for name in ("text_template", "id_column", "instruction", "prompt_name"):
            if not isinstance(given := getattr(self, name), str | None):
                raise ValueError(f"{name} is {given!r:.80}; expected a text or None")
        for name in ("shard_size", "max_length", "dims"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name, known in (("normalize", (True, False, None)), ("dedupe", (True, False))):
            if not any(getattr(self, name) is value for value in known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        if self.chunks == "rows" and self.long != "chunk":
            raise ValueError("chunks='rows' needs long='chunk': without it there are no chunks")
        if self.instruction is not None and self.prompt_name is not None:
            raise ValueError("give instruction or prompt_name, not both")
        if self.text_template is not None and self.text_columns:
            raise ValueError("give text_columns or text_template, not both: a template names its columns")
        if self.text_template is not None and not _FIELD.search(self.text_template):
            raise ValueError(f"text_template is {self.text_template!r} and names no column, as {{title}} does")
        if self.text_template is not None and set("{}") & set(_FIELD.sub("", self.text_template)):
            raise ValueError(f"text_template is {self.text_template!r} and has a brace that belongs to no column")
        if len(self.text_columns) > 1:
            names = " ".join("{" + name + "}" for name in self.text_columns)
            raise ValueError(f"text_columns names several: say how they are joined, as in text_template={names!r}")
        if twice := [name for name in self.columns if self.columns.count(name) > 1]:
            raise ValueError(f"columns names {twice[0]!r} twice")
        if taken := [name for name in self.columns if name in RESERVED or name == "id"]:
            cure = "name it as id_column (--id-column)" if taken[0] == "id" else "rename it in the input, or leave it"
            raise ValueError(f"columns has {taken[0]!r}, which a part has of its own: {cure}")

    def text_fields(self) -> tuple[str, ...]:
        """Columns that make a text; empty where the input decides."""
        if self.text_template is not None:
            return tuple(dict.fromkeys(_FIELD.findall(self.text_template)))
        return self.text_columns

    def join(self, values: Mapping[str, str]) -> str:
        """One row's text from its columns."""
        if self.text_template is None:
            (text,) = values.values()
            return text
        return _FIELD.sub(lambda field: values[field[1]], self.text_template)

    def differences(self, other: "JobSettings") -> Iterator[str]:
        """One sentence for each setting that is not the same."""
        for field in fields(self):
            was, now = getattr(self, field.name), getattr(other, field.name)
            if was != now:
                yield f"{field.name} was {was!r} and is {now!r}"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, JSON-ready."""
        return asdict(self)


def settings_from_dict(values: Mapping[str, Any]) -> JobSettings:
    """Inverse of `JobSettings.to_dict`.

    Raises:
        ValueError: an unknown key or a value that no setting has.
    """
    known = {field.name for field in fields(JobSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"settings have the unknown key {unknown[0]!r}: the plan is of another version")
    lists = {name: tuple(values[name]) for name in ("text_columns", "columns") if name in values}
    return JobSettings(**{**values, **lists})


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, known are {', '.join(known)}")
