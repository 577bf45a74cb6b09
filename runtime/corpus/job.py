"""`embed_corpus`: files in, vectors out, resumable and exact.

Plan, deal out shards, sum up. Everything is decided from what lies in the job's folder, so that a job that was killed
anywhere goes on with the same command.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flashvec.runtime.corpus.cuts import cut
from flashvec.runtime.corpus.inspect import check_unique_ids, inspect_sources, resolve_columns
from flashvec.runtime.corpus.local import ErrorBudget, Event, LocalFleet
from flashvec.runtime.corpus.manifest import (
    ERRORS,
    MANIFESTS,
    SUCCESS_FILE,
    Entry,
    FileFacts,
    is_done,
    success_json,
)
from flashvec.runtime.corpus.plan import PLAN_FILE, ModelFacts, Plan, PlanError, check_same, read_plan
from flashvec.runtime.corpus.preflight import LOCK_FILE, check_apart, check_empty, check_resumable, check_space
from flashvec.runtime.corpus.reporter import counted
from flashvec.runtime.corpus.sample import sample_texts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import LOCKS, ShardInUse, TooManyErrors, open_lock, too_many
from flashvec.runtime.corpus.sources import Source, find_sources
from flashvec.runtime.corpus.storage import Storage, is_uri
from flashvec.runtime.texts import check_truth, check_whole

MAX_ERRORS = 1000  # rows
CALIBRATION_TEXTS = 1024
PLACEHOLDER_FACTS = ModelFacts({}, 1, "", "", "", {})


class Interrupted(RuntimeError):
    """The job was stopped by a person or the system; the message says how far it is."""


class Fleet(Protocol):
    """Where shards are run."""

    notes: list[str]

    def __enter__(self) -> "Fleet": ...
    def __exit__(self, *error: object) -> None: ...
    def facts(self) -> ModelFacts: ...
    def ask(self, question: str, texts: list[str], settings: JobSettings) -> Event: ...
    def run(self, job: str, shards: Sequence[int], errors_left: ErrorBudget) -> Iterator[Event]: ...


@dataclass(frozen=True)
class Result:
    """What a job came to.

    Attributes:
        shards: finished ones, of `planned`.
        set_aside: shards that killed their worker too often; the job is not complete then.
    """

    shards: int
    planned: int
    rows: int
    errors: int
    duplicates: int
    reused: int
    truncated: int  # texts cut to max_length
    bytes: int
    set_aside: tuple[int, ...] = ()
    changes: tuple[int, int, int] | None = None  # rows added, edited, deleted since the reused job


def embed_corpus(
    inputs: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    model: str | Path,
    settings: JobSettings | None = None,
    load: dict[str, Any] | None = None,
    devices: Sequence[str | None] = (None,),
    max_errors: int | None = MAX_ERRORS,
    unique_ids: bool = False,
    reuse: str | Path | None = None,
    mixed_machines: bool = False,
    plan_only: bool = False,
    engine: str = "local",
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    fleet: Callable[[dict[str, Any]], Fleet] | None = None,
) -> Result:
    """Embed files into a folder; run again after whatever stopped it, it goes on where it was.

    Args:
        inputs: files, folders, globs or URIs: Parquet, Arrow, JSON lines, CSV, TSV, text; the last four also compressed
            (.gz, .zst, .bz2).
        out: a folder that is new, empty, or holds this very job; may be a URI.
        model: as for `Encoder.load`.
        settings: columns, prompt, precision, shard size and so on.
        load: further arguments of `Encoder.load`.
        devices: one worker process for each; None stands for the default device.
        max_errors: rows without a vector (null, empty, broken) beyond which the job stops; None: any number.
        unique_ids: refuse ids that come twice, before work.
        reuse: folder of a finished job; rows with the same text take their vectors from it.
        mixed_machines: let machines of other kinds work on the job, at the price of equal bits.
        plan_only: write the plan and stop: `flashvec embed-shard` then runs shards anywhere, and the same call without
            this completes the job.
        engine: "local", or "ray" for the Ray cluster at `address`.
        on_event: told what happens, as plain values.
        fleet: makes the workers, instead of `engine`.

    Returns:
        Sums over all shards.

    Raises:
        TypeError, ValueError: an argument, the inputs or the folder; nothing was written then.
        PlanError: the folder holds another job; names what differs.
        WorkerError: what stopped the job; finished shards are kept.
    """
    settings = JobSettings() if settings is None else settings
    if not isinstance(settings, JobSettings):
        raise TypeError(f"settings is {type(settings).__name__}: give JobSettings(...)")
    if isinstance(devices, str) or not devices:  # without a worker nothing would ever be done
        raise ValueError(f"devices is {devices!r}; give a list of one for each worker, as ['cpu']")
    for name, value in (("unique_ids", unique_ids), ("mixed_machines", mixed_machines), ("plan_only", plan_only)):
        check_truth(name, value)
    if max_errors is not None:
        check_whole("max_errors", max_errors)
    if max_errors is not None and max_errors < 0:
        raise ValueError(f"max_errors is {max_errors}; expected at least 0, or None for any number")
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    notes: list[str] = []
    sources = find_sources(given, notes.append)
    location = str(out) if is_uri(str(out)) else str(Path(out).expanduser().absolute())
    storage = Storage(location)
    check_apart(given, sources, storage)
    if "device" in (load or {}):
        raise ValueError("load holds a device: name it in devices, one for each worker")
    arguments = {**(load or {}), "model": _full_path(model)}
    if adapters := arguments.get("adapters"):
        arguments["adapters"] = [_full_path(a) for a in ([adapters] if isinstance(adapters, str | Path) else adapters)]
    arguments = json.loads(json.dumps(arguments, default=_written))  # as the plan gives them back
    make_fleet = fleet or _engine(engine, address, devices)
    with _lock(storage):
        storage.sweep("", {PLAN_FILE, SUCCESS_FILE}.__contains__)  # shards sweep their own
        plan = read_plan(storage)
        if plan is not None:
            again = None if reuse is None else _location(reuse)
            check_resumable(plan, settings, sources, arguments, again, mixed_machines)
            arguments |= plan.model.loading
            if unique_ids:
                spans = ((piece.file, piece.start, piece.stop) for shard in plan.shards for piece in shard.pieces)
                check_unique_ids(plan.settings, plan.sources, spans)
        else:
            check_empty(storage)
            plan = draft_plan(sources, settings, arguments, unique_ids, reuse, mixed_machines, note=notes.append)
            check_space(plan, storage)
        entries = {i: entry for i in range(len(plan.shards)) if (entry := _done(storage, plan, i)) is not None}
        set_aside: list[int] = []
        if len(entries) < len(plan.shards):
            storage.remove(SUCCESS_FILE)  # of a job that has lost a part since
            on_event({"event": "plan", "shards": len(plan.shards), "rows": plan.num_rows, "done": len(entries)})
            try:
                with ExitStack() as stack:
                    stack.enter_context(terminable())
                    workers = stack.enter_context(make_fleet(arguments))
                    facts = workers.facts()
                    for note in (*notes, *workers.notes):
                        on_event({"event": "note", "text": note})
                    plan = _settle(plan, facts, workers, storage)
                    on_event({"event": "ready", "rows_done": sum(e.rows_read for e in entries.values())})
                    if plan_only:
                        return _result(plan, storage, [entries[i] for i in sorted(entries)], ())
                    _run(plan, location, workers, entries, set_aside, max_errors, on_event)
            except KeyboardInterrupt:  # also while the model loads
                done = f"{len(entries)} of {counted(len(plan.shards), 'shard')} finished"
                raise Interrupted(f"stopped: {done}; the same command goes on from there") from None
        ordered = [entries[i] for i in sorted(entries)]
        errors = sum(entry.errors for entry in ordered)
        if max_errors is not None and errors > max_errors:  # of shards that ran at the same time, or elsewhere
            raise TooManyErrors(too_many({"in all": errors}, max_errors))
        if not set_aside:
            if storage.read(SUCCESS_FILE) != success_json(ordered):
                storage.write(SUCCESS_FILE, success_json(ordered))
            _drop_locks(storage)
        return _result(plan, storage, ordered, tuple(set_aside))


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, on the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def draft_plan(
    sources: Sequence[Source],
    settings: JobSettings,
    arguments: dict[str, Any],
    unique_ids: bool = False,
    reuse: str | Path | None = None,
    mixed_machines: bool = False,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Plan:
    """A plan that lacks the facts that only a loaded model knows.

    Args:
        note: told which column was taken for the text, where nothing but its being alone says so.
    """
    inspected = inspect_sources(sources)
    given = settings.text_fields()
    settings, columns = resolve_columns(settings, sources, inspected)
    if not given and settings.text_columns != ("text",):  # a CSV file without a header loses its first row so
        note(f"the text is the column {settings.text_columns[0]!r}, the only one of text; --text-column names another")
    shards = cut(sources, inspected, settings.shard_size)
    if unique_ids:
        check_unique_ids(settings, sources, (piece for shard in shards for piece in shard.pieces))
    return Plan(
        settings=settings,
        sources=tuple(sources),
        shards=tuple(shards),
        columns=columns,
        model=replace(PLACEHOLDER_FACTS, load=arguments),
        reuse=None if reuse is None else _location(reuse),
        mixed_machines=mixed_machines,
    )


def _settle(plan: Plan, facts: ModelFacts, workers: Fleet, storage: Storage) -> Plan:
    """Complete and write a new plan; check an old one against the model that was loaded."""
    if read_plan(storage) is not None:
        check_same(plan, facts)
        return plan
    plan = replace(plan, model=replace(facts, load=plan.model.load))
    if plan.settings.dims is not None and plan.settings.dims > facts.dim:
        raise ValueError(f"dims is {plan.settings.dims}, the model's vectors have {facts.dim}")
    if plan.settings.precision == "binary" and plan.dim % 8:
        raise ValueError(f"precision 'binary' packs 8 dimensions to a byte; {plan.dim} is no multiple of 8")
    # What the model refuses (a prompt's name, a length) is told before there is a folder that can never go on.
    workers.ask("speed", ["text"], plan.settings)
    if plan.reuse is not None:
        from flashvec.runtime.corpus.reuse import earlier_plan

        plan = replace(plan, int8_ranges=earlier_plan(plan.reuse, plan.settings, plan.model).int8_ranges)
    elif plan.settings.precision == "int8":
        texts = sample_texts(plan, CALIBRATION_TEXTS)
        if len(texts) < 2:
            raise ValueError("precision 'int8' measures ranges on a sample, and the inputs have fewer than two texts")
        low, high = workers.ask("ranges", texts, plan.settings)["ranges"]
        plan = replace(plan, int8_ranges=(tuple(low), tuple(high)))
    check_space(plan, storage)
    storage.make(MANIFESTS, ERRORS, LOCKS)
    storage.write(PLAN_FILE, plan.to_json())
    return plan


def _run(
    plan: Plan,
    location: str,
    workers: Fleet,
    entries: dict[int, Entry],
    set_aside: list[int],
    max_errors: int | None,
    on_event: Callable[[Event], None],
) -> None:
    budget = ErrorBudget(max_errors, sum(entry.errors for entry in entries.values()))
    todo = [i for i in range(len(plan.shards)) if i not in entries]
    for event in workers.run(location, todo, budget):
        if event["event"] == "done":
            values = event["entry"]
            entry = Entry(**{**values, "files": tuple(FileFacts(**facts) for facts in values["files"])})
            entries[entry.shard] = entry
            budget.used += entry.errors
            size = sum(facts.bytes for facts in entry.files)
            done = {"event": "done", "shard": entry.shard, "rows": entry.rows, "errors": entry.errors, "bytes": size}
            on_event({**done, "read": entry.rows_read})
            if max_errors is not None and budget.used > max_errors:
                raise TooManyErrors(too_many({"in all": budget.used}, max_errors))
        else:
            if event["event"] == "set_aside":
                set_aside.append(event["shard"])
            on_event(event)


def _done(storage: Storage, plan: Plan, shard: int) -> Entry | None:
    """A finished shard's manifest; never asks for one where the plan is not written yet."""
    return None if plan.model.weights == "" else is_done(storage, shard)


def _result(plan: Plan, storage: Storage, entries: list[Entry], set_aside: tuple[int, ...]) -> Result:
    changes = None
    if plan.reuse is not None and len(entries) == len(plan.shards):
        from flashvec.runtime.corpus.reuse import find_changes

        with suppress(PlanError, OSError):  # the earlier job is gone, or is being made anew
            changes = find_changes(Storage(plan.reuse), storage)
    return Result(
        shards=len(entries),
        planned=len(plan.shards),
        rows=sum(entry.rows for entry in entries),
        errors=sum(entry.errors for entry in entries),
        duplicates=sum(entry.duplicates for entry in entries),
        reused=sum(entry.reused for entry in entries),
        truncated=sum(entry.truncated for entry in entries),
        bytes=sum(facts.bytes for entry in entries for facts in entry.files),
        set_aside=set_aside,
        changes=changes,
    )


def _engine(name: str, address: str | None, devices: Sequence[str | None]) -> Callable[[dict[str, Any]], Fleet]:
    if name == "local":
        if address is not None:
            raise ValueError("address is for engine='ray'")
        return lambda load: LocalFleet(load, devices)
    if name == "ray":
        from flashvec.runtime.corpus.ray import RayFleet

        return lambda load: RayFleet(load, address, num_workers=len(devices))
    raise ValueError(f"engine is {name!r}, known are local and ray")


def _written(value: Any) -> str:
    """An argument of loading that JSON does not hold, as JSON: a torch.dtype by its name."""
    name = str(value)
    if not name.startswith("torch."):
        raise TypeError(f"load holds {value!r}, which cannot be written into a plan")
    return name.removeprefix("torch.")


def _full_path(name: str | Path) -> str:
    """A local model or adapter by its full path: the job may go on from another folder."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else str(name)


def _location(folder: str | Path) -> str:
    return str(folder) if is_uri(str(folder)) else str(Path(folder).expanduser().absolute())


@contextmanager
def _lock(storage: Storage) -> Iterator[None]:
    """Be the only supervisor of a local folder; the lock ends with the process."""
    if storage.root is None:
        yield
        return
    made = not storage.root.exists()
    storage.make()
    try:
        with open_lock(storage.root / LOCK_FILE, 0.0, f"{storage.location}: another job is running there"):
            yield
    except ShardInUse as error:
        raise ValueError(str(error)) from None
    finally:
        if made and not (storage.root / PLAN_FILE).exists():
            _drop_locks(storage)
            _drop_if_empty(storage.root)


def _drop_locks(storage: Storage) -> None:
    if storage.root is None:
        return
    locks = storage.root / LOCKS
    for path in [*(locks.iterdir() if locks.is_dir() else ()), storage.root / LOCK_FILE]:
        path.unlink(missing_ok=True)
    if locks.is_dir():
        _drop_if_empty(locks)


def _drop_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else put something there
        folder.rmdir()
