"""How `models/smollm2-135m` was made: texts from Wikipedia and WordNet, self-distillation again and again, the mean.

    python -m flashvec.training.recipe --wikipedia wiki/*.txt --wordnet /usr/share/wordnet --out out/smollm2

The first generation learns from the frozen model's one-word answers; each further one goes on from the one before,
taught by an earlier one's vectors and by the answers to another prompt. A generation is a file of settings, in the
order of their names. With several seeds all generations are made for each, and the mean of the last ones is the result.

Wikipedia as an extractor leaves it (a paragraph a line); WordNet 3.0's data files (Debian: wordnet-base), of which the
example sentences and the definitions are taken: short, everyday language beside an encyclopaedia's. Only text is used,
no relation, no label. Run again, it goes on where it was.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flashvec.training.average import average_adapters
from flashvec.training.config import DistillConfig, read_config
from flashvec.training.data import DataError
from flashvec.training.run import run_training
from flashvec.training.sentences import training_lines, write_lines

SETTINGS = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"
TOGETHER = 4  # lines that stay neighbours: WordNet lists what is alike side by side
MAX_SENTENCE_WORDS = 20
MIN_WORDS, MAX_GLOSS_WORDS = 5, 20
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
SENTENCES, PASSAGES, EXAMPLES, GLOSSES = 4000, 352, 6000, 1600  # lines of each kind; passages are several sentences


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


def write_texts(wikipedia: Sequence[str], wordnet: Path, folder: Path) -> list[str]:
    """The files that are trained on, each a source of its own; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    examples, glosses = wordnet_texts(wordnet)
    found = {
        "sentences.txt": training_lines(wikipedia, limit=SENTENCES, passages=0.0, max_words=MAX_SENTENCE_WORDS, seed=0),
        "passages.txt": training_lines(wikipedia, limit=PASSAGES, passages=1.0, seed=1),
        "examples.txt": drawn_runs(examples, EXAMPLES, 0),
        "glosses.txt": drawn_runs(glosses, GLOSSES, 0),
    }
    for name, lines in found.items():
        write_lines(folder / name, lines)
    return [str(folder / name) for name in found]


def make(options: argparse.Namespace) -> None:
    """All generations of every seed, and the mean of the seeds' last ones.

    Raises:
        DataError: no settings, or texts that are missing.
    """
    settings = sorted(options.settings.glob("generation-*.yaml"))
    if not settings:
        raise DataError(f"{options.settings}: no generation-1.yaml in it: settings of self-distillation")
    texts = write_texts(options.wikipedia, options.wordnet, options.out / "texts")
    made = [
        make_generations(settings, texts, options.out / f"seed-{seed}", seed, options.overrides)
        for seed in options.seeds
    ]
    if len(made) > 1:
        mean = options.out / "mean"
        if mean.exists():  # of an earlier call: made anew in a second
            shutil.rmtree(mean)
        left_out = average_adapters(made, mean)
        print(f"the mean of {len(made)} seeds, {left_out:.2%} of a product at most left out: {mean}", flush=True)


def make_generations(
    settings: Sequence[Path], texts: Sequence[str], out: Path, seed: int, overrides: Sequence[str]
) -> Path:
    """One after the other, each from the one before; returns the last one's folder.

    `teachers` of the settings name earlier generations by their folders' last part, where `out` holds them now; without
    any, prompts teach alone.
    """
    configs: list[DistillConfig] = []
    for number, file in enumerate(settings):
        own = [f"texts={list(texts)}", f"output={out / file.stem}", f"loop.seed={seed + number}"]
        own += [f"lora.start={before.output}" for before in configs[-1:]]
        config = read_config(DistillConfig, file, [*own, *overrides])
        made = {Path(before.output).name: before.output for before in configs}
        names = [Path(teacher).name for teacher in config.teachers]
        if missing := [name for name in names if name not in made]:
            raise DataError(f"{file}: teachers: {missing[0]} is no generation before this one")
        configs.append(replace(config, teachers=tuple(made[name] for name in names)))
    for number, config in enumerate(configs, 1):
        name = Path(config.output).name
        print(f"{name}, {number} of {len(configs)}, seed {seed}: {config.output}", flush=True)
        run_training(config)
    return Path(configs[-1].output)


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
        "overrides", nargs="*", metavar="key=value", help="over every generation's settings, such as loop.steps=20"
    )
    options = parser.parse_args()
    try:
        make(options)
    except (ValueError, RuntimeError, OSError) as error:  # files, settings, a model, the disk: each says what and where
        sys.exit(f"recipe: {error}")


if __name__ == "__main__":
    main()
