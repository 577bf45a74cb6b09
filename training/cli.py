"""`flashvec train` and `flashvec evaluate`: the command line of training."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

train_app = typer.Typer(help="Train an encoder: mntp, contrastive or distill.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Measure an encoder on files.", no_args_is_help=True)
stdout = Console()

Config = Annotated[Path, typer.Argument(help="YAML or JSON file of settings.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Argument(help="key=value, over the file's; lora.r=8", show_default=False)]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show all settings and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _train(name: str, config: Path, settings: list[str] | None, print_config: bool, as_json: bool) -> None:
    from flashvec.training import config as configs
    from flashvec.training.loop import TrainingStopped
    from flashvec.training.run import run_training

    cls: Any = getattr(configs, name)
    read = configs.read_config(cls, config, settings or ())
    if print_config:
        print(configs.to_yaml(read), end="")
        return
    try:
        last = run_training(read, show=False if as_json else None)
    except TrainingStopped as error:
        raise ValueError(str(error)) from error
    if as_json:
        print(json.dumps({"output": read.output, **last}))
    elif last:
        stdout.print(f"step {last['step']}, loss {last['loss']:.4f}: {read.output}", highlight=False)


@train_app.command()
def mntp(config: Config, settings: Settings = None, print_config: PrintConfig = False, as_json: Json = False) -> None:
    """Masked next token prediction: a decoder learns to look both ways.

    Example: `flashvec train mntp mntp.yaml texts=[wiki.txt] loop.steps=200`
    """
    _train("MntpConfig", config, settings, print_config, as_json)


@train_app.command()
def contrastive(
    config: Config, settings: Settings = None, print_config: PrintConfig = False, as_json: Json = False
) -> None:
    """Contrastive learning: SimCSE on texts alone, or pairs with hard negatives or scores.

    Example: `flashvec train contrastive simcse.yaml batch_size=64`
    """
    _train("ContrastiveConfig", config, settings, print_config, as_json)


@train_app.command()
def distill(
    config: Config, settings: Settings = None, print_config: PrintConfig = False, as_json: Json = False
) -> None:
    """Self-distillation: the model's own one-word answers teach its mean of all tokens.

    Example: `flashvec train distill distill.yaml texts=[wiki.txt]`
    """
    _train("DistillConfig", config, settings, print_config, as_json)


@evaluate_app.callback()
def _evaluate() -> None:
    pass


@evaluate_app.command()
def sts(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)],
    pairs: Annotated[Path, typer.Argument(help="Scored pairs: .csv, .tsv, .txt or .jsonl.", show_default=False)],
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="PEFT adapter; may be repeated.")] = None,
    attention: Annotated[str | None, typer.Option(help="bidirectional or causal, against the model's word.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, weighted_mean, last, cls, ...")] = None,
    layers: Annotated[int | None, typer.Option(help="Run the first layers only.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Before each text, or around its {text}.")] = None,
    as_json: Json = False,
) -> None:
    """Correlation of cosines with people's scores of sentence pairs, times 100.

    Example: `flashvec evaluate sts ./my-encoder sts-dev.csv`
    """
    from flashvec.runtime.encoder import Encoder
    from flashvec.training.evaluate import read_scored_pairs, sts_score

    read = read_scored_pairs(pairs)
    choices: dict[str, Any] = {"attention": attention, "pooling": pooling, "layers": layers}
    encoder = Encoder.load(model, adapters=adapter or (), **choices)
    found = sts_score(lambda texts: encoder.embed(list(texts), instruction=instruction), read)
    if as_json:
        print(json.dumps({"model": model, "file": pairs.name, **found}))
        return
    facts = f"Spearman {found['spearman']:.2f}, Pearson {found['pearson']:.2f}"
    stdout.print(f"{pairs.name}: {facts} over {found['pairs']} pairs", highlight=False)
