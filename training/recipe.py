"""How `models/smollm2-135m` was made: texts from Wikipedia and WordNet, one generation of training after the other.

    python -m flashvec.training.recipe --wikipedia wiki/*.txt --wordnet /usr/share/wordnet --out out/smollm2

A generation is a file of settings. It goes on from the one before, or from the one that `lora.start` names:

    prompts, teachers   self-distillation (`distill.py`): the frozen model's one-word answers teach, the vectors of
                        earlier generations, or both
    pairs               contrastive learning: sentences find the paragraph that they were taken from, and paragraphs
                        the one beside them (`cloze.py`)
    mean                the mean of the updates of earlier generations

With several seeds all generations are made for each, and the mean of the last ones is the result.

Wikipedia as an extractor leaves it (a paragraph a line); WordNet 3.0's data files (Debian: wordnet-base), of which the
example sentences and the definitions are taken: short, everyday language beside an encyclopaedia's. Only text is used,
no relation, no label. Run again, it goes on where it was.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashvec.training.average import average_adapters
from flashvec.training.cloze import cloze_pairs, paragraph_pairs
from flashvec.training.config import ContrastiveConfig, DistillConfig, LoraConfig, build, read_config
from flashvec.training.data import DataError
from flashvec.training.files import whole
from flashvec.training.mine import write_pairs
from flashvec.training.run import run_training
from flashvec.training.sentences import training_lines, write_lines
from flashvec.training.settings import read_values
from flashvec.training.topics import pairs_by_topic

TEXTS = "texts"  # the folder of what is trained on
TEXT_FILES = ("sentences.txt", "passages.txt", "examples.txt", "glosses.txt")
PAIRS_FILES = (
    "pairs.jsonl",  # a sentence asks
    "longer-pairs.jsonl",  # up to MAX_ASKING sentences ask
    "paragraph-pairs.jsonl",  # a paragraph asks
)
MAX_ASKING, MAX_PASSAGE_WORDS = 4, 100  # of the latter two
SAME_TOPIC = 40  # pairs of one topic that stand together in them
SETTINGS = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"
TOGETHER = 4  # lines that stay neighbours: WordNet lists what is alike side by side
MAX_SENTENCE_WORDS = 20
MIN_WORDS, MAX_GLOSS_WORDS = 5, 20
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
SENTENCES, PASSAGES, EXAMPLES, GLOSSES = 4000, 352, 6000, 1600  # lines of each kind; passages are several sentences


@dataclass(frozen=True)
class MeanConfig:
    """A generation that is not trained: the mean of earlier ones' updates; one that is named twice counts twice."""

    mean: tuple[str, ...]
    output: str


Generation = DistillConfig | ContrastiveConfig | MeanConfig


def wordnet_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Example sentences and definitions of WordNet's data files, each once, in the files' order.

    Raises:
        DataError: a file is missing.
    """
    examples: dict[str, None] = {}
    glosses: dict[str, None] = {}
    for gloss in _glosses(folder):
        examples |= dict.fromkeys(
            text.strip() for text in re.findall(r'"([^"]+)"', gloss) if len(text.split()) >= MIN_WORDS
        )
        definition = gloss.split('; "')[0].strip().rstrip(";")
        if MIN_WORDS <= len(definition.split()) <= MAX_GLOSS_WORDS and '"' not in definition:
            glosses[definition] = None
    return list(examples), list(glosses)


def _glosses(folder: Path) -> Iterator[str]:
    for part in PARTS_OF_SPEECH:
        file = folder / f"data.{part}"
        if not file.is_file():
            raise DataError(f"{file}: no such file; WordNet 3.0's data files come with Debian's wordnet-base")
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  ") and "|" in line:  # the licence stands before the entries, indented
                    yield line.split("|", 1)[1].strip()


def drawn_runs(lines: Sequence[str], limit: int, seed: int) -> list[str]:
    """About `limit` lines, in runs of `TOGETHER` that were neighbours, in their order."""
    runs = np.random.default_rng(seed).permutation(len(lines) // TOGETHER)[: limit // TOGETHER]
    return [lines[TOGETHER * run + place] for run in sorted(runs.tolist()) for place in range(TOGETHER)]


def write_texts(wikipedia: Sequence[str], wordnet: Path, folder: Path) -> None:
    """The files that are trained on, each a source of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    examples, glosses = wordnet_texts(wordnet)
    found = (
        training_lines(wikipedia, limit=SENTENCES, passages=0.0, max_words=MAX_SENTENCE_WORDS, seed=0),
        training_lines(wikipedia, limit=PASSAGES, passages=1.0, seed=1),
        drawn_runs(examples, EXAMPLES, 0),
        drawn_runs(glosses, GLOSSES, 0),
    )
    for name, lines in zip(TEXT_FILES, found, strict=True):
        write_lines(folder / name, lines)
    longer: dict[str, Any] = {"max_words": MAX_PASSAGE_WORDS, "with_negatives": False}
    pairs = (
        cloze_pairs(wikipedia, with_negatives=False),
        pairs_by_topic(cloze_pairs(wikipedia, max_asking=MAX_ASKING, **longer), SAME_TOPIC),
        pairs_by_topic(paragraph_pairs(wikipedia, **longer), SAME_TOPIC),
    )
    for name, made in zip(PAIRS_FILES, pairs, strict=True):
        write_pairs(folder / name, made)


def make(options: argparse.Namespace) -> None:
    """All generations of every seed, and the mean of the seeds' last ones.

    Raises:
        DataError: no settings, or texts that are missing.
    """
    settings = sorted(options.settings.glob("generation-*.yaml"), key=lambda file: (len(file.name), file.name))
    if not settings:
        raise DataError(f"{options.settings}: no generation-1.yaml in it: settings of self-distillation")
    write_texts(options.wikipedia, options.wordnet, options.out / TEXTS)
    made = [make_generations(settings, options.out, seed, options.overrides) for seed in options.seeds]
    if len(made) > 1:
        write_mean(made, options.out / "mean")


def make_generations(settings: Sequence[Path], out: Path, seed: int, overrides: Sequence[str]) -> Path:
    """One after the other, in a folder of the seed's own; returns the last one's folder.

    Settings name earlier generations, texts and pairs by the last part of a path, wherever `out` holds them now.
    """
    planned: dict[str, Generation] = {}
    for number, file in enumerate(settings):
        folder = out / f"seed-{seed}" / file.stem
        planned[file.stem] = _read_generation(file, folder, out / TEXTS, seed + number, list(planned), overrides)
    for number, (name, config) in enumerate(planned.items(), 1):
        print(f"{name}, {number} of {len(planned)}, seed {seed}: {config.output}", flush=True)
        if isinstance(config, MeanConfig):
            write_mean(list(map(Path, config.mean)), Path(config.output))
        else:
            run_training(config)
    return Path(config.output)


def _read_generation(
    file: Path, folder: Path, texts: Path, seed: int, earlier: Sequence[str], overrides: Sequence[str]
) -> Generation:
    """The settings of a generation, its paths those of this call."""

    def among_earlier(key: str, paths: Sequence[str]) -> tuple[str, ...]:
        names = [Path(path).name for path in paths]
        if missing := [name for name in names if name not in earlier]:
            raise DataError(f"{file}: {key}: {missing[0]} is no generation before this one")
        return tuple(str(folder.parent / name) for name in names)

    def goes_on(lora: LoraConfig) -> LoraConfig:
        start = among_earlier("lora.start", [lora.start] if lora.start else earlier[-1:])
        return replace(lora, start=start[0] if start else None)

    values = read_values(file)
    if "mean" in values:
        mean = build(MeanConfig, values | {"output": str(folder)}, file.name)
        if len(mean.mean) < 2:
            raise DataError(f"{file}: mean: names {len(mean.mean)} generation: a mean is of two or more")
        return replace(mean, mean=among_earlier("mean", mean.mean))
    own = [f"output={folder}", f"loop.seed={seed}", *overrides]
    if "pairs" in values:
        search = read_config(ContrastiveConfig, file, own)
        names = [Path(path).name for path in search.pairs]
        if unknown := [name for name in names if name not in PAIRS_FILES]:
            raise DataError(f"{file}: pairs: {unknown[0]} is not made; known are {', '.join(PAIRS_FILES)}")
        return replace(search, pairs=tuple(str(texts / name) for name in names), lora=goes_on(search.lora))
    config = read_config(DistillConfig, file, own)
    every = tuple(str(texts / name) for name in TEXT_FILES)
    return replace(config, texts=every, teachers=among_earlier("teachers", config.teachers), lora=goes_on(config.lora))


def write_mean(folders: Sequence[Path], mean: Path) -> None:
    """The mean of adapters; one of an earlier call is made anew, which takes a second."""
    with whole(mean) as partial:
        left_out = average_adapters(folders, partial)
    print(f"the mean of {len(folders)} adapters, {left_out:.2%} of a product at most left out: {mean}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikipedia", nargs="+", required=True, help=".txt files of one paragraph a line")
    parser.add_argument(
        "--wordnet", type=Path, required=True, help="folder of data.noun, data.verb, data.adj, data.adv"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts and the adapter")
    parser.add_argument(
        "--settings",
        type=Path,
        default=SETTINGS,
        help="folder of the generations' settings, generation-1.yaml and so on; default models/smollm2-135m",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        help="of the first generation, each further one has the next; with several the result is in OUT/mean",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="over every generation's settings, such as loop.steps=20; written before --wikipedia and --seeds",
    )
    options = parser.parse_args()
    try:
        make(options)
    except (ValueError, RuntimeError, OSError) as error:  # files, settings, a model, the disk: each says what and where
        sys.exit(f"recipe: {error}")


if __name__ == "__main__":
    main()
