"""How good vectors are before and after training: a decoder's own readings, untrained, beside an adapter's.

    python -m flashvec.bench.bench_quality --model demo-cache/smollm2-135m --adapter models/smollm2-135m \\
        --sts sts-dev.csv --sts SICK_trial.txt --retrieval CISI.ALL --retrieval Cranfield

Untrained: bidirectional mean pooling, causal mean pooling, and the strongest reading known of an untrained decoder,
the last token's state under a one-word prompt (Jiang et al. 2023), two layers before the end. Trained: bidirectional
mean pooling without a prompt. All means at the model's full depth and cut (`--depths`). Retrieval also with vectors
whitened by the collection's documents, and by BM25 (Robertson; Lucene's form, with English stop words and stems), whose
weights of words are those documents' too. Beside them, other encoders (`--beside`), run by
transformers. Words by linear probes on their vectors, three seeds. Spearman of cosines, nDCG@10, accuracy (parts of
speech, chunks), entities' F1, all x 100.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flashvec.bench.rows import WHITENED
from flashvec.bench.timing import append_rows
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.whitening import POWER
from flashvec.training.collection_files import Collection, read_collection
from flashvec.training.evaluate import sts_score
from flashvec.training.retrieval import judged_queries, ranking_score, vector_score
from flashvec.training.scored_pairs import read_scored_pairs
from flashvec.training.word_files import TASKS, read_tagged
from flashvec.training.words import MEASURES, probe_words

ONE_WORD = 'This sentence : "{text}" means in one word:"'
LAYERS_BEFORE_END = 2
TRAINED = "trained"


class Reading(NamedTuple):
    """One way to read vectors."""

    variant: str
    load: dict[str, Any]  # what `Encoder.load` is told
    instruction: str | None = None
    beside: Path | None = None  # another model, that transformers runs

    def open(self, model: str) -> Any:
        if self.beside is None:
            return Encoder.load(model, **self.load)
        from flashvec.training.hf_encoder import HfEncoder

        return HfEncoder(str(self.beside))


class WordTask(NamedTuple):
    """Words to tag: which tags, the sentences that a probe sees, those that it is judged on."""

    task: str
    train: Path
    dev: Path
    max_sentences: int | None = None  # of each file


def readings(
    num_layers: int, adapters: tuple[str, ...], depths: list[int], *, untrained: bool, name: str = TRAINED
) -> Iterator[Reading]:
    """Those without training, then the adapters'; means at each depth.

    Args:
        num_layers: of the model.
        adapters: one over another; none leaves their readings out.
        depths: numbers of layers to run, besides all.
        untrained: include the readings without an adapter.
        name: of the adapters' readings.
    """
    cuts = sorted({*depths, num_layers}, reverse=True)
    at = {layers: "" if layers == num_layers else f", {layers} layers" for layers in cuts}
    if untrained:
        for attention in ("bidirectional", "causal"):
            for layers in cuts:
                load = {"attention": attention, "pooling": "mean", "layers": layers}
                yield Reading(f"untrained, {attention}, mean{at[layers]}", load)
        layers = max(1, num_layers - LAYERS_BEFORE_END)
        causal = {"attention": "causal", "pooling": "last", "layers": layers}
        yield Reading(f"untrained, causal, one-word prompt, layer {layers}", causal, ONE_WORD)
    if adapters:
        for layers in cuts:
            yield Reading(f"{name}, bidirectional, mean{at[layers]}", {"adapters": adapters, "layers": layers})


def measure(
    reading: Reading, model: str, sts: list[Path], retrieval: list[Path], words: list[WordTask], shift: int = 0
) -> Iterator[dict[str, Any]]:
    """A row for each file, of collections two: plain and whitened.

    Args:
        reading: of it.
        model: folder or GGUF file.
        sts: files of scored pairs.
        retrieval: judged collections.
        words: to tag; read without a prompt, so not by a reading that has one.
        shift: places to the left that a token's state is read at, for models of MNTP alone.
    """
    encoder = reading.open(model)

    as_pooled = {} if reading.beside else {"normalize": False}

    def embed(texts: Any) -> Any:
        return encoder.embed(list(texts), instruction=reading.instruction, **as_pooled)

    dtype = getattr(encoder, "dtype", torch.float32)
    about = {"benchmark": "quality", "model": Path(model).name, "variant": reading.variant, "dtype": str(dtype)}
    for file in sts:
        start = time.perf_counter()
        found = sts_score(embed, read_scored_pairs(file))
        yield {**about, "data": file.stem, "score": found["spearman"], "measure": "Spearman", "pairs": found["pairs"],
               "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
    for file in retrieval:
        start, collection = time.perf_counter(), read_collection(file)
        queries = embed(collection.queries[query] for query in judged_queries(collection))
        documents = embed(collection.documents.values())
        for power, ending in ((None, ""), (POWER, WHITENED)):
            scores = vector_score(queries, documents, collection, whitening=power)
            taken = round(time.perf_counter() - start, 1)
            yield {**about, "data": file.stem + ending, **_retrieval(scores), "seconds": taken}
    for task in words if reading.instruction is None else []:
        start = time.perf_counter()
        train, dev = (read_tagged(path, task.task, max_sentences=task.max_sentences) for path in task[1:3])
        found = probe_words(lambda w: encoder.embed_words(w, shift=shift), train, dev, has_entities=task.task != "pos")
        key, name = ("f1", "F1") if task.task == "ner" else ("accuracy", "accuracy")
        measures = {each: found[each] for each in MEASURES if each in found}
        yield {**about, "data": f"{task.dev.stem} {task.task}", "score": found[key], "deviation": found[f"{key}_std"],
               "measure": name, **measures, "words": found["words"], "sentences": len(train), "shift": shift,
               "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def measure_bm25(model: str, dtype: torch.dtype, retrieval: list[Path]) -> Iterator[dict[str, Any]]:
    """A row for each file, in the table of a model in a dtype; none where bm25s is not installed."""
    if retrieval and not all(importlib.util.find_spec(name) for name in ("bm25s", "Stemmer")):
        print("no BM25: it needs pip install bm25s PyStemmer", flush=True)
        return
    for file in retrieval:
        start = time.perf_counter()
        scores = bm25_score(read_collection(file))
        yield {"benchmark": "quality", "model": Path(model).name, "variant": "BM25", "dtype": str(dtype),
               "data": file.stem, **_retrieval(scores), "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def _retrieval(scores: dict[str, float]) -> dict[str, Any]:
    return {"score": scores["ndcg@10"], "measure": "nDCG@10", "queries": scores["queries"]}


def bm25_score(collection: Collection) -> dict[str, float]:
    """`ranking_score` of BM25 (bm25s, its defaults), words stemmed by Snowball."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words(list(collection.documents.values())), show_progress=False)
    queries = words([collection.queries[query] for query in judged_queries(collection)])
    nothing = np.zeros(len(collection.documents), np.float32)  # for a query of stop words alone
    return ranking_score((index.get_scores(query) if query else nothing for query in queries), collection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model: folder or GGUF file")
    parser.add_argument(
        "--adapter", action="append", default=[], help="adapter folder, repeated for one over another; default none"
    )
    parser.add_argument("--name", default=TRAINED, help="what the adapter's rows are called; default %(default)s")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="numbers of layers to cut the model at")
    parser.add_argument("--trained-only", action="store_true", help="leave the untrained readings out")
    parser.add_argument("--sts", type=Path, action="append", default=[], help="scored pairs; may be repeated")
    parser.add_argument(
        "--retrieval", type=Path, action="append", default=[], help="judged collection; may be repeated"
    )
    parser.add_argument("--beside", type=Path, action="append", default=[], help="folder of another encoder")
    parser.add_argument(
        "--words", nargs=3, action="append", default=[], metavar=("TASK", "TRAIN", "DEV"),
        help="pos, ner or chunk, and two files of tagged words; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max-sentences", type=int, help="of --words, of each file")
    parser.add_argument(
        "--shift", action="store_true", help="of --words: an adapter's states are read one place to the left"
    )
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    if not (options.sts or options.retrieval or options.words):
        parser.error("name what to measure on: --sts FILE, --retrieval FILE or --words TASK TRAIN DEV")
    if options.trained_only and not (options.adapter or options.beside):
        parser.error("--trained-only needs --adapter or --beside")
    if odd := [task for task, _, _ in options.words if task not in TASKS]:
        parser.error(f"--words {odd[0]}: known are {', '.join(TASKS)}")
    try:
        run(options)
    except ValueError as error:  # a model or a file: says what and where
        sys.exit(f"bench_quality: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure, print and keep, row by row."""
    base = Encoder.load(options.model)
    untrained = not options.trained_only
    num_layers = base.spec.decoder.num_layers
    found = readings(num_layers, tuple(options.adapter), options.depths, untrained=untrained, name=options.name)
    beside = [Reading(folder.resolve().name, {}, beside=folder) for folder in options.beside]
    words = [WordTask(task, Path(train), Path(dev), options.max_sentences) for task, train, dev in options.words]
    rows = chain.from_iterable(
        measure(
            each, options.model, options.sts, options.retrieval, words, int(options.shift and "adapters" in each.load)
        )
        for each in chain(found, beside)
    )
    for row in chain(measure_bm25(options.model, base.dtype, options.retrieval if untrained else []), rows):
        shown = f"{row['variant']:56} {row['data']:14} {row['measure']} {row['score']:6.2f}"
        print(f"{shown}  {row['seconds']} s", flush=True)
        if not options.dry:
            append_rows([row])


if __name__ == "__main__":
    main()
