"""The command line: `flashvec info`, `convert`, `verify`; `cli_*.py` beside it and `training/cli*.py` add the others.

Exit status: 0 done, 1 failed, 2 wrong usage. `--json` prints one object for machines instead of tables.
"""

import io
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

import flashvec
from flashvec.bench.cli import bench
from flashvec.runtime import cli_corpus
from flashvec.runtime.cli_corpus import Adapters, Attention, Pooling, pooling_modes
from flashvec.runtime.cli_serve import serve
from flashvec.runtime.console import PlainFormatter, stderr, stdout
from flashvec.training.cli import mine, pairs, sentences, train_app
from flashvec.training.cli_evaluate import evaluate_app

SPEAKS_FIRST_S = 3.0

app = typer.Typer(
    name="flashvec",
    help="Decoder LLMs as text encoders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")
app.command()(mine)
app.command()(sentences)
app.command()(pairs)
app.command()(bench)

Model = Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Compat = Annotated[str | None, typer.Option(help="llm2vec: the reference's own rules.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


def _version(value: bool) -> None:
    if value:
        print(f"flashvec {flashvec.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    model: Model,
    attention: Attention = None,
    pooling: Pooling = None,
    adapter: Adapters = None,
    compat: Compat = None,
    as_json: Json = False,
) -> None:
    """Print what a model is and how it will run, without reading its weights.

    Example: `flashvec info ./my-model`
    """
    from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint, resolve
    from flashvec.runtime.describe import spec_rows

    checkpoint = open_checkpoint(
        resolve(model), Overrides(attention, pooling_modes(pooling), compat=compat), tuple(adapter or ())
    )
    checkpoint.source.close()
    if as_json:
        print(json.dumps({"spec": checkpoint.spec.to_dict(), "notices": checkpoint.notices}, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in spec_rows(checkpoint.spec):
        table.add_row(name, value)
    stdout.print(table, highlight=False, soft_wrap=False)
    for notice in checkpoint.notices:
        stderr.print(f"note: {notice}", highlight=False)


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    attention: Attention = None,
    pooling: Pooling = None,
    adapter: Adapters = None,
    compat: Compat = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored weights; default as they are (GGUF: float32).")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(help="Leave out rules that a sentence-transformers folder cannot hold, and say which."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as a folder that sentence-transformers opens too, without this package.

    Example: `flashvec convert SmolLM2-135M.gguf ./smollm2-encoder`
    """
    from flashvec.runtime.checkpoint.export import convert as convert_model
    from flashvec.runtime.checkpoint.open import Overrides

    notices = convert_model(
        model,
        out,
        plain=plain,
        dtype=dtype,
        overwrite=overwrite,
        adapters=adapter or (),
        overrides=Overrides(attention, pooling_modes(pooling), compat=compat),
    )
    if as_json:
        print(json.dumps({"folder": str(out), "notices": list(notices)}))
        return
    for notice in notices:
        stderr.print(f"note: {notice}", highlight=False)
    stdout.print(f"wrote {out}", highlight=False)


@app.command()
def verify(
    model: Model,
    texts: Annotated[
        Path | None, typer.Argument(help="Text file, one text a line; default: prose that Python carries.")
    ] = None,
    dtype: Dtype = None,
    attention: Attention = None,
    pooling: Pooling = None,
    adapter: Adapters = None,
    compat: Compat = None,
    limit: Annotated[int, typer.Option(help="Texts to compare.", min=2)] = 200,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text.")] = None,
    as_json: Json = False,
) -> None:
    """Compare this package's vectors with Hugging Face's own model on your texts; exit 1 below the gate.

    Example: `flashvec verify ./my-model reviews.txt --dtype bfloat16`
    """
    from flashvec.runtime.verify import read_texts, report_rows, verify_model

    report = verify_model(
        model,
        read_texts(texts, limit),
        dtype=dtype,
        max_length=max_length,
        adapters=adapter or (),
        attention=attention,
        pooling=pooling_modes(pooling),
        compat=compat,
    )
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in report_rows(report)[0]:
            table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
        for row in report_rows(report)[1:]:
            table.add_row(*row)
        stdout.print(table, highlight=False, soft_wrap=False)
        stdout.print(
            f"cosine to Hugging Face in fp32 over {report['texts']} texts; signs: share of flipped ones",
            highlight=False,
        )
        for line in report["failures"] or ["passed: " + report["gate"]]:
            stdout.print(line, highlight=False)
    if report["failures"]:
        raise typer.Exit(1)


app.command()(serve)
cli_corpus.register(app)


def _fail(message: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, which mostly fail alike, the first one speaks:
        time.sleep(SPEAKS_FIRST_S)  # when it has failed the others are stopped here
    stderr.print(f"flashvec: {message}", highlight=False)
    sys.exit(status)


def _show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
    """A warning of this package is a note to whoever runs a command; others' are shown with the line they come from."""
    if category.__module__.startswith("flashvec."):
        stderr.print(f"note: {message}", highlight=False)
    else:
        for line in warnings.formatwarning(message, category, *place[:2]).splitlines():
            stderr.print(line, highlight=False)


def _mend_streams() -> None:
    """Closed ones (`2>&-`) go nowhere: a file would get their number, and what a library prints. Signs that the
    terminal's encoding lacks are written escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  as long as the process
            os.set_inheritable(null.fileno(), True)
            setattr(sys, name, null)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for stderr


def main() -> None:
    """Entry point: a user's mistake is one line on stderr, never a traceback."""
    _mend_streams()
    warnings.showwarning = _show
    notes = logging.StreamHandler()
    notes.setFormatter(PlainFormatter())
    logging.basicConfig(handlers=[notes], level=logging.WARNING)
    for noisy in ("transformers", "huggingface_hub", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, TypeError) as error:  # CheckpointError is a ValueError
        _fail(str(error), 1)
    except (ImportError, RuntimeError) as error:  # an ImportError names the extra that is not installed
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 1)


if __name__ == "__main__":
    main()
