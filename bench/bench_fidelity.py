"""Rows of `flashvec verify`: how close our vectors are to Hugging Face's fp32 ones, beside its own in the same dtype.

python -m flashvec.bench.bench_fidelity --model M [--texts FILE] [--limit 192]
"""

import argparse
from pathlib import Path

from flashvec.bench.timing import append_rows
from flashvec.runtime.verify import read_texts, report_rows, verify_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--texts", type=Path, help="one text a line; default: the documentation Python carries")
    parser.add_argument("--limit", type=int, default=192)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    texts = read_texts(options.texts, options.limit)
    rows = []
    for dtype in options.dtypes:
        report = verify_model(options.model, texts, dtype=dtype)
        for line in report_rows(report):
            print("  ".join(f"{cell:>18}" for cell in line))
        print("; ".join(report["failures"]) or f"passed: {report['gate']}", flush=True)
        for variant, row in report["rows"].items():
            about = {"benchmark": "verify", "model": Path(options.model).name, "variant": variant, "dtype": dtype}
            rows.append({**about, "texts": len(texts), **row, "passed": not report["failures"]})
    append_rows(rows)


if __name__ == "__main__":
    main()
