"""How far vectors are from those of the libraries that models come from, by family and by layout, in fp32.

    python -m flashvec.bench.bench_parity

Runs the tests that compare tiny random models, one of each family and layout, and keeps the largest difference that
each line's comparisons found: token states at unit length, and vectors of every pooling mode. It needs the tests, so a
copy of the repository.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashvec.bench.rows import groups
from flashvec.bench.timing import RESULTS, append_rows

ROOT = RESULTS.parents[1]
COMPARING = ("families", "encoder", "sentence_transformers", "llm2vec", "export", "save")
TESTS = [f"tests/runtime/test_{name}.py" for name in COMPARING]


def rows_of(notes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each line of the tables: the largest of its differences, and how many there were.

    Args:
        notes: as `tests/parity.py` writes them.
    """
    return [
        {
            "benchmark": "parity",
            **{key: group[0][key] for key in ("kind", "what", "beside")},
            "largest_difference": float(f"{max(note['difference'] for note in group):.2g}"),
            "comparisons": len(group),
        }
        for group in groups(list(notes), "kind", "what", "beside")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    if missing := [name for name in TESTS if not (ROOT / name).is_file()]:
        sys.exit(f"bench_parity: {ROOT / missing[0]}: no such file; run it in a copy of the repository")
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.jsonl"
        tested = subprocess.run(
            [sys.executable, "-m", "pytest", "--quiet", *TESTS],
            cwd=ROOT,
            env={**os.environ, "FLASHVEC_PARITY": str(notes)},
        )
        if tested.returncode:
            sys.exit("bench_parity: the tests do not pass; no rows are kept")
        rows = rows_of(json.loads(line) for line in notes.read_text().splitlines())
    for row in rows:
        print(f"{row['kind']:6}  {row['what']:48}  {row['beside']:22}  {row['largest_difference']:.1e}")
    if not options.dry:
        append_rows(rows)


if __name__ == "__main__":
    main()
