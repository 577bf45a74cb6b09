"""What comparisons with other libraries found, for the tables of `flashvec.bench.bench_parity`."""

import json
import os
from pathlib import Path


def note(kind: str, what: str, beside: str, difference: float) -> float:
    """Write a difference into the file that FLASHVEC_PARITY names, where it is set; returns the difference.

    Args:
        kind: "family" or "layout", of the table.
        what: line of the table.
        beside: the library, or a family's direction.
        difference: largest absolute one, of unit vectors.
    """
    if file := os.environ.get("FLASHVEC_PARITY"):
        line = {"kind": kind, "what": what, "beside": beside, "difference": float(difference)}
        with Path(file).open("a") as out:
            out.write(json.dumps(line) + "\n")
    return difference
