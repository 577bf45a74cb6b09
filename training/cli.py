"""`flashvec train`, and what makes its data: `mine`, `sentences`, `pairs`."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvec.runtime.console import stderr, stdout

train_app = typer.Typer(help="Train an encoder: mntp, contrastive, distill; average.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(help="YAML or JSON file of settings.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Argument(help="key=value, over the file's; lora.r=8", show_default=False)]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show all settings and stop.")]
Processes = Annotated[
    int, typer.Option(min=1, help="That share each batch, as torchrun starts them: one for each GPU, or for each core.")
]
Model = Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


OBJECTIVES = {"mntp": "MntpConfig", "contrastive": "ContrastiveConfig", "distill": "DistillConfig"}


def _train(
    objective: str, config: Path, settings: list[str] | None, processes: int, print_config: bool, as_json: bool
) -> None:
    from flashvec.training import config as configs
    from flashvec.training.loop import TrainingStopped
    from flashvec.training.model import ENCODER_FOLDER
    from flashvec.training.run import run_training
    from flashvec.training.settings import to_yaml

    cls: Any = getattr(configs, OBJECTIVES[objective])
    read = configs.read_config(cls, config, settings or ())
    if print_config:
        print(json.dumps(asdict(read)) if as_json else to_yaml(read).rstrip())
        return
    if processes > 1:
        from flashvec.training.launch import launch

        given = ["train", objective, *(["--json"] if as_json else []), "--", str(config), *(settings or ())]
        raise typer.Exit(launch(processes, "flashvec", given))
    try:
        last = run_training(read, show=False if as_json else None)
    except TrainingStopped as error:
        raise ValueError(str(error)) from error
    if os.environ.get("RANK", "0") != "0":  # torchrun's: one process of several speaks
        return
    made = str(Path(read.output) / ENCODER_FOLDER) if read.train == "body" else read.output
    if as_json:
        print(json.dumps({"output": made, **last}))
    else:
        done = f"step {last['step']}, loss {last['loss']:.4f}" if last else "all steps had been done"
        stdout.print(f"{done}: {made}", highlight=False)


@train_app.command()
def mntp(
    config: Config,
    settings: Settings = None,
    processes: Processes = 1,
    print_config: PrintConfig = False,
    as_json: Json = False,
) -> None:
    """Masked next token prediction: a decoder learns to look both ways.

    Example: `flashvec train mntp mntp.yaml texts=wiki.txt loop.steps=200`
    """
    _train("mntp", config, settings, processes, print_config, as_json)


@train_app.command()
def contrastive(
    config: Config,
    settings: Settings = None,
    processes: Processes = 1,
    print_config: PrintConfig = False,
    as_json: Json = False,
) -> None:
    """Contrastive learning: SimCSE on texts alone, or pairs with hard negatives or scores.

    Example: `flashvec train contrastive simcse.yaml batch_size=64`
    """
    _train("contrastive", config, settings, processes, print_config, as_json)


@train_app.command()
def distill(
    config: Config,
    settings: Settings = None,
    processes: Processes = 1,
    print_config: PrintConfig = False,
    as_json: Json = False,
) -> None:
    """Self-distillation: the model's own one-word answers teach its mean of all tokens.

    Example: `flashvec train distill distill.yaml texts=wiki.txt`
    """
    _train("distill", config, settings, processes, print_config, as_json)


@train_app.command()
def average(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one base.", show_default=False)],
    output: Annotated[Path, typer.Option(help="A new folder for their mean.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=1, help="Of the mean; default the first adapter's.")] = None,
    as_json: Json = False,
) -> None:
    """The mean of adapters as one adapter: several runs are often better together than each.

    Example: `flashvec train average out/seed-1 out/seed-2 --output out/mean`
    """
    from flashvec.training.average import average_adapters

    left_out = average_adapters(adapters, output, rank)
    if as_json:
        print(json.dumps({"output": str(output), "adapters": len(adapters), "left_out": round(left_out, 6)}))
        return
    facts = f"the mean of {len(adapters)} adapters, {left_out:.2%} of a product at most left out by its rank"
    stdout.print(f"{output}: {facts}", highlight=False)


def mine(
    model: Model,
    pairs: Annotated[Path, typer.Argument(help=".jsonl file of queries and positives.", show_default=False)],
    out: Annotated[Path, typer.Argument(help=".jsonl file to write.", show_default=False)],
    corpus: Annotated[Path | None, typer.Option(help="Texts to choose from; default the positives.")] = None,
    negatives: Annotated[int, typer.Option(help="For each query.", min=1)] = 4,
    share: Annotated[
        float, typer.Option(help="Of the positive's cosine; what has more is left out.", min=0, max=1)
    ] = 0.95,
    margin: Annotated[
        float | None, typer.Option(help="How far below the positive's cosine they must be.", min=0)
    ] = None,
    skip: Annotated[int, typer.Option(help="Closest candidates to pass over.", min=0)] = 0,
    instruction: Annotated[str | None, typer.Option(help="Before each query that has none of its own.")] = None,
    as_json: Json = False,
) -> None:
    """Find hard negatives: texts close to a query that are not its answer. They replace those that a line has.

    Example: `flashvec mine ./my-encoder pairs.jsonl triples.jsonl --negatives 7`
    """
    from flashvec.runtime.encoder import Encoder
    from flashvec.training.data import read_pairs, read_texts
    from flashvec.training.files import check_file_or_absent
    from flashvec.training.mine import mine as mine_pairs
    from flashvec.training.mine import write_pairs

    check_file_or_absent(out, [pairs] if corpus is None else [pairs, corpus], ".jsonl")
    read = read_pairs([str(pairs)])
    texts = [] if corpus is None else read_texts([str(corpus)], "corpus")
    encoder = Encoder.load(model)
    found = mine_pairs(
        encoder,
        read,
        corpus=texts,
        num_negatives=negatives,
        share=share,
        margin=margin,
        skip=skip,
        instruction=instruction,
    )
    write_pairs(out, found)
    counts = {"pairs": len(found), "negatives": sum(len(pair.negatives) for pair in found)}
    if as_json:
        print(json.dumps({"out": str(out), **counts}))
        return
    stdout.print(f"{out}: {counts['negatives']} negatives for {counts['pairs']} pairs", highlight=False)
    if not counts["negatives"]:
        stderr.print("note: no candidate was far enough from the answers: see --share, --margin and --skip")


def sentences(
    texts: Annotated[list[Path], typer.Argument(help=".txt files of one paragraph a line.", show_default=False)],
    out: Annotated[Path, typer.Option(help=".txt file to write, one text a line.", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Lines at most, of paragraphs drawn at random.", min=1)] = None,
    passages: Annotated[float, typer.Option(help="Share of lines of several sentences.", min=0, max=1)] = 0.1,
    max_words: Annotated[int, typer.Option(help="Of a sentence; longer ones are left out.", min=5)] = 28,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Cut running text into sentences to train on: one a line, each once, fragments left out.

    Example: `flashvec sentences wiki/*.txt --out sentences.txt --limit 20000`
    """
    from flashvec.training.files import check_file_or_absent
    from flashvec.training.sentences import training_lines, write_lines

    check_file_or_absent(out, texts, ".txt")
    paths = [str(path) for path in texts]
    lines = training_lines(paths, limit=limit, passages=passages, max_words=max_words, seed=seed)
    if not lines:
        raise ValueError(f"{', '.join(path.name for path in texts)}: no paragraph has two whole sentences")
    write_lines(out, lines)
    words = sum(len(line.split()) for line in lines)
    if as_json:
        print(json.dumps({"out": str(out), "lines": len(lines), "words": words}))
        return
    stdout.print(f"{out}: {len(lines):,} lines, {words / len(lines):.0f} words each", highlight=False)


def pairs(
    texts: Annotated[list[Path], typer.Argument(help=".txt files of one paragraph a line.", show_default=False)],
    out: Annotated[Path, typer.Option(help=".jsonl file of pairs to write.", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Pairs at most, of paragraphs drawn at random.", min=1)] = None,
    max_words: Annotated[int, typer.Option(help="Of a passage; what follows is cut off.", min=1)] = 80,
    max_asking: Annotated[int, typer.Option(help="Sentences that ask together, one to so many.", min=1)] = 1,
    paragraphs: Annotated[
        bool, typer.Option("--paragraphs", help="A paragraph asks for one it stands beside.")
    ] = False,
    negatives: Annotated[bool, typer.Option(help="Another paragraph of each document beside its pair.")] = True,
    topics: Annotated[int | None, typer.Option(help="Order pairs by topic, so many of each.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Cut running text into pairs to train search on: a sentence asks, the rest of its paragraph answers.

    Example: `flashvec pairs wiki/*.txt --out pairs.jsonl --no-negatives --max-asking 4 --topics 40`
    """
    from flashvec.training.cloze import MIN_SENTENCES, cloze_pairs, paragraph_pairs
    from flashvec.training.files import check_file_or_absent
    from flashvec.training.mine import write_pairs
    from flashvec.training.topics import pairs_by_topic

    check_file_or_absent(out, texts, ".jsonl")
    if paragraphs and max_asking > 1:
        raise ValueError(
            f"--max-asking is {max_asking}: with --paragraphs a whole paragraph asks; leave one of them out"
        )
    cut: Any = paragraph_pairs if paragraphs else partial(cloze_pairs, max_asking=max_asking)
    found = cut(list(map(str, texts)), limit=limit, max_words=max_words, with_negatives=negatives, seed=seed)
    if not found:
        names = ", ".join(path.name for path in texts)
        least = f"{MIN_SENTENCES} whole sentences"
        none = f"no document has two paragraphs of {least}" if paragraphs else f"no paragraph (a line) has {least}"
        raise ValueError(f"{names}: {none}")
    if topics:
        found = pairs_by_topic(found, topics, seed)
    write_pairs(out, found)
    count = sum(bool(pair.negatives) for pair in found)
    if as_json:
        print(json.dumps({"out": str(out), "pairs": len(found), "negatives": count}))
        return
    stdout.print(f"{out}: {len(found):,} pairs, {count:,} with a negative", highlight=False)
