"""Rows of `bench/results/`, and which of them may stand side by side: those of one machine, one torch and one run."""

import json
from typing import Any

from flashvec.bench.timing import RESULTS

MACHINE = ("cpu", "instructions", "cores", "threads")
WHITENED = ", whitened"  # ends the name of a judged collection that was searched by whitened vectors
NOT_INSTALLED = "not installed (make peers)"  # what such a peer's row says in "failed"

Row = dict[str, Any]


def read_rows(benchmark: str) -> list[Row]:
    """All rows of one benchmark, oldest first."""
    rows = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row for row in rows if row["benchmark"] == benchmark]


def groups(rows: list[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in `keys`, in the order in which each group first appears."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def comparable(rows: list[Row], *keys: str) -> list[list[Row]]:
    """Rows that may share a table: of one machine, agreeing in `keys`, and of the torch last used there."""
    return [[row for row in group if row["torch"] == group[-1]["torch"]] for group in groups(rows, *MACHINE, *keys)]


def runs(rows: list[Row]) -> list[list[Row]]:
    """Rows of one run each, oldest first; those from before runs had names, by commit and day."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["run"],) if "run" in row else (row["commit"], row["date"]), []).append(row)
    return list(found.values())


def fullest_run(rows: list[Row]) -> list[Row]:
    """The newest row of each variant in the one run that tried the most variants, and of equals in the newest one.

    So a later run of ours alone, or beside a few peers, neither stands beside numbers that were not taken in turn with
    its own nor drives them out. What was not installed was not tried.
    """
    newest = [list({row["variant"]: row for row in run}.values()) for run in runs(rows)]
    return max(reversed(newest), key=lambda run: sum(row.get("failed") != NOT_INSTALLED for row in run))


def where(rows: list[Row]) -> str:
    """The machine, the torch, the commits and the newest day of rows that share a table."""
    last = rows[-1]
    threads = "" if last["threads"] == last["cores"] else f", {last['threads']} thread{'s' * (last['threads'] > 1)}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{last['cores']} cores of {last['cpu']} ({last['instructions']}{threads}), torch {last['torch']},\n"
        f"commits {commits}, {max(row['date'] for row in rows)}"
    )
