"""`flashvec evaluate`: sentence pairs, search, words, and the Massive Text Embedding Benchmark."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvec.runtime.cli_corpus import Adapters, Attention, Layers, Pooling, pooling_modes
from flashvec.runtime.console import stdout

evaluate_app = typer.Typer(help="Measure an encoder on files.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default bfloat16 where the processor has it.")
]
Backend = Annotated[str, typer.Option(help="flashvec, or hf: Hugging Face's own model, for any encoder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _choices(
    adapter: list[str] | None,
    attention: str | None,
    layers: int | None,
    dtype: str | None,
    pooling: str | None = None,
) -> dict[str, Any]:
    """What `Encoder.load` is told."""
    rules = {"attention": attention, "pooling": pooling_modes(pooling)}
    return {"adapters": adapter or (), "layers": layers, "dtype": dtype, **rules}


def _open(model: str, backend: str, choices: dict[str, Any]) -> Any:
    """An `Encoder`, or an `HfEncoder` for a model's own code."""
    if backend == "flashvec":
        from flashvec.runtime.encoder import Encoder

        return Encoder.load(model, **choices)
    if backend != "hf":
        raise ValueError(f"backend is {backend!r}; known are flashvec and hf")
    given = [name for name, value in choices.items() if value]
    if given:
        raise ValueError(f"backend hf runs a model as it is, without {', '.join(given)}")
    from flashvec.training.hf_encoder import HfEncoder

    return HfEncoder(model)


def _dtype(encoder: Any) -> str:
    """What the model ran in: scores move by some hundredths with it."""
    return str(encoder.dtype).removeprefix("torch.")


@evaluate_app.command()
def sts(
    model: Model,
    pairs: Annotated[Path, typer.Argument(help="Scored pairs: .csv, .tsv, .txt or .jsonl.", show_default=False)],
    adapter: Adapters = None,
    attention: Attention = None,
    pooling: Pooling = None,
    layers: Layers = None,
    dtype: Dtype = None,
    instruction: Annotated[str | None, typer.Option(help="Before each text, or around its {text}.")] = None,
    backend: Backend = "flashvec",
    as_json: Json = False,
) -> None:
    """Correlation of cosines with people's scores of sentence pairs, times 100.

    Example: `flashvec evaluate sts ./my-encoder sts-dev.csv`
    """
    from flashvec.training.evaluate import sts_score
    from flashvec.training.scored_pairs import read_scored_pairs

    read = read_scored_pairs(pairs)
    choices = _choices(adapter, attention, layers, dtype, pooling)
    encoder = _open(model, backend, choices)
    found = sts_score(lambda texts: encoder.embed(list(texts), instruction=instruction), read)
    if as_json:
        print(json.dumps({"model": model, "file": pairs.name, "dtype": _dtype(encoder), **found}))
        return
    facts = f"Spearman {found['spearman']:.2f}, Pearson {found['pearson']:.2f}"
    stdout.print(f"{pairs.name}: {facts} over {found['pairs']} pairs, in {_dtype(encoder)}", highlight=False)


@evaluate_app.command()
def retrieval(
    model: Model,
    collection: Annotated[
        Path, typer.Argument(help="BEIR folder, or a SMART collection's folder or .ALL file.", show_default=False)
    ],
    adapter: Adapters = None,
    attention: Attention = None,
    pooling: Pooling = None,
    layers: Layers = None,
    dtype: Dtype = None,
    instruction: Annotated[
        str | None, typer.Option(help="Before each query; default the model's prompt for queries, as for documents.")
    ] = None,
    whiten: Annotated[
        float | None,
        typer.Option(help="Fit vectors to the documents as `flashvec whiten` does; its power.", min=0, max=0.5),
    ] = None,
    backend: Backend = "flashvec",
    as_json: Json = False,
) -> None:
    """Search a judged collection by cosine: nDCG@10 and recall@100, times 100.

    Example: `flashvec evaluate retrieval ./my-encoder ./scifact --instruction "Query: "`
    """
    from flashvec.training.collection_files import read_collection
    from flashvec.training.retrieval import retrieval_score, search_prompts

    read = read_collection(collection)
    choices = _choices(adapter, attention, layers, dtype, pooling)
    encoder = _open(model, backend, choices)

    def embedder(**settings: Any) -> Any:
        return lambda texts: encoder.embed(texts, **settings)

    if backend == "hf":
        queries, documents = embedder(instruction=instruction), embedder()
    else:
        own = search_prompts(encoder.spec.prompts, instruction)
        queries, documents = (embedder(normalize=False, **settings) for settings in own)
    found = retrieval_score(queries, documents, read, whitening=whiten)
    if as_json:
        print(json.dumps({"model": model, "collection": collection.name, "dtype": _dtype(encoder), **found}))
        return
    facts = f"nDCG@10 {found['ndcg@10']:.2f}, recall@100 {found['recall@100']:.2f}"
    stdout.print(f"{collection.name}: {facts} over {found['queries']} queries, in {_dtype(encoder)}", highlight=False)


@evaluate_app.command()
def words(
    train: Annotated[Path, typer.Argument(help="Tagged words: .conllu, or CoNLL columns.", show_default=False)],
    dev: Annotated[Path, typer.Argument(help="The same, to measure on.", show_default=False)],
    task: Annotated[str, typer.Option(help="pos, ner or chunk (in CoNLL-U cut from its trees).", show_default=False)],
    model: Annotated[str, typer.Option(help="Model folder, GGUF file or hub id.", show_default=False)],
    column: Annotated[
        str | None, typer.Option(help="Of the tags: a number, a line's first being 1, or upos, ...")
    ] = None,
    shift: Annotated[
        bool, typer.Option("--shift", help="Read a token's state one place to the left, for MNTP models.")
    ] = False,
    adapter: Adapters = None,
    attention: Attention = None,
    layers: Layers = None,
    dtype: Dtype = None,
    seeds: Annotated[int, typer.Option(help="Probes to train; mean and deviation are shown.", min=1)] = 3,
    max_sentences: Annotated[int | None, typer.Option(help="Of each file, from its start.", min=2)] = None,
    backend: Backend = "flashvec",
    as_json: Json = False,
) -> None:
    """Tag words by a linear probe on the frozen encoder's word vectors: accuracy, and F1 of whole entities or chunks.

    Example: `flashvec evaluate words train.conllu dev.conllu --task pos --model ./my-encoder`
    """
    from flashvec.training.word_files import read_tagged
    from flashvec.training.words import probe_words, without_template

    read = [read_tagged(path, task, column=column, max_sentences=max_sentences) for path in (train, dev)]
    choices = _choices(adapter, attention, layers, dtype)
    encoder = _open(model, backend, choices)
    if backend == "flashvec":
        encoder = without_template(encoder)
    found = probe_words(
        lambda lists: encoder.embed_words(lists, shift=int(shift)), *read, has_entities=task != "pos", seeds=seeds
    )
    if as_json:
        names = {"model": model, "task": task, "train": train.name, "dev": dev.name, "dtype": _dtype(encoder)}
        print(json.dumps({**names, **found}))
        return
    spread = {
        name: f" ± {found[f'{name}_std']:.2f}" if seeds > 1 else "" for name in ("accuracy", "f1") if name in found
    }
    facts = f"accuracy {found['accuracy']:.2f}{spread['accuracy']} (the commonest tag alone {found['commonest']:.2f})"
    if "f1" in found:
        kind = "chunks" if task == "chunk" else "entities"
        facts += f", F1 {found['f1']:.2f}{spread['f1']} of {found['entities']} {kind}"
    facts += f" over {found['words']} words, {seeds} {'seeds' if seeds > 1 else 'seed'}, in {_dtype(encoder)}"
    stdout.print(f"{dev.name}, {task}: {facts}", highlight=False)


@evaluate_app.command()
def mteb(
    model: Annotated[str, typer.Option(help="Model folder, GGUF file or hub id.", show_default=False)],
    tasks: Annotated[
        list[str], typer.Option(help="Names of mteb's tasks, with commas or repeated.", show_default=False)
    ],
    instructions: Annotated[Path | None, typer.Option(help="JSON: a task's name and what stands before texts.")] = None,
    adapter: Adapters = None,
    attention: Attention = None,
    pooling: Pooling = None,
    layers: Layers = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for all that mteb measured.")] = None,
    as_json: Json = False,
) -> None:
    """Run tasks of the Massive Text Embedding Benchmark; mteb fetches their data. Main scores, times 100.

    Example: `flashvec evaluate mteb --model ./my-encoder --tasks STSBenchmark,SciFact`
    """
    from flashvec.training.mteb_encoder import MtebEncoder, evaluate_mteb, find_tasks, read_instructions

    found_tasks = find_tasks([name.strip() for part in tasks for name in part.split(",") if name.strip()])
    read = None if instructions is None else read_instructions(instructions)
    choices = _choices(adapter, attention, layers, dtype, pooling)
    encoder = _open(model, "flashvec", choices)
    result = evaluate_mteb(MtebEncoder(encoder, model, instructions=read), found_tasks, show_progress=not as_json)
    if out is not None:
        result.to_disk(out)
    scores = {task.task_name: round(100 * float(task.get_score()), 4) for task in result.task_results}
    if as_json:
        print(json.dumps({"model": model, "dtype": _dtype(encoder), "scores": scores}))
        return
    for name, score in scores.items():
        stdout.print(f"{name}: {score:.2f}, in {_dtype(encoder)}", highlight=False)
