"""Plots of the documentation, from the same rows as its tables.

python -m flashvec.bench.report      # rewrites tables and plots
"""

import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashvec.bench.embed_tables import column_name, column_of, newest_embed_rows
from flashvec.bench.gpu_tables import GPU_LENGTHS, gpu_attention_rows
from flashvec.bench.report import ROOT
from flashvec.bench.rows import comparable, read_rows, runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED = ROOT / "models" / "smollm2-135m"
MEAN_OF = 10  # steps
TRAINING_ROWS = 2  # of panels in `training_plot`
DEPTHS_OF, DEPTHS_ON = "trained, bidirectional, mean", "sts-dev"  # rows of `depth_plot`: their reading, their pairs
SWEEPS = {
    "length": "tokens of a text",
    "texts": "sentences in a call",
    "budget": "tokens run together",
    "model": "millions of weights",
}
COLOURS = {"flashvec": "#4f46e5", "torch varlen_attn": "#f59e0b", "torch sdpa, cuDNN": "#10b981"}
NAMES = {"flashvec": "flashvec", "torch varlen_attn": "torch varlen", "torch sdpa, cuDNN": "cuDNN, padded"}


def svg_of(draw: Callable[[Any], None], width: float, height: float) -> str:
    """A figure as SVG, the same text whenever and wherever it is drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "flashvec", "svg.fonttype": "none", "font.size": 9}):
        figure = pyplot.figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def embed_plot(figure: Any) -> None:
    """Tokens per second by length profile, a bar a variant; of the machine whose rows are newest."""
    group = [row for row in newest_embed_rows(read_rows("embed")) if "failed" not in row]
    rates = {(column_of(row), row["variant"]): row["tokens_per_s"] for row in group}
    variants = list(dict.fromkeys(row["variant"] for row in group))
    columns = sorted({column for column, _ in rates})
    axes: Axes = figure.subplots()
    for place, variant in enumerate(variants):
        heights = [rates.get((column, variant), 0) for column in columns]
        left = [i + (place - (len(variants) - 1) / 2) * 0.8 / len(variants) for i in range(len(columns))]
        axes.bar(left, heights, 0.8 / len(variants), label=variant)
    axes.set_xticks(range(len(columns)), [column_name(column) for column in columns])
    axes.set_ylabel("tokens/s")
    axes.set_title(
        f"{group[-1]['model']}, {group[-1]['cores']} cores of {group[-1]['cpu']} ({group[-1]['instructions']})"
    )
    _plain(axes, legend=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside bars, which fill the plot


def gpu_attention_plot(figure: Any) -> None:
    """Useful TFLOP/s over mixed lengths, forward and backward, both head sizes."""
    found = gpu_attention_rows(read_rows("gpu attention"))[-1]
    mixed = [name for name in GPU_LENGTHS if name.startswith("log-normal")]
    panels = figure.subplots(1, 4, sharey=True)
    columns = [(d, k) for d in ("forward", "backward") for k in (128, 64)]
    for axes, (direction, head_size) in zip(panels, columns, strict=True):
        for variant, colour in COLOURS.items():
            points = [(name.split()[1], found.get((direction, head_size, name, variant))) for name in mixed]
            shown = [(x, row["tflops"]) for x, row in points if row]
            if shown:
                axes.plot(*zip(*shown, strict=True), "o-", color=colour, label=NAMES[variant])
        axes.set_title(f"{direction}, head {head_size}")
        axes.set_xlabel("mean length")
        _plain(axes)
    panels[0].set_ylabel("useful TFLOP/s")


def scaling_plot(figure: Any) -> None:
    """Tokens per second over a text's length, texts in a call, tokens run together, and weights; the newest run."""
    rows = newest_scaling_rows(read_rows("scaling"))
    for axes, (sweep, name) in zip(figure.subplots(1, len(SWEEPS)), SWEEPS.items(), strict=True):
        own = sorted((row for row in rows if row["sweep"] == sweep), key=lambda row: row["at"])
        axes.plot([r["at"] for r in own], [r["tokens_per_s"] for r in own], "o-", color=COLOURS["flashvec"])
        axes.set_xscale("log", base=10 if sweep == "model" else 2)
        axes.set_xlabel(name)
        _plain(axes, legend=False)
    figure.axes[0].set_ylabel("tokens/s")
    last = rows[-1]
    figure.suptitle(
        f"{rows[0]['model']}, {last['dtype'].removeprefix('torch.')}, {last['cores']} cores of {last['cpu']}"
    )


def newest_scaling_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the run measured last: its own model's rows, and those of the larger shapes beside it."""
    found = [run for group in comparable(rows, "dtype") for run in runs(group)]
    newest = max(reversed(found), key=lambda run: max(row["date"] for row in run))
    model = next(row["model"] for row in reversed(newest) if row["sweep"] == "length")
    own = [row for row in newest if row["sweep"] == "model" or row["model"] == model]
    return list({(row["sweep"], row["model"], row["at"]): row for row in own}.values())


def roofline_plot(figure: Any) -> None:
    """Attention under the roof that a GPU's measured copy and product make, and how near ops come to the copy."""
    ceiling = read_rows("gpu ceiling")[-1]
    peak, copy = ceiling["tflops"], ceiling["gb_per_s"] / 1000
    roof, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    intensities = [2**k for k in range(4, 14)]
    roof.plot(intensities, [min(peak, copy * x) for x in intensities], color="#111827", linewidth=1)
    found = gpu_attention_rows(read_rows("gpu attention"))[-1]
    for direction, marker in (("forward", "o"), ("backward", "s")):
        for head_size, colour in ((128, "#4f46e5"), (64, "#f59e0b")):
            own = [found.get((direction, head_size, name, "flashvec")) for name in GPU_LENGTHS]
            shown = [(_intensity(row), row["tflops"]) for row in own if row]
            roof.plot(*zip(*shown, strict=True), marker, color=colour, label=f"{direction}, head {head_size}")
    roof.set(xscale="log", yscale="log", xlabel="FLOPs a byte of inputs and outputs", ylabel="TFLOP/s")
    roof.set_yticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
    roof.minorticks_off()
    roof.set_title("attention")
    _plain(roof, zero=False)
    shares: dict[tuple[str, str], float] = {}
    for row in read_rows("gpu op"):
        if row["variant"] == "flashvec" and "gb_per_s" in row and row["gpu"] == ceiling["gpu"]:
            shares[row["op"], row["direction"]] = row["gb_per_s"] / ceiling["gb_per_s"]
    ops = sorted({op for op, _ in shares}, reverse=True)
    for place, direction in enumerate(("backward", "forward")):
        at = [i + 0.4 * place for i in range(len(ops))]
        widths = [shares.get((op, direction), 0.0) for op in ops]
        bars.barh(at, widths, 0.38, color=("#a5b4fc", "#4f46e5")[place], label=direction)
    bars.set_yticks([i + 0.2 for i in range(len(ops))], ops)
    bars.set_title("share of a copy's bandwidth")
    bars.axvline(1, color="#111827", linewidth=1)
    _plain(bars, zero=False)
    bars.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.suptitle(ceiling["gpu"])


def _intensity(row: dict[str, Any]) -> float:
    """Useful FLOPs of an attention row over the bytes of its inputs and outputs, each touched once."""
    heads, kv_heads = map(int, row["heads"].split("/"))
    tensors = heads + kv_heads if row["direction"] == "forward" else 2 * (heads + kv_heads)
    moved = 2 * tensors * row["tokens"] * row["head_size"] * 2  # Q, O and K, V (and their gradients), two bytes each
    return float(row["tflops"] * row["us"] * 1e6 / moved)


def training_plot(figure: Any) -> None:
    """The loss of each generation that made models/smollm2-135m, and the mean of the last steps up to each."""
    files = sorted(TRAINED.glob("generation-*.jsonl"), key=lambda file: (len(file.name), file.name))  # 10 after 9
    across = -(-len(files) // TRAINING_ROWS)
    panels = figure.subplots(TRAINING_ROWS, across).flatten()
    for axes in panels[len(files) :]:
        axes.set_axis_off()
    for axes, file in zip(panels, files, strict=False):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, color=COLOURS["flashvec"], linewidth=1, alpha=0.25, label="a step")
        means = [sum(losses[max(0, i + 1 - MEAN_OF) : i + 1]) / min(i + 1, MEAN_OF) for i in range(len(losses))]
        axes.plot(steps, means, color=COLOURS["flashvec"], label=f"mean of {MEAN_OF}")
        axes.set_title(file.stem.replace("-", " "), fontsize=10)
        _plain(axes, legend=axes is panels[0])
    for axes in panels[::across]:
        axes.set_ylabel("loss")
    for axes in panels[len(files) - across : len(files)]:
        axes.set_xlabel("step")


def depth_plot(figure: Any) -> None:
    """What the adapter in models/ is worth cut to fewer layers, over how fast it then is; other encoders beside it."""
    cuts, others = depth_points(read_rows("quality"))
    axes: Axes = figure.subplots()
    axes.plot(*zip(*((rate, score) for _, rate, score in cuts), strict=True), "o-", color=COLOURS["flashvec"])
    for name, rate, score in others:
        axes.plot(rate, score, "s", color="#6b7280")
        axes.annotate(name, (rate, score), xytext=(-6, -12), textcoords="offset points", horizontalalignment="right")
    for place, (name, rate, score) in enumerate(cuts):  # above and below in turn: neighbours lie close
        at, side = ((5, 5), "left") if place % 2 == 0 else ((-3, -13), "right")
        text = f"{name} layers"
        axes.annotate(text, (rate, score), xytext=at, textcoords="offset points", horizontalalignment=side)
    axes.set(xlabel="sentences/s", ylabel="Spearman x 100, STS-B dev")
    axes.margins(x=0.2, y=0.15)
    _plain(axes, legend=False, zero=False)


Point = tuple[str, float, float]  # name, sentences/s, score


def depth_points(rows: list[dict[str, Any]]) -> tuple[list[Point], list[Point]]:
    """The adapter by numbers of layers, the slowest first, and other encoders, of the newest run that cut it.

    All of one run (`bench_quality --depths`), so that their times may stand side by side.
    """
    pairs = [row for row in rows if row["data"] == DEPTHS_ON and "seconds" in row]
    run = [run for run in runs(pairs) if any(row["variant"].startswith(f"{DEPTHS_OF}, ") for row in run)][-1]
    cuts, others = [], []
    for row in run:
        reading, _, cut = row["variant"].partition(f"{DEPTHS_OF}, ")
        rate, score = 2 * row["pairs"] / row["seconds"], row["score"]
        if row["variant"].startswith(DEPTHS_OF):
            cuts.append((cut.removesuffix(" layers") or "all", rate, score))
        elif ", " not in reading:  # another model by its own name; untrained readings are another story
            others.append((reading, rate, score))
    return sorted(cuts, key=lambda point: point[1]), others


def _plain(axes: "Axes", *, legend: bool = True, zero: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if zero:
        axes.set_ylim(bottom=0)
    if legend:
        axes.legend(frameon=False)


PLOTS: dict[str, tuple[Callable[[Any], None], float, float]] = {
    "embed": (embed_plot, 11, 3.2),
    "gpu_attention": (gpu_attention_plot, 10, 2.8),
    "scaling": (scaling_plot, 10, 2.8),
    "roofline": (roofline_plot, 10, 3.4),
    "training": (training_plot, 10, 4.4),
    "depths": (depth_plot, 5, 3.2),
}


def render_plots() -> dict[str, str]:
    """SVG text of every plot, by its file's stem in docs/plots."""
    return {name: svg_of(draw, width, height) for name, (draw, width, height) in PLOTS.items()}
