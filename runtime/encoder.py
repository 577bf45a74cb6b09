"""`Encoder`: a decoder LLM as a text encoder. Load it, embed texts."""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.kernels.rms_norm import rms_norm
from flashvec.runtime import engine, prepare
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides, open_checkpoint, resolve
from flashvec.runtime.decoder import Decoder, DecoderLoader
from flashvec.runtime.pooling import DenseHead, finish, pool, quantize
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import as_instructions, as_texts
from flashvec.runtime.tokenize import Tokens

logger = logging.getLogger("flashvec")

WINDOW = 8192  # texts tokenised, sorted and packed together: bounds memory, long enough to fill packs evenly
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Instruction = str | Sequence[str] | None


class TruncationWarning(UserWarning):
    """Texts were longer than `max_length`; the message says how many."""


class TokenVectors(NamedTuple):
    """One text's tokens: `vectors` fp32 [len, d], `offsets` int32 [len, 2] characters, `ids` int32 [len]."""

    vectors: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray


class SpanVectors(NamedTuple):
    """One forward, three grains: `documents` [n, d], `spans` one [s, d] per text, `tokens` one `TokenVectors` each."""

    documents: np.ndarray
    spans: list[np.ndarray]
    tokens: list[TokenVectors]


class Encoder:
    """A text encoder: `Encoder.load(model).embed(texts)`.

    The same text gives the same bits alone or in any batch, in any order, under any token budget (CPU; same
    machine, dtype and thread count).
    """

    def __init__(self, spec: ModelSpec, decoder: Decoder, tokenizer: Any, heads: Sequence[DenseHead] = ()) -> None:
        self.spec = spec
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.heads = list(heads)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        adapters: str | Path | Sequence[str | Path] = (),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attention: Literal["bidirectional", "causal"] | None = None,
        pooling: str | Sequence[str] | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        compat: Literal["llm2vec"] | None = None,
        layers: int | None = None,
        local_files_only: bool = False,
    ) -> "Encoder":
        """Load a model from a folder, a GGUF file or the hub.

        Args:
            model: a Hugging Face decoder folder, an LLM2Vec or PEFT adapter folder, a sentence-transformers folder, a
                GGUF file, a folder written by `save`, or a hub id of one of these. Weights are read from safetensors
                or GGUF only; no code from a model is ever run.
            revision: branch, tag or commit of a hub id.
            adapters: PEFT adapters to merge, in this order.
            device: where to run; default CUDA if there is one, else the CPU.
            dtype: float32, bfloat16 or float16; default bfloat16 where the processor has it in hardware, else float32.
            attention, pooling: override what the layout says. `pooling` is one of mean, weighted_mean,
                mean_sqrt_len, max, last, cls, or several to concatenate.
            max_length: tokens a text may have, special tokens included; default the layout's, else 512.
            truncate_dim: keep this many leading dimensions (Matryoshka).
            compat: "llm2vec" follows the reference to the letter (its mask by count, its word-wise cut, no window,
                unnormalised vectors).
            layers: run only the first `layers` layers.
            local_files_only: never ask the hub.

        Raises:
            CheckpointError: the model's files; the message names the file, the key and the cure.
            ValueError: an argument; the message names it.
        """
        if compat not in (None, "llm2vec"):
            raise ValueError(f"compat is {compat!r}; the only one is 'llm2vec'")
        device, torch_dtype = _choose_device(device), None if dtype is None else _choose_dtype(dtype)
        modes = pooling if pooling is None or isinstance(pooling, str) else tuple(pooling)
        overrides = Overrides(attention, modes, max_length, truncate_dim, compat)
        adapter_list = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        path = resolve(model, revision, local_files_only)
        checkpoint = open_checkpoint(path, overrides, tuple(str(a) for a in adapter_list))
        for notice in checkpoint.notices:
            logger.warning("%s: %s", path.name, notice)
        return cls._from_checkpoint(checkpoint, device, torch_dtype, layers)

    @classmethod
    def _from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, layers: int | None
    ) -> "Encoder":
        spec = checkpoint.spec
        if layers is not None and not 1 <= layers <= spec.decoder.num_layers:
            raise ValueError(f"layers is {layers}, the model has {spec.decoder.num_layers}")
        width = spec.dense[-1].out_features if spec.dense else spec.decoder.hidden_size * len(spec.pooling)
        if spec.truncate_dim is not None and not 1 <= spec.truncate_dim <= width:
            raise ValueError(f"truncate_dim is {spec.truncate_dim}, the model's vectors have {width} dimensions")
        if dtype is None:
            dtype = torch.bfloat16 if has_hardware_bf16(device) else torch.float32
        decoder = DecoderLoader(spec.decoder, checkpoint.source, dtype, device).load(layers)
        if layers is not None:
            decoder.spec = replace(spec.decoder, num_layers=layers)
            spec = replace(spec, decoder=decoder.spec)
        heads = [
            DenseHead(weight.to(device), None if bias is None else bias.to(device), dense.activation)
            for (weight, bias), dense in zip(checkpoint.dense, spec.dense, strict=True)
        ]
        return cls(spec, decoder, checkpoint.tokenizer, heads)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Encoder({spec.decoder.family}, {spec.attention}, {'+'.join(spec.pooling)}, "
            f"dim={spec.embedding_size}, max_length={spec.max_length}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # --- vectors of texts ---------------------------------------------------------------------------

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        instruction: Instruction = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        output: Literal["numpy", "torch"] = "numpy",
        out: np.ndarray | None = None,
        split_special: bool = False,
    ) -> Any:
        """One vector per text.

        Args:
            texts: a str, or any iterable of them (list, generator, array, column).
            instruction: written before each text as it stands, or around it where it holds `{text}`; one for all, or
                one per text. Its tokens attend but are not pooled, unless the layout says otherwise.
            prompt_name: a name from `spec.prompts`, instead of `instruction`.
            normalize: L2-normalise; default the layout's rule.
            truncate_dim: keep the leading dimensions.
            precision: float32, float16, int8 and uint8 (after `calibrate`), binary and ubinary (packed signs).
            max_length: tokens per text, special tokens included; longer texts are cut with one warning.
            batch_tokens: tokens run together; changes speed and memory, never the vectors.
            show_progress: a bar on stderr; default on a terminal when it takes a while.
            output: "numpy", or "torch" for a tensor that stays on the device.
            out: array or memmap [n, d] to write into; it is also returned.
            split_special: read special-token strings inside a text as plain text. By default they become control
                tokens, as in Hugging Face.

        Returns:
            [n, d] in input order; [d] for a str; [0, d] for no texts. float32 unless `precision` says otherwise. An
            empty text gives the vector of its BOS (or EOS) token, never NaN.

        Raises:
            TypeError, ValueError: what cannot be embedded; the message names the row or the argument.
        """
        rows, single = as_texts(texts)
        dim = self._check_dim(truncate_dim)
        if output not in ("numpy", "torch"):
            raise ValueError(f"output is {output!r}, known are 'numpy' and 'torch'")
        if output == "torch" and precision not in ("float32", "float16"):
            raise ValueError(f"output='torch' gives float32 or float16, precision is {precision!r}")
        quantize(np.zeros((0, dim), np.float32), precision, self.spec.int8_ranges)  # refuse before working
        instructions = self._instructions(instruction, prompt_name, len(rows))
        vectors = torch.empty(len(rows), dim, dtype=torch.float32, device=self.device)
        settings = (max_length, batch_tokens, split_special)
        for indices, part in self._vectors(rows, instructions, normalize, truncate_dim, settings, show_progress):
            vectors[torch.from_numpy(indices).to(self.device)] = part
        if output == "torch":
            result: Any = vectors.to(torch.float16) if precision == "float16" else vectors
        else:
            result = quantize(vectors.cpu().numpy(), precision, self.spec.int8_ranges)
        if out is not None:
            if output == "torch" or out.shape != result.shape:
                raise ValueError(f"out has shape {out.shape}, the vectors are {tuple(result.shape)} (output='numpy')")
            out[...] = result
            result = out
        return result[0] if single else result

    def embed_iter(self, texts: Iterable[str], *, window: int = WINDOW, **settings: Any) -> Iterator[np.ndarray]:
        """Vectors of a stream, one at a time in input order; holds at most `window` texts in memory.

        Takes `embed`'s other arguments (a single `instruction`, no `out`).
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be an iterable of str, got {type(texts).__name__}")
        if isinstance(settings.get("instruction"), list | tuple):
            raise ValueError("embed_iter takes one instruction for all texts: a stream's length is not known")
        held: list[str] = []
        for text in texts:
            held.append(text)
            if len(held) == window:
                yield from self.embed(held, **settings)
                held = []
        if held:
            yield from self.embed(held, **settings)

    def calibrate(self, texts: Iterable[str], **settings: Any) -> None:
        """Set the value ranges of int8 vectors from typical texts; kept in `spec` and by `save`.

        Args:
            texts: some hundreds of texts like those to come.
            settings: `instruction`, `prompt_name` and `normalize` as they will be used.
        """
        vectors = self.embed(list(texts), **settings)
        if len(vectors) < 2:
            raise ValueError(f"calibrate needs at least two texts, got {len(vectors)}")
        low, high = vectors.min(0), vectors.max(0)
        self.spec = replace(self.spec, int8_ranges=(tuple(low.tolist()), tuple(high.tolist())))

    def count_tokens(self, texts: str | Iterable[str]) -> Any:
        """Tokens of each text as it would be embedded without instruction, special tokens included, uncut: int [n]."""
        rows, single = as_texts(texts)
        prepared = prepare.prepare(replace(self.spec, compat=None), rows, None, self.tokenizer)
        counts = self.tokenizer.count(prepared.strings, special=True)
        return int(counts[0]) if single else counts

    # --- vectors of tokens, words and spans -----------------------------------------------------------

    def embed_tokens(
        self, texts: Iterable[str], *, instruction: Instruction = None, normalize: bool = False, **settings: Any
    ) -> list[TokenVectors]:
        """The final state of every token, special tokens included.

        Args:
            texts: as in `embed`; a str gives a list of one.
            instruction: as in `embed`; its tokens are part of the result, offsets count from its first character.
            normalize: L2-normalise each token's vector.
            settings: `max_length`, `batch_tokens`, `split_special`.

        Returns:
            One `TokenVectors` per text: vectors fp32 [len, D], offsets int32 [len, 2], ids int32 [len].
        """
        rows, _ = as_texts(texts)
        instructions = self._instructions(instruction, None, len(rows))
        result: list[TokenVectors | None] = [None] * len(rows)
        for pack_rows, tokens, starts, states in self._states(rows, instructions, settings):
            for i, state in zip(pack_rows, states, strict=True):
                own = slice(starts[i], starts[i + 1])
                if normalize:
                    state = torch.nn.functional.normalize(state, dim=-1)
                assert tokens.offsets is not None
                result[i] = TokenVectors(state.cpu().numpy(), tokens.offsets[own], tokens.ids[own])
        return [r for r in result if r is not None]

    def embed_words(self, words: Iterable[Sequence[str]], **settings: Any) -> list[np.ndarray]:
        """One vector per word of texts that are already split: the mean of the word's token states.

        Args:
            words: lists of words; they are joined by single spaces.
            settings: as in `embed_tokens`.

        Returns:
            One fp32 [words, D] array per list; a word cut off by `max_length` has a zero row.
        """
        lists = [list(w) for w in words]
        for row, word_list in enumerate(lists):
            if not all(isinstance(w, str) for w in word_list):
                raise TypeError(f"words[{row}] must be a list of str")
        spans = []
        for word_list in lists:
            stops = np.cumsum([len(w) + 1 for w in word_list]) - 1 if word_list else np.zeros(0, int)
            spans.append([(int(s) - len(w), int(s)) for s, w in zip(stops, word_list, strict=True)])
        return self.embed_spans([" ".join(w) for w in lists], spans, normalize=False, **settings).spans

    def embed_spans(
        self,
        texts: Iterable[str],
        spans: Sequence[Sequence[tuple[int, int]]],
        *,
        normalize: bool | None = None,
        **settings: Any,
    ) -> SpanVectors:
        """Documents, parts of them and their tokens from one forward: every part has seen the whole text.

        Args:
            texts: n texts.
            spans: for each text, character ranges (start, stop); they may nest and overlap.
            normalize: for document and span vectors; default the layout's rule.
            settings: `max_length`, `batch_tokens`, `split_special`.

        Returns:
            `SpanVectors`. A span is the mean of the final states of the tokens that overlap it (before dense heads); one
            without any (cut off, or empty) is a zero row.

        Raises:
            ValueError: a wrong number of lists, or a range outside its text.
        """
        rows, _ = as_texts(texts)
        if len(spans) != len(rows):
            raise ValueError(f"spans has {len(spans)} entries for {len(rows)} texts: give one list per text")
        for row, ranges in enumerate(spans):
            for start, stop in ranges:
                if not 0 <= start <= stop <= len(rows[row]):
                    raise ValueError(f"spans[{row}] has ({start}, {stop}); text {row} has {len(rows[row])} characters")
        wanted = self.spec.normalize if normalize is None else normalize
        width = self.decoder.spec.hidden_size
        parts: list[np.ndarray] = [np.zeros((len(ranges), width), np.float32) for ranges in spans]
        token_vectors = self.embed_tokens(rows, **settings)
        special = np.array(sorted({*self.tokenizer.prefix_ids, *self.tokenizer.suffix_ids}), dtype=np.int32)
        for row, (vectors, offsets, ids) in enumerate(token_vectors):
            # Template tokens carry the empty range (0, 0), so only a zero-width span could meet them.
            outside = np.isin(ids, special) & (offsets[:, 1] == 0)
            for i, (start, stop) in enumerate(spans[row]):
                first, last = prepare.char_span_to_tokens(offsets, outside, start, stop)
                if last > first:
                    part = vectors[first:last].mean(0, dtype=np.float64).astype(np.float32)
                    parts[row][i] = part / max(float(np.linalg.norm(part)), 1e-12) if wanted else part
        documents = self.embed(rows, normalize=normalize, **settings)
        return SpanVectors(documents, parts, token_vectors)

    # --- sentence-transformers' names -------------------------------------------------------------------

    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """`embed` under sentence-transformers' name and parameters.

        `batch_size` counts rows there and has no meaning here (packs are filled by tokens); `device` is where the
        encoder was loaded. Both are accepted so that code written for that library runs as it is.
        """
        if output_value == "token_embeddings":
            states = self.embed_tokens(inputs if not isinstance(inputs, str) else [inputs], instruction=prompt)
            tensors = [torch.from_numpy(s.vectors) for s in states]
            return tensors[0] if isinstance(inputs, str) else tensors
        if output_value != "sentence_embedding":
            raise ValueError(f"output_value is {output_value!r}, known are sentence_embedding and token_embeddings")
        result = self.embed(
            inputs,
            instruction=prompt,
            prompt_name=prompt_name,
            normalize=True if normalize_embeddings else None,
            truncate_dim=truncate_dim,
            precision=precision,
            show_progress=show_progress_bar,
            output="torch" if convert_to_tensor else "numpy",
        )
        return result if convert_to_numpy or convert_to_tensor else [torch.from_numpy(row) for row in result]

    def encode_query(self, inputs: str | Iterable[str], **settings: Any) -> Any:
        """`encode` with the prompt named "query", where the model has one."""
        return self._encode_as(("query",), inputs, settings)

    def encode_document(self, inputs: str | Iterable[str], **settings: Any) -> Any:
        """`encode` with the first prompt named "document", "passage" or "corpus" that the model has."""
        return self._encode_as(("document", "passage", "corpus"), inputs, settings)

    def _encode_as(self, names: Sequence[str], inputs: Any, settings: dict[str, Any]) -> Any:
        if settings.get("prompt") is None and settings.get("prompt_name") is None:
            settings["prompt_name"] = next((name for name in names if name in self.spec.prompts), None)
        return self.encode(inputs, **settings)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Score of every vector of the first against every one of the second: fp32 [n1, n2], by `spec.similarity`."""
        a, b = (torch.atleast_2d(torch.as_tensor(np.asarray(x), dtype=torch.float32)) for x in (embeddings1, embeddings2))
        if self.spec.similarity == "dot":
            return a @ b.T
        if self.spec.similarity in ("euclidean", "manhattan"):
            return -torch.cdist(a, b, p=2 if self.spec.similarity == "euclidean" else 1)
        return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T

    # --- the way of a text ------------------------------------------------------------------------------

    def _check_dim(self, truncate_dim: int | None) -> int:
        if truncate_dim is not None and not 1 <= truncate_dim <= self.spec.embedding_size:
            raise ValueError(f"truncate_dim is {truncate_dim}, the vectors have {self.spec.embedding_size} dimensions")
        return truncate_dim or self.spec.embedding_size

    def _instructions(self, instruction: Instruction, prompt_name: str | None, n: int) -> list[str] | None:
        prompts = self.spec.prompts
        if instruction is not None and prompt_name is not None:
            raise ValueError("give instruction or prompt_name, not both")
        if prompt_name is not None:
            if prompt_name not in prompts:
                known = ", ".join(prompts) or "none"
                raise ValueError(f"prompt_name is {prompt_name!r}; this model's prompts are: {known}")
            instruction = prompts[prompt_name]
        elif instruction is None and self.spec.default_prompt_name is not None:
            instruction = prompts.get(self.spec.default_prompt_name)
        found = as_instructions(instruction, n)
        return None if found is None or not any(found) else found

    def _tokens(
        self, rows: list[str], instructions: list[str] | None, max_length: int | None, offsets: bool, split: bool
    ) -> tuple[prepare.Prepared, Tokens]:
        limit = self.spec.max_length if max_length is None else max_length
        if not 1 <= limit <= self.spec.decoder.max_positions:
            raise ValueError(f"max_length is {limit}, the model has {self.spec.decoder.max_positions} positions")
        prepared = prepare.prepare(self.spec, rows, instructions, self.tokenizer)
        return prepared, prepare.tokenise(
            self.tokenizer, prepared, limit, offsets=offsets, split_special=split
        )

    def _vectors(
        self,
        rows: list[str],
        instructions: list[str] | None,
        normalize: bool | None,
        truncate_dim: int | None,
        settings: tuple[int | None, int | None, bool],
        show_progress: bool | None,
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Row numbers and finished fp32 vectors, pack by pack."""
        max_length, batch_tokens, split = settings
        budget = self._budget(batch_tokens)
        offsets = self.spec.span == "template" or (self.spec.span == "offsets" and instructions is not None)
        num_truncated = 0
        with _Progress(len(rows), show_progress) as progress:
            for at in range(0, len(rows), WINDOW):
                own = None if instructions is None else instructions[at : at + WINDOW]
                prepared, tokens = self._tokens(rows[at : at + WINDOW], own, max_length, offsets, split)
                num_truncated += int(tokens.truncated.sum())
                spans = prepare.pooled_spans(self.spec, tokens, prepared, own, self.tokenizer)
                causal = self.spec.attention == "causal"
                for done in engine.run(self.decoder, tokens.ids, tokens.lengths, budget, causal):
                    spans_B2 = torch.from_numpy(spans[done.indices]).to(self.device)
                    pooled = pool(self.spec, self.decoder, done, spans_B2)
                    yield done.indices + at, finish(self.spec, pooled, self.heads, normalize, truncate_dim)
                    progress.advance(len(done.indices), done.schedule.num_tokens)
        if num_truncated:
            limit = self.spec.max_length if max_length is None else max_length
            warnings.warn(
                f"{num_truncated} of {len(rows)} texts were longer than max_length={limit} tokens and were cut",
                TruncationWarning,
                stacklevel=4,
            )

    def _states(
        self, rows: list[str], instructions: list[str] | None, settings: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, Tokens, np.ndarray, list[Tensor]]]:
        """Per pack: row numbers, all tokens, first token of each row, and each row's fp32 [len, D] final states."""
        unknown = set(settings) - {"max_length", "batch_tokens", "split_special"}
        if unknown:
            raise TypeError(f"unknown argument {sorted(unknown)[0]!r}")
        _, tokens = self._tokens(
            rows, instructions, settings.get("max_length"), True, settings.get("split_special", False)
        )
        starts = np.concatenate([[0], np.cumsum(tokens.lengths, dtype=np.int64)])
        budget = self._budget(settings.get("batch_tokens"))
        spec = self.decoder.spec
        for done in engine.run(self.decoder, tokens.ids, tokens.lengths, budget, self.spec.attention == "causal"):
            x_TD = rms_norm(done.hidden_TD[: done.schedule.num_tokens], self.decoder.norm_D, spec.norm_eps, spec.norm_offset)
            yield done.indices, tokens, starts, list(x_TD.split(tokens.lengths[done.indices].tolist()))

    def _budget(self, batch_tokens: int | None) -> int:
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
        return batch_tokens or engine.default_budget(self.device)


class _Progress:
    """A bar on stderr: texts done, tokens per second, time left. Silent unless asked for or on a terminal."""

    WORTH_A_BAR = 1000  # texts

    def __init__(self, total: int, show: bool | None) -> None:
        self.total = total
        self.show = show if show is not None else total >= self.WORTH_A_BAR and sys.stderr.isatty()
        self.num_tokens = 0
        self.bar: Any = None

    def __enter__(self) -> "_Progress":
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("embedding"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("texts  {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, rate="")
        return self

    def advance(self, num_texts: int, num_tokens: int) -> None:
        if self.bar is not None:
            self.num_tokens += num_tokens
            elapsed = self.bar.tasks[0].elapsed or 1e-9
            self.bar.update(self.task, advance=num_texts, rate=f"{self.num_tokens / elapsed:,.0f} tokens/s")

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def _choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "all":
        raise ValueError("device='all' spreads texts over CUDA GPUs and this version runs one device: name it")
    return torch.device(device)


def _choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
    return found
