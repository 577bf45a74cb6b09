"""Write README's tables from the rows in `bench/results/`.

    python -m flashvec.bench.report            # rewrite them
    python -m flashvec.bench.report --check    # exit 1 if README and rows disagree

Each table stands between `<!-- rows: NAME -->` and `<!-- end -->`; the newest row of each variant counts.
"""

import argparse
import json
import re
import sys
from typing import Any

from flashvec.bench.timing import RESULTS

README = RESULTS.parents[1] / "README.md"
MARKED = re.compile(r"(<!-- rows: (\S+) -->\n).*?(<!-- end -->)", re.S)
PROFILE_ORDER = ("queries", "sentences", "passages", "pages", "long tail")


def read_rows(benchmark: str) -> list[dict[str, Any]]:
    """All rows of one benchmark, oldest first."""
    rows = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row for row in rows if row["benchmark"] == benchmark]


def embed_table(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens per second by length profile, with the share of the ceiling; one machine and one run a line group."""
    newest = {(row["profile"], row["variant"]): row for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in newest.values()))
    profiles = [p for p in PROFILE_ORDER if any(profile == p for profile, _ in newest)]
    header = [f"{p} ({next(r['mean_tokens'] for (q, _), r in newest.items() if q == p):.0f})" for p in profiles]
    lines = ["| tokens/s (share of ceiling) | " + " | ".join(header) + " |", "|---" * (len(profiles) + 1) + "|"]
    for variant in variants:
        cells = [newest.get((p, variant)) for p in profiles]
        shown = [f"{c['tokens_per_s']:,} ({c['share_of_ceiling']:.0%})" if c else "" for c in cells]
        lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    last = rows[-1]
    lines.append("")
    lines.append(
        f"{last['model']} on {last['cores']} cores of {last['cpu']} ({last['instructions']}), torch {last['torch']},"
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in newest.values()))
    lines.append(f"commits {commits}, {last['date']}; medians of {last['repetitions']} interleaved repetitions.")
    return lines


def verify_table(rows: list[dict[str, Any]]) -> list[str]:
    """Cosine of ours and of Hugging Face's vectors in the same dtype to Hugging Face in fp32."""
    lines = [
        "| model | dtype | whose | minimum | 1 % | median | top-10 | sign flips |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in {(r["model"], r["dtype"], r["variant"]): r for r in rows}.values():
        cosine = row["cosine"]
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['variant']} | {cosine['minimum']:.5f} | {cosine['1 %']:.5f} | "
            f"{cosine['median']:.5f} | {row['top10_overlap']:.1%} | {row['sign_flips']:.2%} |"
        )
    return lines


TABLES = {"embed": embed_table, "verify": verify_table}


def render(text: str) -> str:
    """README with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        rows = read_rows(name)
        lines = TABLES[name](rows) if rows else ["No rows yet."]
        return start + "\n".join(lines) + "\n" + end

    return MARKED.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text: str = README.read_text(encoding="utf-8")
    made = render(text)
    if options.check:
        sys.exit(int(made != text))
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
