"""Write the tables and plots of README and the documentation from the rows in `bench/results/`.

    python -m flashvec.bench.report            # rewrite them
    python -m flashvec.bench.report --check    # exit 1 if a page and the rows disagree
    python -m flashvec.bench.report --rerun --model smollm2-encoder --gguf model.gguf    # measure README's ratios here

Tables stand between `<!-- rows: NAME -->` and `<!-- end -->`. Each holds rows of one machine and one torch only,
measured with the newest torch on that machine.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

from flashvec.bench.embed_tables import embed_memory_table, embed_table, newest_embed_table, readme_rows
from flashvec.bench.gpu_tables import gpu_attention_table, gpu_embed_table
from flashvec.bench.rerun import rerun
from flashvec.bench.rows import WHITENED, Row, comparable, fullest_run, read_rows, where
from flashvec.bench.timing import RESULTS, at_least_one

ROOT = RESULTS.parents[1]
MARKED = re.compile(r"(<!-- rows: ([a-z ]+) -->\n).*?(<!-- end -->)", re.S)


def start_table(rows: list[Row]) -> list[str]:
    """Seconds from a new process to the first vector, and peak memory; a table for each model, dtype and machine."""
    lines: list[str] = []
    for group in comparable(rows, "model", "dtype"):
        shown = fullest_run(group)
        timed = sorted((row for row in shown if "failed" not in row), key=lambda row: row["seconds"])
        if not timed:
            continue
        lines += ["| | seconds to the first vector | MiB at most |", "|---|---|---|"]
        lines += [f"| {row['variant']} | {row['seconds']:.1f} | {row['peak_mib']:,} |" for row in timed]
        last = f"{group[-1]['model']} on {where(timed)}; medians of {timed[-1]['repetitions']} interleaved repetitions."
        lines += ["", *last.splitlines(), ""]
        failed = [row for row in shown if "failed" in row]
        lines += [line for row in failed for line in (f"Did not run: {row['variant']} ({row['failed']}).", "")]
    return lines[:-1]


def verify_table(rows: list[Row]) -> list[str]:
    """Cosine of ours and of Hugging Face's vectors in the same dtype to Hugging Face in fp32; a table a machine."""
    lines: list[str] = []
    for group in comparable(rows):
        lines += [
            "| model | dtype | whose | minimum | 1 % | median | top-10 | sign flips |",
            "|---|---|---|---|---|---|---|---|",
        ]
        newest = {(r["model"], r["dtype"], r["variant"]): r for r in group}
        for row in newest.values():
            cosine = row["cosine"]
            lines.append(
                f"| {row['model']} | {row['dtype']} | {row['variant']} | {cosine['minimum']:.5f} | "
                f"{cosine['1 %']:.5f} | {cosine['median']:.5f} | {row['top10_overlap']:.1%} | {row['sign_flips']:.2%} |"
            )
        lines += ["", *f"On {where(list(newest.values()))}.".splitlines(), ""]
    return lines[:-1]


def _stage(variant: str) -> int:
    """Where a reading stands in the table: what needs no training, what led to the model, the model, others."""
    if variant.startswith(("untrained", "BM25")):
        return 0
    return 1 + variant.startswith("trained") if ", " in variant else 3  # the last: another model, by its own name


def quality_table(rows: list[Row]) -> list[str]:
    """Scores of readings, a column for each set: a table each of texts, search and words, for a model and machine."""
    lines: list[str] = []
    for group in comparable(rows, "model", "dtype"):
        newest = {(row["variant"], row["data"]): row for row in group}
        for kind, title in (("texts", "| |"), ("search", "| search (whitened) |"), ("words", "| words |")):
            if shown := {key: row for key, row in newest.items() if _kind(row) == kind}:
                lines += [*_scores(shown, title), ""]
        about = f"{group[-1]['model']}, {group[-1]['dtype'].removeprefix('torch.')}, on {where(list(newest.values()))}."
        lines += [*about.splitlines(), ""]
    return lines[:-1]


def _kind(row: Row) -> str:
    return "words" if "words" in row else "search" if "queries" in row else "texts"


def _scores(newest: dict[tuple[str, str], Row], title: str) -> list[str]:
    """A line for each reading, a cell for each set; whitened beside plain."""
    sets = {row["data"].removesuffix(WHITENED): row["measure"] for row in newest.values()}
    lines = [f"{title} " + " | ".join(f"{name} ({measure})" for name, measure in sets.items()) + " |"]
    lines += ["|---" * (len(sets) + 1) + "|"]
    for variant in sorted(dict.fromkeys(variant for variant, _ in newest), key=_stage):
        pairs = ([newest.get((variant, name + ending)) for ending in ("", WHITENED)] for name in sets)
        lines.append(f"| {variant} | " + " | ".join(_score(*pair) for pair in pairs) + " |")
    return lines


def _score(plain: Row | None, whitened: Row | None) -> str:
    shown = f"{plain['score']:.1f}" if plain else ""
    if plain and "deviation" in plain:
        shown += f" ± {plain['deviation']:.1f}"
    return f"{shown} ({whitened['score']:.1f})".strip() if whitened else shown


def parity_tables(rows: list[Row]) -> list[str]:
    """Largest differences to the libraries that models come from: by family and direction, then by layout."""
    lines: list[str] = []
    for group in comparable(rows)[-1:]:
        newest = {(row["kind"], row["what"], row["beside"]): row for row in group}
        shown = {key: f"{row['largest_difference']:.1e}" for key, row in newest.items()}
        lines += ["| family, beside transformers | bidirectional | causal |", "|---|---|---|"]
        for name in dict.fromkeys(what for kind, what, _ in newest if kind == "family"):
            cells = [shown.get(("family", name, direction), "") for direction in ("bidirectional", "causal")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "| layout | beside | |", "|---|---|---|"]
        lines += [f"| {what} | {beside} | {cell} |" for (kind, what, beside), cell in shown.items() if kind == "layout"]
        lines += ["", *f"On {where(list(newest.values()))}.".splitlines()]
    return lines


def train_table(rows: list[Row]) -> list[str]:
    """A training step's tokens per second and memory; a table for each model, dtype, lengths, machine and processes."""
    lines: list[str] = []
    for group in comparable([{"processes": 1, **row} for row in rows], "model", "dtype", "profile", "processes"):
        newest = list({row["variant"]: row for row in group}.values())
        lines += [f"| {group[-1]['profile']} | tokens/s | to transformers + PEFT | of the products | MiB a step |"]
        lines += ["|---" * 5 + "|"]
        for row in newest:
            speed = f"{row['tokens_per_s']:.0f} | {row['over_peft']:.2f} | {row['of_ceiling']:.0%}"
            lines.append(f"| {row['variant']} | {speed} | {row['step_mib']:,} |")
        last = group[-1]
        several = f" in {last['processes']} processes" if last["processes"] > 1 else ""
        lines += ["", *f"{last['model']}, {last['dtype']},{several} on {where(newest)}.".splitlines(), ""]
    return lines[:-1]


def load_table(rows: list[Row]) -> list[str]:
    """Seconds, weights and peak of anonymous memory by format and dtype; a table for each model and machine."""
    lines: list[str] = []
    for group in comparable(rows, "model"):
        newest = {(row["format"], row["dtype"]): row for row in group}.values()
        lines += ["| loading | dtype | seconds | MiB of weights | MiB allocated at most |", "|---" * 5 + "|"]
        lines += [
            f"| {r['format']} | {r['dtype']} | {r['seconds']:.1f} | {r['weights_mib']:,} | {r['peak_mib']:,} |"
            for r in newest
        ]
        lines += ["", *f"{group[-1]['model']} on {where(list(newest))}.".splitlines(), ""]
    return lines[:-1]


TABLES = {
    "embed": embed_table,
    "embed newest": newest_embed_table,
    "embed memory": embed_memory_table,
    "verify": verify_table,
    "gpu attention": gpu_attention_table,
    "gpu embed": gpu_embed_table,
    "start": start_table,
    "quality": quality_table,
    "parity": parity_tables,
    "load": load_table,
    "train": train_table,
}


def pages() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        rows = read_rows(name.removesuffix(" newest").removesuffix(" memory"))
        lines = TABLES[name](rows) if rows else ["No rows yet."]
        return start + "\n".join(lines) + "\n" + end

    return MARKED.sub(table, text)


def _rerun(options: argparse.Namespace) -> NoReturn:
    """Exits with 0 where README's ratios hold here, with 1 and a line where that cannot be said."""
    from flashvec.bench.own_process import ProcessEndedError
    from flashvec.bench.variants import Subject

    subject = Subject(options.model, options.gguf)
    try:
        sys.exit(int(not rerun(readme_rows(), subject, options.texts, options.repetitions)))
    except (ValueError, OSError, ProcessEndedError) as error:  # the model's files, the texts: says what and where
        sys.exit(f"report: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page and the rows disagree")
    parser.add_argument(
        "--rerun", action="store_true", help="measure README's ratios here; exit 1 if one does not hold"
    )
    parser.add_argument("--model", help="of --rerun: model folder or GGUF file")
    parser.add_argument("--gguf", type=Path, help="of --rerun: the same model's GGUF file, for llama.cpp")
    parser.add_argument("--texts", type=Path, help="of --rerun: file or folder of prose")
    parser.add_argument("--repetitions", type=at_least_one, default=3, help="of --rerun")
    options = parser.parse_args()
    if not (ROOT / "README.md").is_file():  # an installed package has neither pages nor rows
        sys.exit(f"report: {ROOT} holds no README.md: run it in a checkout of the repository, whose pages these are")
    if options.rerun:
        if not options.model:
            parser.error("--rerun needs --model: the folder that `flashvec convert` wrote")
        _rerun(options)
    stale = False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = render(text)
        stale |= made != text
        if not options.check and made != text:
            page.write_text(made, encoding="utf-8")
    from flashvec.bench.plots import render_plots

    for name, svg in render_plots().items():
        file = ROOT / "docs" / "plots" / f"{name}.svg"
        stale |= not file.is_file() or file.read_text(encoding="utf-8") != svg
        if not options.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(svg, encoding="utf-8")
    sys.exit(int(options.check and stale))


if __name__ == "__main__":
    main()
