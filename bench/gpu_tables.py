"""Tables of the GPU benchmark's rows: attention by lengths, whole models; a table a GPU."""

from flashvec.bench.rows import Row, groups


def where_gpu(rows: list[Row]) -> str:
    """The GPU, the versions, the commits and the newest day of rows that share a table."""
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{last['gpu']}, torch {last['torch']}, triton {last['triton']},\n"
        f"commit {commits}, {max(row['date'] for row in rows)}"
    )


GPU_PEERS = {"torch varlen": "torch varlen_attn", "cuDNN": "torch sdpa, cuDNN"}
GPU_LENGTHS = ("log-normal 64", "log-normal 128", "log-normal 256", "log-normal 512", "512", "2048")


def gpu_attention_rows(rows: list[Row]) -> list[dict[tuple[str, int, str, str], Row]]:
    """For each GPU the newest run's rows of 32 heads over 8, by direction, head size, lengths, variant."""
    shown = [
        row for row in rows if row["heads"] == "32/8" and row.get("rotation", "none") == "none" and "tflops" in row
    ]
    found = []
    for group in groups(shown, "gpu"):
        newest = {(r["direction"], r["head_size"], r["lengths"]): r["commit"] for r in group}
        found.append(
            {
                (r["direction"], r["head_size"], r["lengths"], r["variant"]): r
                for r in group
                if r["commit"] == newest[r["direction"], r["head_size"], r["lengths"]]
            }
        )
    return found


def gpu_attention_table(rows: list[Row]) -> list[str]:
    """Useful TFLOP/s by lengths, of ours and of the peers that were timed beside it; a table a GPU."""
    lines: list[str] = []
    columns = [(d, k) for d in ("forward", "backward") for k in (128, 64)]
    for found in gpu_attention_rows(rows):
        lines += [
            "| TFLOP/s | " + " | ".join(f"{d}, head {k}" for d, k in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for lengths in GPU_LENGTHS:
            cells = []
            for direction, head_size in columns:
                own = found.get((direction, head_size, lengths, "flashvec"))
                peers = {
                    name: found.get((direction, head_size, lengths, variant)) for name, variant in GPU_PEERS.items()
                }
                shown = [f"{name} {row['tflops']:.0f}" for name, row in peers.items() if row]
                cells.append(f"{own['tflops']:.0f} ({', '.join(shown)})" if own else "")
            lines.append(f"| {lengths} | " + " | ".join(cells) + " |")
        ours_and_peers = ("flashvec", *GPU_PEERS.values())
        used = [row for (*_, n, variant), row in found.items() if n in GPU_LENGTHS and variant in ours_and_peers]
        lines += ["", *f"{where_gpu(used)}; medians of {used[-1]['repetitions']} interleaved repetitions.".splitlines()]
    return lines


def gpu_embed_table(rows: list[Row]) -> list[str]:
    """Tokens per second of whole models, ids on the host to vectors on the host."""
    timed = [row for row in rows if "tokens_per_s" in row]
    lines: list[str] = []
    for group in groups(timed, "gpu"):
        commits = {(r["model"], r["lengths"]): r["commit"] for r in group}  # one run's rows, not the newest of each
        own = [r for r in group if r["commit"] == commits[r["model"], r["lengths"]]]
        newest = {(r["model"], r["lengths"], r["variant"]): r for r in own}
        lines += ["| model | lengths | | tokens/s | of 989 TFLOP/s | of its products | cosine |", "|---" * 7 + "|"]
        for row in newest.values():
            is_truth = row["variant"].startswith("transformers") and row.get("truth", "float32") != "float32"
            cosine = "" if is_truth else f"{row['median_cosine']:.5f}"
            lines.append(
                f"| {row['model']} | {row['lengths']} | {row['variant']} | {row['tokens_per_s']:,} {row['spread']} | "
                f"{row['share_of_989']:.0%} | {row['share_of_products']:.0%} | {cosine} |"
            )
        lines += ["", *f"{where_gpu(list(newest.values()))}.".splitlines()]
    return lines
