"""`Encoder`: a decoder LLM as a text encoder. Load it, embed texts."""

import logging
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime import prepare
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides, open_checkpoint, resolve
from flashvec.runtime.decoder import packed
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.drop_in import SentenceTransformerNames
from flashvec.runtime.fitting import FittedVectors
from flashvec.runtime.forked import use_threads_that_exist
from flashvec.runtime.heap import return_freed_memory
from flashvec.runtime.options import EmbedOptions, Instruction, RunOptions, StreamOptions
from flashvec.runtime.parts import PartVectors, SpanVectors
from flashvec.runtime.placement import choose_devices, choose_dtype
from flashvec.runtime.pooling import DenseHead, number_format
from flashvec.runtime.row_counts import pays_to_pack
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import as_texts, check_names, check_ordered, check_whole, elements
from flashvec.runtime.windows import WINDOW, RunSettings, run_settings

logger = logging.getLogger("flashvec")


class Encoder(PartVectors, FittedVectors, SentenceTransformerNames):
    """A text encoder: `Encoder.load(model).embed(texts)`.

    The same text gives the same bits alone or in any batch, in any order, under any token budget (CPU; same
    machine, dtype and thread count).
    """

    def __new__(cls, *parts: Any, **named: Any) -> Self:
        spec = parts[0] if parts else named.get("spec")
        if not isinstance(spec, ModelSpec):
            name = repr(parts[0])[:80] if parts else "model"
            raise TypeError(f"an encoder is not made of a name, it is loaded: Encoder.load({name})")
        return super().__new__(cls)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        adapters: str | Path | Sequence[str | Path] = (),
        device: str | torch.device | Sequence[str | torch.device] | None = None,
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
                GGUF file, a folder written by `save`, or a hub id of such a folder. Weights are read from safetensors
                or GGUF only; no code from a model is ever run.
            revision: branch, tag or commit of a hub id.
            adapters: PEFT adapters to merge, in this order.
            device: where to run; default CUDA if there is one, else the CPU. "all" (every GPU) or a list of devices
                gives a `SpreadEncoder`, one process for each: close it, or use it as a context manager (as one on a
                single device may be, where nothing is to be closed).
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
        for name, value in (("max_length", max_length), ("truncate_dim", truncate_dim), ("layers", layers)):
            if value is not None:
                check_whole(name, value)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        sizes = (max_length, truncate_dim, layers)
        max_length, truncate_dim, layers = (None if n is None else int(n) for n in sizes)  # `save` knows no numpy
        check_names("pooling", () if pooling is None else pooling, str)
        check_names("adapters", adapters, str, Path)
        if pooling is not None and not pooling:
            raise ValueError(f"pooling is {pooling!r} and names none")
        devices, torch_dtype = choose_devices(device), None if dtype is None else choose_dtype(dtype)
        modes = pooling if pooling is None or isinstance(pooling, str) else tuple(pooling)
        overrides = Overrides(attention, modes, max_length, truncate_dim, compat)
        adapter_list = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        path = resolve(model, revision, local_files_only)
        checkpoint = open_checkpoint(path, overrides, tuple(str(a) for a in adapter_list), local_files_only)
        for notice in checkpoint.notices:
            logger.warning("%s: %s", path.name, notice)
        if len(devices) == 1:
            return cls._from_checkpoint(checkpoint, devices[0], torch_dtype, layers)
        from flashvec.runtime.devices import SpreadEncoder

        checkpoint.source.close()
        spec = _checked(checkpoint.spec, layers)
        arguments: dict[str, Any] = {
            "model": str(path),
            "adapters": [str(a) for a in adapter_list],
            "dtype": None if torch_dtype is None else str(torch_dtype),
            "attention": attention,
            "pooling": modes,
            "max_length": max_length,
            "truncate_dim": truncate_dim,
            "compat": compat,
            "layers": layers,
            "local_files_only": local_files_only,
        }
        return SpreadEncoder(spec, checkpoint.tokenizer, devices, arguments)

    @classmethod
    def _from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, layers: int | None
    ) -> "Encoder":
        use_threads_that_exist()
        spec = _checked(checkpoint.spec, layers)
        if dtype is None:
            dtype = torch.bfloat16 if has_hardware_bf16(device) else torch.float32
        loader = DecoderLoader(checkpoint.spec.decoder, checkpoint.source, dtype, device)
        decoder = loader.load(layers, each=lambda _, layer: packed(layer) if pays_to_pack(layer.qkv) else layer)
        decoder.spec = spec.decoder
        return_freed_memory()
        heads = [
            DenseHead(weight.to(device), None if bias is None else bias.to(device), dense.activation)
            for (weight, bias), dense in zip(checkpoint.dense, spec.dense, strict=True)
        ]
        return cls(spec, decoder, checkpoint.tokenizer, heads)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the encoder; `load` restores it bit for bit in the same dtype, int8 ranges and adapters included.

        sentence-transformers (6 or later) opens the folder too, unless the model has rules that such a folder cannot
        hold (LLM2Vec's template); a notice then says so. Weights are written in the precision they run in: to change
        a model's format without loss use `flashvec.runtime.checkpoint.export.convert`.

        Args:
            folder: where to; must not exist or be empty, unless `overwrite`.
            overwrite: replace a model folder that is already there.

        Raises:
            ValueError: a folder that may not be replaced.
        """
        from flashvec.runtime.checkpoint.export import save

        for notice in save(self, folder, overwrite=overwrite):
            logger.warning("%s: %s", folder, notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of an encoder on several devices. One on a single device has none and can be used on."""

    def __copy__(self) -> "Encoder":
        """Another object over the same weights, with a `spec` of its own."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an encoder is not pickled or deeply copied, for its weights would be: load it in each process, by the "
            "model's name (copy.copy shares the weights)"
        )

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Encoder({spec.decoder.family}, {spec.attention}, {'+'.join(spec.pooling)}, "
            f"dim={spec.embedding_size}, max_length={spec.max_length}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # --- vectors of texts ---------------------------------------------------------------------------

    @typing.overload
    def embed(
        self,
        texts: str | Iterable[str],
        *,
        spans: Sequence[Sequence[tuple[int, int]]],
        instruction: Instruction = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        **run: Unpack[RunOptions],
    ) -> SpanVectors: ...

    @typing.overload
    def embed(
        self, texts: str | Iterable[str], *, output: Literal["torch"], spans: None = None, **given: Unpack[EmbedOptions]
    ) -> Tensor: ...

    @typing.overload
    def embed(
        self,
        texts: str | Iterable[str],
        *,
        output: Literal["numpy"] = "numpy",
        out: np.ndarray | None = None,
        spans: None = None,
        **given: Unpack[EmbedOptions],
    ) -> np.ndarray: ...

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
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> np.ndarray | Tensor | SpanVectors:
        """One vector per text.

        Args:
            texts: a str, or any iterable of them (list, generator, array, column).
            instruction: written before each text as it stands, or around it where it holds `{text}`; one for all, or
                one per text. Its tokens attend but are not pooled, unless the layout says otherwise.
            prompt_name: a name from `spec.prompts`, instead of `instruction`.
            normalize: L2-normalise; default the layout's rule.
            truncate_dim: keep the leading dimensions.
            precision: float32, float16, int8 and uint8 (after `calibrate` with the same `truncate_dim`), binary and
                ubinary (packed signs).
            max_length: tokens per text, special tokens included; longer texts are cut with one warning.
            batch_tokens: tokens run together, default 2,048 on a CPU and 16,384 on a GPU: speed and memory. On a CPU it
                never changes a vector, on a GPU at most last bits.
            show_progress: a bar on stderr; default on a terminal when it takes a while.
            output: "numpy", or "torch" for a tensor that stays on the device.
            out: array or memmap [n, d] to write into; it is also returned.
            split_special: read special-token strings inside a text as plain text. By default they become control
                tokens, as in Hugging Face. Not with `compat`.
            spans: character ranges in each text; the result is then that of `embed_spans`.

        Returns:
            [n, d] in input order; [d] for a str; [0, d] for no texts. float32, or as `precision` says: binary is int8
            [n, d / 8], ubinary uint8. An empty text gives the vector of its BOS (or EOS) token, never NaN.

        Raises:
            TypeError, ValueError: what cannot be embedded; the message names the row or the argument.
            torch.OutOfMemoryError: a text that does not fit the GPU alone.
        """
        run = RunSettings(max_length, batch_tokens, split_special, show_progress)
        if spans is not None:
            given = {
                "truncate_dim": truncate_dim is not None,
                "precision": precision != "float32",
                "output": output != "numpy",
                "out": out is not None,
            }
            if any(given.values()):
                refused = ", ".join(name for name, is_given in given.items() if is_given)
                raise ValueError(f"spans gives whole fp32 numpy vectors, without {refused}")
            return self.embed_spans(
                texts,
                spans,
                instruction=instruction,
                prompt_name=prompt_name,
                normalize=normalize,
                max_length=max_length,
                batch_tokens=batch_tokens,
                split_special=split_special,
                show_progress=show_progress,
            )
        rows, single = as_texts(texts)
        dim = self._check_dim(truncate_dim)
        finished = number_format(self.spec, dim, normalize, precision, output)
        if out is not None:
            empty = finished(torch.zeros(0, dim, device="cpu"))
            _check_out(out, (len(rows), *empty.shape[1:]), empty.dtype, output)
        instructions = self._instructions(instruction, prompt_name, len(rows))
        result = finished(self._embed_rows(rows, instructions, run, normalize, truncate_dim, output == "torch"))
        if out is not None:
            out[...] = result
            result = out
        return result[0] if single else result

    @typing.overload
    def embed_iter(
        self, texts: Iterable[str], *, output: Literal["torch"], **given: Unpack[StreamOptions]
    ) -> Iterator[Tensor]: ...

    @typing.overload
    def embed_iter(
        self, texts: Iterable[str], *, output: Literal["numpy"] = "numpy", **given: Unpack[StreamOptions]
    ) -> Iterator[np.ndarray]: ...

    def embed_iter(
        self,
        texts: Iterable[str],
        *,
        window: int = WINDOW,
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        output: Literal["numpy", "torch"] = "numpy",
        **run: Unpack[RunOptions],
    ) -> Iterator[np.ndarray] | Iterator[Tensor]:
        """Vectors of a stream, one at a time in input order; holds at most `window` texts in memory.

        Args:
            texts: any ordered iterable of str.
            window: texts that are run together.
            instruction: one for all texts, as in `embed`.
            prompt_name, normalize, truncate_dim, precision, output: as in `embed`.
            run: `max_length`, `batch_tokens`, `split_special`, `show_progress`.

        Yields:
            [d] each, its dtype as in `embed`.

        Raises:
            TypeError, ValueError: as `embed`; messages and warnings number rows from the stream's first.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, got str: call embed for one text")
        check_ordered(texts)
        if not isinstance(instruction, str | None):
            raise ValueError("embed_iter takes one instruction for all texts: a stream's length is not known")
        check_whole("window", window)
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1 text")
        settings = run_settings(run)
        finished = number_format(self.spec, self._check_dim(truncate_dim), normalize, precision, output)
        one = self._instructions(instruction, prompt_name, 1)

        def stream() -> Iterator[Any]:
            drawn, first = elements(texts, window), 0
            while held := list(islice(drawn, window)):
                rows, _ = as_texts(held, first=first)
                own = None if one is None else one * len(rows)
                numbered = replace(settings, first_row=first)
                yield from finished(self._embed_rows(rows, own, numbered, normalize, truncate_dim, output == "torch"))
                first += len(rows)

        return stream()

    @typing.overload
    def count_tokens(self, texts: str, *, instruction: Instruction = None, prompt_name: str | None = None) -> int: ...

    @typing.overload  # not any iterable: a str is one, too
    def count_tokens(
        self, texts: list[str] | tuple[str, ...], *, instruction: Instruction = None, prompt_name: str | None = None
    ) -> np.ndarray: ...

    @typing.overload
    def count_tokens(
        self, texts: str | Iterable[str], *, instruction: Instruction = None, prompt_name: str | None = None
    ) -> int | np.ndarray: ...

    def count_tokens(
        self, texts: str | Iterable[str], *, instruction: Instruction = None, prompt_name: str | None = None
    ) -> int | np.ndarray:
        """Tokens of each text as `embed` would read it, instruction and special tokens included, uncut.

        Args:
            texts, instruction, prompt_name: as in `embed`.

        Returns:
            int64 [n]; an int for a str.
        """
        rows, single = as_texts(texts)
        instructions = self._instructions(instruction, prompt_name, len(rows))
        prepared = prepare.prepare(replace(self.spec, compat=None), rows, instructions, self.tokenizer)
        counts = self.tokenizer.count(prepared.strings, special=True)
        return int(counts[0]) if single else counts


def _check_out(out: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, output: str) -> None:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out is {type(out).__name__}: give a numpy array or memmap of shape {shape} and dtype {dtype}")
    if output == "torch" or out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, the vectors are {shape} (output='numpy')")
    # Narrower floats round; narrower or differently signed integers would wrap.
    casting: Literal["safe", "same_kind"] = "safe" if np.issubdtype(dtype, np.integer) else "same_kind"
    if not out.flags.writeable:
        raise ValueError("out is read-only: give an array or a memmap (mode='r+') that may be written into")
    if out.dtype.kind not in "iuf" or not np.can_cast(dtype, out.dtype, casting):
        raise ValueError(f"out has dtype {out.dtype}, the vectors are {dtype}: it would not hold their values")


def _checked(spec: ModelSpec, layers: int | None) -> ModelSpec:
    """The spec of the first `layers` layers."""
    if layers is not None and not 1 <= layers <= spec.decoder.num_layers:
        raise ValueError(f"layers is {layers}, the model has {spec.decoder.num_layers}")
    width = spec.dense[-1].out_features if spec.dense else spec.decoder.hidden_size * len(spec.pooling)
    if spec.truncate_dim is not None and not 1 <= spec.truncate_dim <= width:
        raise ValueError(f"truncate_dim is {spec.truncate_dim}, the model's vectors have {width} dimensions")
    if layers is None or layers == spec.decoder.num_layers:
        return spec
    return replace(spec, decoder=replace(spec.decoder, num_layers=layers), int8_ranges=None)
