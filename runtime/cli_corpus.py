"""Commands over corpora: `flashvec embed`, `embed-shard`, `search`, `whiten`."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvec.runtime.console import stderr, stdout

Json = Annotated[bool, typer.Option("--json", help="Print JSON: an object for each event, the last one the result.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... or all; default all GPUs, else the CPU.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Attention = Annotated[str | None, typer.Option(help="bidirectional or causal, against the model's own word.")]
Pooling = Annotated[
    str | None,
    typer.Option(help="mean, weighted_mean, mean_sqrt_len, max, last or cls; several with commas."),
]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="PEFT adapter to merge; may be repeated.")]
RUN_OF_SAMPLE = 1024  # rows, of which the first are read
Layers = Annotated[int | None, typer.Option(help="Run the first layers only.", min=1)]


def pooling_modes(pooling: str | None) -> tuple[str, ...] | None:
    """Names between commas, as `--pooling` takes them."""
    return None if pooling is None else tuple(name.strip() for name in pooling.split(","))


def embed(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs or URIs: Parquet, Arrow, JSON lines, CSV, TSV, text; .gz .zst .bz2."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, GGUF file or hub id.")] = None,
    adapter: Adapters = None,
    layers: Layers = None,
    out: Annotated[str | None, typer.Option(help="Folder or URI to write; holds the job, resumes it.")] = None,
    check: Annotated[
        str | None, typer.Option(help="Verify a finished job's folder instead; exit 1 if not whole.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Default: text, or the only text column.")] = None,
    text_template: Annotated[str | None, typer.Option(help='Several columns in one, as "{title}\\n{body}".')] = None,
    id_column: Annotated[str | None, typer.Option(help="Written beside each vector.")] = None,
    columns: Annotated[str | None, typer.Option(help="Further columns to write beside it, with commas.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Written before each text, or around it at {text}.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="One of the model's prompts instead.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text; default the model's.")] = None,
    long: Annotated[str, typer.Option(help="truncate longer texts, or chunk them with overlap.")] = "truncate",
    chunks: Annotated[str, typer.Option(help="mean: one vector of all chunks; rows: a row each.")] = "mean",
    dims: Annotated[int | None, typer.Option(help="Keep the leading dimensions.")] = None,
    precision: Annotated[str, typer.Option(help="float32, float16, int8 or binary.")] = "float32",
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Against the model's rule.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Rows of a part.", min=1)] = 32_768,
    dedupe: Annotated[bool, typer.Option("--dedupe/--no-dedupe", help="Encode equal texts of a shard once.")] = True,
    output_format: Annotated[str, typer.Option("--format", help="parquet or npy.")] = "parquet",
    max_errors: Annotated[
        int, typer.Option(help="Rows without a vector before the job stops; -1: any.", min=-1)
    ] = 1000,
    unique_ids: Annotated[bool, typer.Option(help="Refuse ids that come twice.")] = False,
    reuse: Annotated[str | None, typer.Option(help="Finished job whose vectors are taken for unchanged texts.")] = None,
    mixed_machines: Annotated[bool, typer.Option(help="Let other kinds of machines work on the job.")] = False,
    plan_only: Annotated[
        bool, typer.Option(help="Write plan.json and stop; then embed-shard, then this again.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: start one here.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray actors to run; default 1.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option(help="Sample the inputs and print rows, tokens, time, bytes.")] = False,
    as_json: Json = False,
) -> None:
    """Embed files into a folder of vectors; the same command goes on where a stopped one was.

    Example: `flashvec embed data/*.jsonl --model ./my-model --out vectors --id-column id`
    """
    from flashvec.runtime.corpus.job import embed_corpus
    from flashvec.runtime.corpus.reporter import Reporter, counted
    from flashvec.runtime.corpus.settings import JobSettings

    if check is not None:
        if inputs or model or out:
            raise typer.BadParameter("--check takes a job's folder and nothing else")
        _check(check, as_json)
        return
    if not inputs or model is None or (out is None and not dry_run):
        raise typer.BadParameter("give INPUTS, --model and --out")
    settings = JobSettings(
        text_columns=() if text_column is None else (text_column,),
        text_template=None if text_template is None else text_template.replace("\\n", "\n"),
        id_column=id_column,
        columns=() if columns is None else tuple(columns.split(",")),
        instruction=instruction,
        prompt_name=prompt_name,
        max_length=max_length,
        long=long,
        chunks=chunks,
        dims=dims,
        precision=precision,
        normalize=normalize,
        shard_size=shard_size,
        dedupe=dedupe,
        format=output_format,
    )
    choices = {"adapters": adapter, "layers": layers, "dtype": dtype}
    load = {name: value for name, value in choices.items() if value is not None}
    if dry_run:
        from flashvec.runtime.corpus.estimate import estimate_job, estimate_lines

        def say(note: str) -> None:
            stderr.print(f"note: {note}", highlight=False)

        first = devices_of(device)[0]
        estimate = estimate_job(inputs, model=model, settings=settings, load=load, device=first, note=say)
        print(json.dumps(asdict(estimate))) if as_json else print("\n".join(estimate_lines(estimate)))
        return
    assert out is not None
    if engine != "ray" and workers is not None:
        raise typer.BadParameter("--workers counts Ray's actors; with --engine local --device names one or more")
    if engine == "ray" and device is not None:
        raise typer.BadParameter(
            "--device names devices of this machine; with --engine ray the cluster gives each its own"
        )
    with Reporter(as_json) as report:
        result = embed_corpus(
            inputs,
            out,
            model=model,
            settings=settings,
            load=load,
            devices=[None] * (workers or 1) if engine == "ray" else devices_of(device),
            max_errors=None if max_errors < 0 else max_errors,
            unique_ids=unique_ids,
            reuse=reuse,
            mixed_machines=mixed_machines,
            plan_only=plan_only,
            engine=engine,
            address=address,
            on_event=report,
        )
    if as_json:
        print(json.dumps({"event": "result", **asdict(result)}))
    elif plan_only and result.shards < result.planned:
        stdout.print(
            f"{counted(result.planned, 'shard')} planned, {result.shards} finished: embed-shard --plan {out} runs one"
        )
    else:
        line = f"{counted(result.rows, 'vector')} in {counted(result.shards, 'shard')}, {result.bytes:,} bytes"
        line += f", {counted(result.errors, 'error')}, {counted(result.duplicates, 'duplicate')}"
        stdout.print(line, highlight=False)
        if result.errors:
            stderr.print(f"note: {counted(result.errors, 'row')} without a vector: _errors/ says which and why")
        if result.truncated:
            stderr.print(f"note: cut to max_length: {counted(result.truncated, 'text')} (--long chunk keeps all)")
        if result.changes is not None:
            added, edited, deleted = result.changes
            changes = f"{added:,} rows added, {edited:,} edited, {deleted:,} deleted"
            stdout.print(f"{result.reused:,} vectors reused; {changes}", highlight=False)
    if result.set_aside:
        listed = ", ".join(map(str, result.set_aside[:20]))
        stderr.print(f"flashvec: set aside after three dead workers each: shards {listed}", highlight=False)
        raise typer.Exit(1)


def embed_shard(
    plan: Annotated[str, typer.Option(help="A job's folder, or the plan.json in it.", show_default=False)],
    shard: Annotated[int | None, typer.Option(help="Default: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default the first GPU, else the CPU.")
    ] = None,
    max_errors: Annotated[int, typer.Option(help="Of this shard; -1: any.", min=-1)] = 1000,
    as_json: Json = False,
) -> None:
    """Run one shard of a planned job: for SLURM arrays and Kubernetes indexed jobs.

    Example: `flashvec embed-shard --plan vectors --shard 17`
    """
    from flashvec.runtime.corpus.plan import PLAN_FILE, PlanError, read_plan
    from flashvec.runtime.corpus.storage import Storage
    from flashvec.runtime.corpus.worker import ShardRunner

    if shard is None:
        index = os.environ.get("SLURM_ARRAY_TASK_ID", os.environ.get("JOB_COMPLETION_INDEX"))
        if index is None:
            raise typer.BadParameter("give --shard: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set")
        if not (index.isascii() and index.isdigit()):
            raise typer.BadParameter(f"give --shard: the scheduler's index is {index!r}, no number of a shard")
        shard = int(index)
    location = plan.removesuffix("/" + PLAN_FILE) if plan != PLAN_FILE else "."
    read = read_plan(Storage(location))
    if read is None:
        raise PlanError(f"{plan}: no plan there; `flashvec embed` writes one")
    runner = ShardRunner.load({**read.model.loading, "device": device})
    entry = runner.run(location, shard, None if max_errors < 0 else max_errors)
    if as_json:
        print(json.dumps(entry))
    else:
        stdout.print(f"shard {shard}: {entry['rows']:,} vectors, {entry['errors']} errors", highlight=False)


def search(
    folder: Annotated[str, typer.Argument(help="A job's folder.", show_default=False)],
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    top: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 10,
    instruction: Annotated[str | None, typer.Option(help="Of the query; default the model's prompt `query`.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="One of the model's prompts instead.")] = None,
    whiten: Annotated[
        float | None,
        typer.Option(
            help="Fit all vectors to the job's first, as `flashvec whiten` does; a power such as 0.25.",
            min=0,
            max=0.5,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the rows of a job whose vectors are nearest to a query's, exactly.

    Example: `flashvec search vectors "how do I bake bread?"`
    """
    from flashvec.runtime.corpus.search import describe_hits, embed_query, search_job
    from flashvec.runtime.corpus.storage import Storage

    storage = Storage(folder)
    vector = embed_query(storage, query, instruction, prompt_name)
    hits = describe_hits(storage, search_job(storage, vector, top, whiten)[0])
    if as_json:
        print(json.dumps([hit._asdict() for hit in hits]))
        return
    if not hits:
        stderr.print("note: the job has no vector, so nothing is near")
    if any(hit.text is None for hit in hits):
        stderr.print("note: texts are not shown where the input is gone or has changed since it was embedded")
    for hit in hits:
        place = f"{Path(hit.file).name}:{hit.row}" + ("" if hit.id is None else f" id {hit.id}")
        place += "" if hit.chunk is None else f" chunk {hit.chunk}"  # the text below is the whole row's beginning
        stdout.print(f"{hit.score:.4f}  {place}", highlight=False)
        if hit.text is not None:
            stdout.print(f"        {' '.join(hit.text.split())[:200]}", highlight=False)


def whiten(
    inputs: Annotated[
        list[str], typer.Argument(help="The collection, in files as `flashvec embed` takes them.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Model folder, GGUF file or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write the encoder to.", show_default=False)],
    adapter: Adapters = None,
    layers: Layers = None,
    power: Annotated[
        float, typer.Option(help="0 takes the texts' mean off, 0.5 makes all axes weigh the same.", min=0, max=0.5)
    ] = 0.25,
    sample: Annotated[int, typer.Option(help="Texts to read at most, from all over the files.", min=2)] = 2000,
    text_column: Annotated[str | None, typer.Option(help="Default: text, or the only text column.")] = None,
    text_template: Annotated[str | None, typer.Option(help='Several columns in one, as "{title}\\n{body}".')] = None,
    instruction: Annotated[str | None, typer.Option(help="Before each text, as it will be when embedded.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="One of the model's prompts instead.")] = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    as_json: Json = False,
) -> None:
    """Fit an encoder to a collection: what its texts have in common weighs less. No labels, no training.

    Embed the collection and its queries with the new folder; weights are stored in the dtype that ran.

    Example: `flashvec whiten data/*.jsonl --model ./my-model --out ./my-model-for-data`
    """
    from flashvec.runtime.checkpoint.open import made_of, resolve
    from flashvec.runtime.checkpoint.placing import target_folder
    from flashvec.runtime.corpus.job import draft_plan
    from flashvec.runtime.corpus.reporter import counted
    from flashvec.runtime.corpus.sample import sample_texts
    from flashvec.runtime.corpus.settings import JobSettings
    from flashvec.runtime.corpus.sources import find_sources
    from flashvec.runtime.encoder import Encoder

    def say(note: str) -> None:
        stderr.print(f"note: {note}", highlight=False)

    own = made_of(resolve(model)) + [resolve(name) for name in adapter or ()]
    target_folder(out, overwrite, own)  # before the work, not after it
    columns = () if text_column is None else (text_column,)
    template = None if text_template is None else text_template.replace("\\n", "\n")
    settings = JobSettings(text_columns=columns, text_template=template, shard_size=RUN_OF_SAMPLE)
    texts = sample_texts(draft_plan(find_sources(inputs, say), settings, {}, note=say), sample)
    encoder = Encoder.load(model, adapters=adapter or (), layers=layers, dtype=dtype)
    encoder.whiten(
        texts,
        power=power,
        instruction=instruction,
        prompt_name=prompt_name,
        show_progress=False if as_json else None,
    )
    width = encoder.spec.dense[-1].out_features
    if len(texts) < width:
        say(f"{counted(len(texts), 'text')} for {width} axes: more of them, where there are any, fit better")
    encoder.save(out, overwrite=overwrite)
    if as_json:
        print(json.dumps({"folder": str(out), "texts": len(texts), "power": power}))
    else:
        stdout.print(f"wrote {out}, fitted to {counted(len(texts), 'text')}", highlight=False)


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command()(embed)
    app.command()(whiten)
    app.command("embed-shard")(embed_shard)
    app.command()(search)


def _check(folder: str, as_json: bool) -> None:
    from flashvec.runtime.corpus.manifest import check_job
    from flashvec.runtime.corpus.reporter import counted
    from flashvec.runtime.corpus.storage import Storage

    check: Any = check_job(Storage(folder))
    if as_json:
        print(json.dumps(asdict(check)))
    else:
        stdout.print(
            f"{check.num_done} of {counted(check.num_shards, 'shard')} whole, {counted(check.rows, 'vector')}, "
            f"{counted(check.errors, 'error')}"
        )
        for problem in check.problems:
            stdout.print(problem, highlight=False)
    if check.problems:
        raise typer.Exit(1)


def devices_of(device: str | None) -> list[str | None]:
    """One worker for each: all GPUs by default, the CPU where there is none."""
    import torch

    from flashvec.runtime.placement import choose_devices

    if device is None and not torch.cuda.device_count():  # asks the driver, opens no device
        return [None]
    return [str(chosen) for chosen in choose_devices(device or "all")]
