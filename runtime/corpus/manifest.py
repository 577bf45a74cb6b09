"""What a finished shard leaves behind, and what makes a job complete.

`_manifest/00000.json` says of part 0 how many rows it has, how many rows of the input had no vector, and of each of its
files the bytes and their xxh3. It is written last: a shard with a manifest is done, one without is not.
`_SUCCESS` is written when all are done, with the sums and the xxh3 of all manifests in order.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from flashvec.runtime.corpus.plan import Plan, read_plan
from flashvec.runtime.corpus.storage import Storage, digest

MANIFESTS, ERRORS, SUCCESS_FILE = "_manifest", "_errors", "_SUCCESS"
MAX_MANIFEST_BYTES = 1 << 20
COUNTS = ("rows_read", "rows", "errors", "duplicates", "reused", "truncated")
PARTS = ("part-{:05d}.parquet", "part-{:05d}.npy", "part-{:05d}.ids.parquet")


@dataclass(frozen=True)
class FileFacts:
    """One file of a shard."""

    name: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Entry:
    """The manifest of one shard.

    Attributes:
        rows_read: rows of the input; `rows` plus `errors`, or more rows where chunks have rows of their own.
        rows: rows of the part.
        errors: rows of the input without a vector, listed in `_errors/`.
        duplicates: rows whose text came before in this shard.
        reused: rows whose vector was taken from an earlier job.
        truncated: rows whose text was cut.
        vectors_xxh3: of the part's vectors in order, whatever the file format.
        machine: only where machines may be mixed.
    """

    shard: int
    rows_read: int
    rows: int
    errors: int
    duplicates: int
    reused: int
    truncated: int
    vectors_xxh3: str
    files: tuple[FileFacts, ...] = ()
    machine: dict[str, Any] | None = None

    def to_json(self) -> bytes:
        """The content of the manifest file."""
        values = asdict(self)
        if self.machine is None:
            del values["machine"]
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


@dataclass
class Check:
    """What `check_job` found; complete where there are no problems."""

    num_shards: int
    num_done: int = 0
    rows: int = 0
    errors: int = 0
    problems: list[str] = field(default_factory=list)


def manifest_name(shard: int) -> str:
    return f"{MANIFESTS}/{shard:05d}.json"


def errors_name(shard: int) -> str:
    return f"{ERRORS}/{shard:05d}.jsonl"


def read_entry(storage: Storage, shard: int) -> Entry | None:
    """A shard's manifest; None where the shard is not done.

    Raises:
        ValueError: a manifest that cannot be read.
    """
    content = storage.read(manifest_name(shard), MAX_MANIFEST_BYTES)
    if content is None:
        return None
    try:
        values = json.loads(content)
        entry = Entry(**{**values, "files": tuple(FileFacts(**facts) for facts in values["files"])})
        _check_entry(entry, shard)
        return entry
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{storage.location}/{manifest_name(shard)}: cannot be read ({error}); delete it to have the shard redone"
        ) from None


def _check_entry(entry: Entry, shard: int) -> None:
    """A manifest is a file like any other: its counts are numbers, and its files the shard's own."""
    if entry.shard != shard:
        raise ValueError(f"it is that of shard {entry.shard!r}")
    for name in COUNTS:
        if type(count := getattr(entry, name)) is not int or count < 0:
            raise ValueError(f"{name} is {count!r:.80}")
    parts = [name.format(shard) for name in PARTS]
    for facts in entry.files:
        if facts.name not in (*parts, errors_name(shard)):
            raise ValueError(f"it names {facts.name!r:.80}, which is no file of this shard")
        if type(facts.bytes) is not int or not isinstance(facts.xxh3, str):
            raise ValueError(f"it says {facts.bytes!r:.80} bytes and xxh3 {facts.xxh3!r:.80} of {facts.name}")
    if not any(facts.name in parts for facts in entry.files):
        raise ValueError("it names no part")


def is_done(storage: Storage, shard: int) -> Entry | None:
    """A shard's manifest if its files are there with the bytes it says."""
    entry = read_entry(storage, shard)
    if entry is None or any(storage.size(facts.name) != facts.bytes for facts in entry.files):
        return None
    return entry


def success_json(entries: list[Entry]) -> bytes:
    """The content of `_SUCCESS`."""
    together = xxhash.xxh3_64()
    for entry in entries:
        together.update(entry.to_json())
    sums = {name: sum(getattr(e, name) for e in entries) for name in ("rows_read", "rows", "errors")}
    return (json.dumps({"shards": len(entries), **sums, "manifests_xxh3": together.hexdigest()}) + "\n").encode()


def check_job(storage: Storage) -> Check:
    """Read every manifest and every file of a job, and compare.

    Raises:
        ValueError: no job there.
    """
    plan = read_plan(storage)
    if plan is None:
        raise ValueError(f"{storage.location}: no plan.json there, so no job to check")
    check = Check(len(plan.shards))
    entries = []
    for shard in range(len(plan.shards)):
        try:
            entry = read_entry(storage, shard)
        except ValueError as error:
            check.problems.append(str(error))
            continue
        if entry is None:
            check.problems.append(f"shard {shard} is not done")
            continue
        problems = list(_file_problems(storage, plan, entry))
        check.problems += problems
        check.num_done += not problems
        check.rows, check.errors = check.rows + entry.rows, check.errors + entry.errors
        entries.append(entry)
    if not check.problems:
        success = storage.read(SUCCESS_FILE, MAX_MANIFEST_BYTES)
        if success is None:
            check.problems.append(f"{SUCCESS_FILE} is missing: run the job's command again to finish it")
        elif success != success_json(entries):
            check.problems.append(f"{SUCCESS_FILE} does not agree with the manifests")
    return check


def _file_problems(storage: Storage, plan: Plan, entry: Entry) -> Iterator[str]:
    if plan.settings.chunks == "mean" and entry.rows + entry.errors != entry.rows_read:
        yield f"shard {entry.shard}: {entry.rows} rows and {entry.errors} errors are not {entry.rows_read} rows"
    for facts in entry.files:
        size = storage.size(facts.name)
        if size is None:
            yield f"{facts.name} is missing"
        elif size != facts.bytes:
            yield f"{facts.name} has {size} bytes, its manifest says {facts.bytes}"
        else:
            with storage.open(facts.name) as file:
                if digest(file) != facts.xxh3:
                    yield (
                        f"{facts.name} is not what was written: its xxh3 differs from its manifest; "
                        "delete it and run the job again"
                    )
