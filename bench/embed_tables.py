"""Tables of `bench_embed`'s rows: a column for each length profile and cut, each column of one run.

Only what took turns on the same texts stands in one column (`fullest_run` says which run that is); texts cut at
another number of tokens are another column. Columns of one table may be of different runs, whose commits it names.
"""

from collections.abc import Callable
from textwrap import shorten
from typing import Any

from flashvec.bench.rows import comparable, fullest_run, read_rows, where

PROFILE_ORDER = ("queries", "sentences", "passages", "pages", "long tail")
README_PROFILES = PROFILE_ORDER[:3]
LONGEST_REASON = 110  # characters of what a library failed with; its row has more
OWN_LENGTH = 512  # tokens at which the demo's model cuts texts; so did all rows from before rows said it

Row = dict[str, Any]
Column = tuple[int, int]


def column_of(row: Row) -> Column:
    """The place of its profile, and the tokens at which its texts were cut."""
    return PROFILE_ORDER.index(row["profile"]), row.get("max_length", OWN_LENGTH)


def column_name(column: Column) -> str:
    """Its profile, and where texts were cut unless that is usual."""
    place, cut = column
    return PROFILE_ORDER[place] + (f" to {cut:,}" if cut != OWN_LENGTH else "")


def in_columns(rows: list[Row]) -> list[Row]:
    """Those rows, of one machine and model, that its table shows; failures among them."""
    found: dict[Column, list[Row]] = {}
    for row in rows:
        found.setdefault(column_of(row), []).append(row)
    return [row for column in found.values() for row in fullest_run(column)]


def embed_table(rows: list[Row]) -> list[str]:
    """Tokens per second by length profile, with the share of the ceiling; a table for each model and machine."""
    lines: list[str] = []
    for group in comparable(rows, "model"):
        shown = in_columns(group)
        if not (timed := [row for row in shown if "failed" not in row]):
            continue
        cell = lambda row: f"{row['tokens_per_s']:,} ({row['share_of_ceiling']:.0%})"  # noqa: E731
        lines += [*_by_column("tokens/s (share of ceiling)", timed, cell), ""]
        repetitions = " or ".join(str(n) for n in sorted({row["repetitions"] for row in timed}))
        last = f"{group[-1]['model']} on {where(timed)}; medians of {repetitions} interleaved repetitions."
        lines += [*last.splitlines(), "", *_did_not_run(shown)]
    return lines[:-1]


def embed_memory_table(rows: list[Row]) -> list[str]:
    """Peak memory by length profile, of the rows of `embed_table` that have it."""
    lines: list[str] = []
    for group in comparable(rows, "model"):
        if not (shown := [row for row in in_columns(group) if "peak_mib" in row]):
            continue
        lines += [*_by_column("MiB at most", shown, lambda row: f"{row['peak_mib']:,}"), ""]
        lines += [*f"{group[-1]['model']} on {where(shown)}.".splitlines(), ""]
    return lines[:-1]


def _by_column(title: str, rows: list[Row], shown: Callable[[Row], str]) -> list[str]:
    """A line for each variant, with the mean tokens of its texts over each column."""
    cells = {(column_of(row), row["variant"]): row for row in rows}
    means = {column_of(row): row["mean_tokens"] for row in rows}
    columns = sorted(means)
    header = [f"{column_name(column)} ({means[column]:.0f})" for column in columns]
    lines = [f"| {title} | " + " | ".join(header) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [cells.get((column, variant)) for column in columns]
        lines.append(f"| {variant} | " + " | ".join(shown(row) if row else "" for row in own) + " |")
    return lines


def _did_not_run(rows: list[Row]) -> list[str]:
    """A paragraph for each variant and each reason for which it has no number."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "failed" in row:
            found.setdefault((row["variant"], row["failed"]), []).append(column_name(column_of(row)))
    shown = [
        f"Did not run: {name}, {', '.join(columns)} ({shorten(why, LONGEST_REASON, placeholder=' ...')})."
        for (name, why), columns in found.items()
    ]
    return [line for paragraph in shown for line in (paragraph, "")]


def newest_embed_rows(rows: list[Row]) -> list[Row]:
    """What the table of the machine and model measured last shows, failures among it."""
    found = [group for group in comparable(rows, "model") if any("failed" not in row for row in group)]
    return in_columns(max(found, key=lambda group: max(row["date"] for row in group)))


def readme_rows() -> list[Row]:
    """The rows that README's table of speed shows, and that `--rerun` measures again: of texts up to passages."""
    return newest_embed_rows(
        [
            row
            for row in read_rows("embed")
            if row["profile"] in README_PROFILES and row.get("max_length", OWN_LENGTH) == OWN_LENGTH
        ]
    )


def newest_embed_table(rows: list[Row]) -> list[str]:
    """`embed_table` of what README shows."""
    return embed_table(readme_rows())
