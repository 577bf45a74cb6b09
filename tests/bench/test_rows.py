"""Every committed row of every benchmark says where it was measured, of what, and the numbers that its kind has."""

import datetime
import json
from collections import defaultdict

import pytest

from flashvec.bench.report import TABLES
from flashvec.bench.rows import runs
from flashvec.bench.timing import RESULTS, machine

GPU = ("gpu", "triton", "transformers", "driver", "compute_capability", "sm_mhz", "max_sm_mhz", "power_limit_w")
RATE = ("tokens_per_s", "spread", "repetitions")
# kind: what says of what it is a row, and its numbers, which a row that says why there are none may lack
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed": (
        ("model", "variant", "profile"),
        (*RATE, "mean_tokens", "ceiling_tokens_per_s", "share_of_ceiling"),
    ),
    "start": (("model", "variant", "dtype"), ("seconds", "peak_mib", "repetitions")),
    "scaling": (("model", "dtype", "sweep", "at"), (*RATE, "texts", "mean_tokens", "ms_per_call")),
    "packed": (
        ("model", "variant", "dtype", "texts"),
        ("ms_per_call", "over_plain", "largest_difference", "spread", "repetitions"),
    ),
    "verify": (
        ("model", "variant", "dtype", "texts"),
        ("cosine", "top10_overlap", "sign_flips", "max_difference", "passed"),
    ),
    "quality": (("model", "variant", "dtype", "data", "measure"), ("score",)),
    "corpus": (("model", "variant"), ()),
    "load": (("model", "format", "dtype"), ("seconds", "weights_mib", "peak_mib", "repetitions")),
    "parity": (("kind", "what", "beside"), ("largest_difference", "comparisons")),
    "train": (
        ("model", "variant", "dtype", "profile"),
        (*RATE, "of_ceiling", "over_peft", "step_mib", "tokens", "clock"),
    ),
    "compiled_forms": (("model", "variant", "dtype", "op", "tokens"), ("eager_ms", "compiled_ms")),
    "gpu check": ((*GPU, "variant", "dtype"), ("passed", "share_of_allowed", "faults")),
    "gpu attention": (
        (*GPU, "variant", "dtype", "direction", "lengths", "heads", "head_size", "tokens", "sequences"),
        ("us", "tflops", "share_of_matmul", "spread", "repetitions"),
    ),
    "gpu op": ((*GPU, "variant", "op", "direction", "model"), ("us", "tokens", "spread", "repetitions")),
    "gpu ceiling": ((*GPU, "product", "copied_bytes"), ("tflops", "gb_per_s")),
    "gpu embed": ((*GPU, "variant", "model", "lengths"), (*RATE, "tflops", "share_of_products", "median_cosine")),
    "gpu train": ((*GPU, "variant", "model", "lengths", "tokens"), (*RATE, "tflops", "peak_gib")),
    "aot": (
        ("triton", "target", "kernel", "case", "place"),
        ("registers", "spill_bytes", "shared_bytes", "num_warps", "blocks_per_sm"),
    ),
}
WHY_NONE = ("failed", "missing", "wrong")
COMPILED = "aot"  # says what a compiler made, wherever it ran


def committed() -> dict[str, list[dict]]:
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["benchmark"]].append(row)
    return found


ROWS = committed()


def faults(row: dict) -> list[str]:
    """What a row lacks."""
    about, numbers = KINDS[row["benchmark"]]
    wanted = [*about, *(machine() if row["benchmark"] != COMPILED else ())]
    if not any(row.get(key) for key in WHY_NONE):
        wanted += numbers
    lacking = [key for key in wanted if row.get(key) is None or row[key] == ""]
    below = [key for key in ("tokens_per_s", "us", "seconds", "repetitions", "ms_per_call") if row.get(key, 1) <= 0]
    if "date" in row:
        datetime.date.fromisoformat(row["date"])
    return lacking + below


def test_every_kind_of_row_is_known():
    assert set(ROWS) <= set(KINDS) and {name.removesuffix(" newest").removesuffix(" memory") for name in TABLES} <= set(
        ROWS
    )


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_complete(kind):
    lacking = {(place, *found) for place, row in enumerate(ROWS[kind]) if (found := faults(row))}
    assert not lacking, sorted(lacking)[:5]


@pytest.mark.parametrize("kind", ["embed", "start"])
def test_a_run_has_ours_and_every_variant_once_in_each_place(kind):
    for run in runs(ROWS[kind]):
        places = [(r["model"], r.get("profile"), r.get("max_length"), r["variant"]) for r in run if "failed" not in r]
        assert len(set(places)) == len(places)
        assert any(variant.startswith("flashvec") for *_, variant in places)


def test_a_row_without_its_commit_or_its_number_is_found():
    row = ROWS["embed"][-1]
    assert not faults(row)
    for key in ("commit", "variant", "tokens_per_s", "share_of_ceiling"):
        assert faults({name: value for name, value in row.items() if name != key}) == [key]
    about = {key: value for key, value in row.items() if key not in KINDS["embed"][1]}
    assert faults(about) and not faults({**about, "failed": "it broke"})
