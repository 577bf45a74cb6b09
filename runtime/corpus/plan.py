"""A job, written down before work: `plan.json` names every input, every shard and everything that decides a bit.

It holds no time, no host and no text, so that the same job gives the same file.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from flashvec.runtime.corpus.cuts import Piece, Shard
from flashvec.runtime.corpus.settings import JobSettings, settings_from_dict
from flashvec.runtime.corpus.sources import COMPRESSIONS, FORMATS, Source
from flashvec.runtime.corpus.storage import Storage

PLAN_FILE = "plan.json"
VERSION = 1
MAX_PLAN_BYTES = 1 << 30
MAX_DIM = 1 << 24  # of a vector; far above every model there is
MAX_FP32 = 3.4e38


class PlanError(ValueError):
    """A folder whose job is another one, or a plan that cannot be read."""


@dataclass(frozen=True)
class ModelFacts:
    """Which model makes the vectors, and where.

    Attributes:
        load: arguments of `Encoder.load`.
        dim: dimensions of a vector before `dims` cuts it.
        weights, tokenizer, spec: digests of what was loaded.
        machine: what decides the last bits: device, GPU, instruction set, threads, dtype, versions.
    """

    load: dict[str, Any]
    dim: int
    weights: str
    tokenizer: str
    spec: str
    machine: dict[str, Any]

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `Encoder.load` for the same weights elsewhere: in the dtype they had, which a device decides."""
        return {**self.load, "dtype": self.load.get("dtype") or self.machine.get("dtype")}

    def differences(self, now: "ModelFacts") -> Iterator[str]:
        """One sentence for each fact that is not the same."""
        for name in ("weights", "tokenizer", "spec", "dim"):
            was, found = getattr(self, name), getattr(now, name)
            if was != found:
                yield f"the model's {name} was {was} and is {found}"

    def machine_differences(self, machine: Mapping[str, Any]) -> Iterator[str]:
        """One sentence for each property of the machine that is not the same."""
        for name in sorted({*self.machine, *machine}):
            was, found = self.machine.get(name), machine.get(name)
            if was != found:
                yield f"the machine's {name} was {was} and is {found}"


@dataclass(frozen=True)
class Plan:
    """A corpus job.

    Attributes:
        sources: input files, in order.
        shards: what each output part is made of.
        columns: types of `id` and of the passthrough columns.
        int8_ranges: per dimension minimum and maximum, where precision is int8.
        reuse: location of a job whose vectors are taken over where text and model are the same.
        mixed_machines: other machines may work on it; each shard's manifest then says which did.
    """

    settings: JobSettings
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    columns: pa.Schema
    model: ModelFacts
    int8_ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    reuse: str | None = None
    mixed_machines: bool = False

    @property
    def dim(self) -> int:
        """Dimensions of a vector as it is written, before signs are packed."""
        return min(self.model.dim, self.settings.dims or self.model.dim)

    @property
    def num_rows(self) -> int:
        """Rows of all inputs; an estimate where lines were not counted."""
        return sum(shard.num_rows for shard in self.shards)

    def vector_type(self) -> pa.DataType:
        """FixedSizeList of a vector's values."""
        kinds = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
        width = self.dim // 8 if self.settings.precision == "binary" else self.dim
        return pa.list_(kinds[self.settings.precision], width)

    def bytes_per_row(self) -> int:
        """Bytes of a vector and its identity."""
        kind = self.vector_type()
        return int(kind.list_size * kind.value_type.bit_width // 8) + 32

    def to_json(self) -> bytes:
        """The content of `plan.json`."""
        values = {
            "version": VERSION,
            "settings": self.settings.to_dict(),
            "model": asdict(self.model),
            "columns": base64.b64encode(self.columns.serialize()).decode(),
            "int8_ranges": self.int8_ranges,
            "reuse": self.reuse,
            "mixed_machines": self.mixed_machines,
            "sources": [source.to_dict() for source in self.sources],
            "shards": [{"rows": shard.num_rows, "pieces": shard.pieces} for shard in self.shards],
        }
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def check_same(plan: Plan, now: ModelFacts) -> None:
    """Refuse to go on with another model, or on another kind of machine unless the plan allows it.

    Raises:
        PlanError: names what differs.
    """
    different = list(plan.model.differences(now))
    if not plan.mixed_machines:
        different += list(plan.model.machine_differences(now.machine))
    if different:
        raise PlanError(
            f"this job was planned for other vectors: {'; '.join(different)}. Go on as planned, or start a job in "
            "another folder (allow other machines with mixed_machines when it is planned)"
        )


def read_plan(storage: Storage) -> Plan | None:
    """The plan of a job's folder; None where there is none.

    Raises:
        PlanError: not a plan of this version.
    """
    content = storage.read(PLAN_FILE, MAX_PLAN_BYTES)
    if content is None:
        return None
    try:
        values = json.loads(content)
        if values["version"] != VERSION:
            raise ValueError(f"is of version {values['version']}, this package reads {VERSION}")
        ranges = values["int8_ranges"]
        plan = Plan(
            settings=settings_from_dict(values["settings"]),
            sources=tuple(Source(**source) for source in values["sources"]),
            shards=tuple(Shard([Piece(*p) for p in shard["pieces"]], shard["rows"]) for shard in values["shards"]),
            columns=pa.ipc.read_schema(pa.BufferReader(base64.b64decode(values["columns"]))),
            model=ModelFacts(**values["model"]),
            int8_ranges=None if ranges is None else (tuple(ranges[0]), tuple(ranges[1])),
            reuse=values["reuse"],
            mixed_machines=values["mixed_machines"],
        )
        _check(plan)
        return plan
    except (ValueError, LookupError, TypeError, RecursionError, pa.ArrowException) as error:
        raise PlanError(f"{storage.location}/{PLAN_FILE}: not a plan that can be read ({error})") from None


def _check(plan: Plan) -> None:
    """What a file states, before anything is opened or sized by it."""
    for source in plan.sources:
        known = source.format in FORMATS.values() and source.compression in (None, *COMPRESSIONS.values())
        if not known or not isinstance(source.uri, str) or not _are_whole(source.size, abs(source.mtime_ns)):
            raise ValueError(f"its source {source.uri!r:.80} is not described as one")
    for shard in plan.shards:
        if not _are_whole(shard.num_rows) or not all(_are_whole(*piece) for piece in shard.pieces):
            raise ValueError("a shard's rows are no numbers")
        if any(piece.file >= len(plan.sources) for piece in shard.pieces):
            raise ValueError("a shard is of a file that it does not name")
    model = plan.model
    if not isinstance(model.load, dict) or not isinstance(model.machine, dict):
        raise ValueError("its model is not described as one")
    if not _are_whole(model.dim) or model.dim > MAX_DIM or not isinstance(plan.reuse, str | None):
        raise ValueError(f"its model's vectors have {model.dim!r:.80} dimensions, or reuse is no place")
    if (plan.int8_ranges is None) == (plan.settings.precision == "int8"):
        raise ValueError(f"int8_ranges do not belong to precision {plan.settings.precision!r}")
    for bounds in plan.int8_ranges or ():
        if not all(isinstance(bound, float | int) and abs(bound) <= MAX_FP32 for bound in bounds):
            raise ValueError("int8_ranges hold what is no number")


def _are_whole(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
