"""An `Encoder` that is a `SentenceTransformer`, for libraries that ask for one by its class.

KeyBERT and BERTopic take such an object and, given anything else, silently load a model of their own. Needs the extra
`sentence-transformers`: pip install 'flashvec[sentence-transformers]'.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, cast

import torch

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util.decorators import deprecated_kwargs
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[sentence-transformers]'") from None

from flashvec.runtime.checkpoint import export
from flashvec.runtime.checkpoint.hf import choose_max_length
from flashvec.runtime.devices import SpreadEncoder
from flashvec.runtime.drop_in import encode
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import open_encoder
from flashvec.runtime.pooling import cut_ranges
from flashvec.runtime.spec import ModelSpec

logger = logging.getLogger("flashvec")


class FlashvecSentenceTransformer(SentenceTransformer):
    """`KeyBERT(FlashvecSentenceTransformer("smollm2-encoder"))`: that class, on this package's forward.

    Encoding, prompts, similarity, sizes, tokenizer and saving are that class's by name, parameters and results.
    Training it, moving it and its pools of processes are refused with what to use instead.
    """

    def __init__(self, model: Encoder | str | Path, **load: Any) -> None:
        """
        Args:
            model: an `Encoder`, or what `Encoder.load` takes.
            load: arguments of `Encoder.load`, where `model` is not loaded yet.

        Raises:
            TypeError: another kind of model or an unknown argument.
            CheckpointError: the model's files.
        """
        encoder = open_encoder(model, load)
        super().__init__(
            modules=[_EncoderModule(encoder)],
            device=str(encoder.device),
            prompts=dict(encoder.spec.prompts),
            default_prompt_name=encoder.spec.default_prompt_name,
            similarity_fn_name=encoder.spec.similarity,  # type: ignore[arg-type]
        )

    @property
    def encoder(self) -> Encoder:
        return cast(_EncoderModule, self[0]).encoder

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @deprecated_kwargs(sentences="inputs")  # as there: its name before version 6, which most code still writes
    def encode(  # type: ignore[override]  # one signature for that library's ten overloads
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        task: str | None = None,
    ) -> Any:
        """As there; see `Encoder.encode` for what `batch_size` and `device` mean here. `task` is not used there either.

        Raises:
            TypeError, ValueError: what cannot be embedded, an unknown prompt, output or keyword, a `pool`.
        """
        if pool is not None:
            self.start_multi_process_pool()
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if prompt is None and name is not None and name not in self.prompts:
            raise ValueError(f"prompt_name is {name!r}; this model's prompts are: {', '.join(self.prompts) or 'none'}")
        if prompt is None and name is not None:
            prompt = self.prompts[name]
        return encode(
            self.encoder,
            inputs,
            output_value=output_value,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            instruction="" if prompt is None else prompt,  # "": the encoder's own default is not asked
            normalize_embeddings=normalize_embeddings,
            truncate_dim=self.truncate_dim if truncate_dim is None else truncate_dim,
            precision=precision,
            show_progress=show_progress_bar,
            max_length=self.max_seq_length,
        )

    def to(self, *args: Any, **kwargs: Any) -> "FlashvecSentenceTransformer":
        """Itself, if it is there already.

        Raises:
            ValueError: another device or dtype; those are chosen when the encoder is loaded.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        own = self.device
        moved = device is not None and device.type != own.type
        if device is not None and None not in (device.index, own.index):
            moved |= device.index != own.index
        if moved or dtype not in (None, self.dtype):
            raise ValueError(
                f"the encoder is {self.dtype} on {own}: its place is chosen by Encoder.load(device=..., dtype=...)"
            )
        return self

    def cpu(self) -> "FlashvecSentenceTransformer":
        return self.to("cpu")

    def cuda(self, device: Any = None) -> "FlashvecSentenceTransformer":
        return self.to("cuda" if device is None else torch.device(device))

    def half(self) -> "FlashvecSentenceTransformer":
        return self.to(torch.float16)

    def bfloat16(self) -> "FlashvecSentenceTransformer":
        return self.to(torch.bfloat16)

    def float(self) -> "FlashvecSentenceTransformer":
        return self.to(torch.float32)

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> NoReturn:
        raise ValueError('no pools of processes here: Encoder.load(model, device="all") runs one for each GPU')

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """A folder that sentence-transformers opens too, where such a folder can hold the model's rules.

        What is saved are the settings of this object, whatever the encoder was loaded with. In a folder that exists, a
        model's files are replaced and all others stay, as that class does it.

        Raises:
            ValueError: a setting that the model cannot follow, or an encoder on several devices.
        """
        if isinstance(self.encoder, SpreadEncoder):
            self.encoder.save(path)  # refuses, and says why
        for notice in export.save(self.encoder, path, among_others=True, spec=self._settled_spec()):
            logger.warning("%s: %s", path, notice)

    save_pretrained = save

    def _settled_spec(self) -> ModelSpec:
        """The encoder's facts, with what was set here since."""
        spec = self.encoder.spec
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"default_prompt_name is {self.default_prompt_name!r}; this model's prompts are: {known}")
        # That class adds empty prompts for queries and documents by itself: they are no rules of the model.
        kept = {*spec.prompts, self.default_prompt_name}
        ranges = spec.int8_ranges
        if self.truncate_dim is not None:
            self.encoder._check_dim(self.truncate_dim)
            ranges = cut_ranges(spec, self.truncate_dim)
        return replace(
            spec,
            prompts={name: prompt or "" for name, prompt in self.prompts.items() if prompt or name in kept},
            default_prompt_name=self.default_prompt_name,
            max_length=choose_max_length(self.max_seq_length, spec.max_length, spec.decoder.max_positions),
            truncate_dim=self.truncate_dim or spec.truncate_dim,
            similarity=self.similarity_fn_name,
            int8_ranges=ranges,
        )


class _EncoderModule(torch.nn.Module):
    """What that class asks its first module for."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.max_seq_length = encoder.spec.max_length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        with TemporaryDirectory() as folder:  # as saved: the one form in which transformers gives exactly our ids
            self.encoder.tokenizer.save(folder)
            return PreTrainedTokenizerFast.from_pretrained(folder)

    def get_embedding_dimension(self) -> int:
        return self.encoder.spec.embedding_size

    def tokenize(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt")

    def forward(self, features: Any) -> NoReturn:
        raise ValueError(
            "FlashvecSentenceTransformer encodes texts, it has no forward of features: train with `flashvec train`, or "
            "save it and open the folder with SentenceTransformer"
        )
