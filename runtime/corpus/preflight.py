"""What can be wrong with a job, found before any work: another job's folder, inputs in the way, no space."""

import fnmatch
import glob
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flashvec.runtime.corpus.manifest import ERRORS, MANIFESTS
from flashvec.runtime.corpus.plan import Plan, PlanError
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import LOCKS
from flashvec.runtime.corpus.sources import Source, glob_matches
from flashvec.runtime.corpus.storage import Storage, escaped, is_uri

LOCK_FILE = "_lock"
OWN_FILES = ("part-00000.parquet", "part-00000.ids.parquet", f"{ERRORS}/00000.jsonl")  # of a job, that inputs may be


def check_resumable(
    plan: Plan,
    settings: JobSettings,
    sources: Sequence[Source],
    arguments: dict[str, Any],
    reuse: str | None,
    mixed_machines: bool,
) -> None:
    """Refuse to go on with a job under other settings, inputs or another model.

    Raises:
        PlanError: names everything that differs.
    """
    if not settings.text_fields():
        settings = replace(settings, text_columns=plan.settings.text_columns)
    different = list(plan.settings.differences(settings))
    planned = {source.uri: source for source in plan.sources}
    now = {source.uri: source for source in sources}
    different += [f"{uri} is new" for uri in now if uri not in planned]
    different += [f"{uri} is gone" for uri in planned if uri not in now]
    different += [f"{uri} has changed" for uri in now if uri in planned and now[uri] != planned[uri]]
    if not different and tuple(sources) != plan.sources:
        different.append("the inputs come in another order")
    for name in sorted({*plan.model.load, *arguments}):
        if plan.model.load.get(name) != arguments.get(name):
            different.append(f"{name} was {plan.model.load.get(name)!r} and is {arguments.get(name)!r}")
    if plan.reuse != reuse:
        different.append(f"reuse was {plan.reuse!r} and is {reuse!r}")
    if plan.mixed_machines != mixed_machines:
        different.append(f"mixed_machines was {plan.mixed_machines} and is {mixed_machines}")
    if different:
        listed = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        raise PlanError(f"the folder holds another job: {listed}. Go on as it was begun, or give another folder")


def check_apart(given: Sequence[str | Path], sources: Sequence[Source], storage: Storage) -> None:
    """Refuse an output folder that holds inputs, or that an input folder would take its own parts from."""
    if storage.root is None:
        base = storage.location.split("?")[0].rstrip("/") + "/"
        within = [source.uri for source in sources if source.uri.startswith(base)]
        folders = {g: escaped(g).split("?")[0].rstrip("/") for g in map(str, given) if is_uri(g)}
        around = [g for g, folder in folders.items() if _would_take_uri(folder, base)]
    else:
        root = storage.root.resolve()
        within = [s.uri for s in sources if (p := _local_path(s.uri)) is not None and p.resolve().is_relative_to(root)]
        around = [str(g) for g in given if (p := _local_path(str(g))) is not None and _would_take(p, root)]
    if within:
        raise ValueError(f"out is {storage.location}, and the input {within[0]} lies in it: give a folder of its own")
    if around:
        raise ValueError(f"out is {storage.location}, inside the input {around[0]}: its parts would become inputs")


def _local_path(given: str) -> Path | None:
    if given.startswith("file://"):
        return Path(unquote(given.removeprefix("file://").split("?")[0]))
    return None if is_uri(given) else Path(given).expanduser()


def _would_take_uri(given: str, base: str) -> bool:
    """Does an input behind a URI, a folder or a glob, name files that a job writes below `base`?"""
    written = [(base + name).split("/") for name in OWN_FILES if not name.startswith("_")]  # those are never taken
    return base.startswith(given + "/") or any(glob_matches(parts, given.split("/")) for parts in written)


def _would_take(given: Path, out: Path) -> bool:
    """Does an input, a folder or a glob, name files that a job writes into `out`?"""
    if given.is_dir():
        return out.is_relative_to(given.resolve())
    fixed = Path(*itertools.takewhile(lambda part: "**" not in part, given.parts))
    if fixed != given:  # files of any depth below it
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        return out.is_relative_to(fixed.resolve())
    wanted = given.absolute().parts
    for name in OWN_FILES:
        written = (out / name).parts
        if len(written) == len(wanted) and all(map(fnmatch.fnmatchcase, written, wanted)):
            return True
    return False


def check_empty(storage: Storage) -> None:
    if storage.root is not None and storage.root.exists():
        names = {path.name for path in storage.root.iterdir()} - {LOCK_FILE, LOCKS, MANIFESTS, ERRORS}
        names = {name for name in names if not name.endswith(".tmp")}
    else:
        names = set(storage.names())
    if names:
        raise ValueError(f"out is {storage.location}, which holds other things ({min(names)}): give a new folder")


def check_space(plan: Plan, storage: Storage) -> None:
    """Refuse a job whose vectors the disk cannot hold."""
    if storage.root is None:
        return
    place = next(path for path in (storage.root, *storage.root.parents) if path.exists())
    status = os.statvfs(place)
    free, needed = status.f_bavail * status.f_frsize, plan.num_rows * plan.bytes_per_row()
    if needed > free:
        raise ValueError(
            f"out is {storage.location}: the vectors need about {needed:,} bytes and the disk has {free:,} free"
        )
