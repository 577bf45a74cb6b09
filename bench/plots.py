"""Plots of the documentation, from the same rows as its tables.

python -m flashvec.bench.report      # rewrites tables and plots
"""

import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashvec.bench.report import GPU_LENGTHS, PROFILE_ORDER, ROOT, comparable, gpu_attention_rows, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_LOG = ROOT / "models" / "smollm2-135m" / "log.jsonl"
MEAN_OF = 20  # steps
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
    group = comparable([row for row in read_rows("embed") if "failed" not in row], "model")[-1]
    newest = {(row["profile"], row["variant"]): row for row in group}
    variants = list(dict.fromkeys(row["variant"] for row in newest.values()))
    profiles = [p for p in PROFILE_ORDER if any(profile == p for profile, _ in newest)]
    axes: Axes = figure.subplots()
    for place, variant in enumerate(variants):
        heights = [newest[p, variant]["tokens_per_s"] if (p, variant) in newest else 0 for p in profiles]
        left = [i + (place - (len(variants) - 1) / 2) * 0.8 / len(variants) for i in range(len(profiles))]
        axes.bar(left, heights, 0.8 / len(variants), label=variant)
    axes.set_xticks(range(len(profiles)), profiles)
    axes.set_ylabel("tokens/s")
    axes.set_title(
        f"{group[-1]['model']}, {group[-1]['cores']} cores of {group[-1]['cpu']} ({group[-1]['instructions']})"
    )
    _plain(axes)


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


def training_plot(figure: Any) -> None:
    """The loss of every step of the run that made models/smollm2-135m, and the mean of the last steps up to each."""
    lines = [json.loads(line) for line in TRAINING_LOG.read_text(encoding="utf-8").splitlines()]
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    means = [sum(losses[max(0, i + 1 - MEAN_OF) : i + 1]) / min(i + 1, MEAN_OF) for i in range(len(losses))]
    axes: Axes = figure.subplots()
    axes.plot(steps, losses, color=COLOURS["flashvec"], alpha=0.25, linewidth=1, label="a step")
    axes.plot(steps, means, color=COLOURS["flashvec"], label=f"mean of {MEAN_OF} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


PLOTS: dict[str, tuple[Callable[[Any], None], float, float]] = {
    "embed": (embed_plot, 8, 3.2),
    "gpu_attention": (gpu_attention_plot, 10, 2.8),
    "training": (training_plot, 8, 2.8),
}


def render_plots() -> dict[str, str]:
    """SVG text of every plot, by its file's stem in docs/plots."""
    return {name: svg_of(draw, width, height) for name, (draw, width, height) in PLOTS.items()}
