"""A GGUF file as an encoder: its metadata as config.json would say it, its tokenizer, its tensors."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flashvec.runtime.checkpoint.gguf import GGUFSource
from flashvec.runtime.checkpoint.gguf_config import gguf_config
from flashvec.runtime.checkpoint.gguf_tokenizer import gguf_tokenizer
from flashvec.runtime.checkpoint.hf import plain_spec
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.spec import DenseSpec
from flashvec.runtime.tokenize import Tokenizer


class DecoderPart:
    """`TensorSource`: another source without its dense heads, which are no part of the decoder."""

    def __init__(self, source: GGUFSource, heads: list[str]) -> None:
        self.source, self.heads = source, frozenset(heads)

    def names(self) -> frozenset[str]:
        """Every tensor of the decoder."""
        return self.source.names() - self.heads

    def place(self, name: str) -> str:
        """The file, for messages."""
        return self.source.place(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        """The tensor, as the source gives it."""
        return self.source.read(name)

    def close(self) -> None:
        """Release the mapped file."""
        self.source.close()


def open_gguf(path: Path, overrides: Overrides) -> Checkpoint:
    """Open a GGUF file.

    A file that states its pooling is an encoder: all tokens are pooled, a prompt's too, as llama.cpp pools them.

    Raises:
        CheckpointError: a damaged file, or one of an unknown architecture.
    """
    config = gguf_config(path)
    if config.get("rope_factors") is not None:
        raise CheckpointError(f"{path.name}: rope_freqs.weight stretches the rotary table by no known rule")
    if config["_gguf_causal"] is True:
        config["is_causal"] = True
    pooling = config["_gguf_pooling"]
    spec, notices = plain_spec(config, overrides, "gguf", path.name, stated_pooling=pooling)
    source = GGUFSource(path)
    names: list[str] = config["_gguf_dense"]
    weights = [source.read(name).float().clone() for name in names]
    dense = tuple(DenseSpec(w.shape[1], w.shape[0], False, "identity") for w in weights)
    spec = replace(spec, dense=dense, span="prompt_tokens" if pooling else spec.span)
    width = spec.decoder.hidden_size * len(spec.pooling)
    for name, head in zip(names, dense, strict=True):
        if head.in_features != width:
            raise CheckpointError(f"{path.name}: {name} takes {head.in_features} features, it is given {width}")
        width = head.out_features
    backend, special = gguf_tokenizer(path)
    ids = {f"{name}_id": special[f"{name}_token_id"] for name in ("bos", "eos", "pad", "unk")}
    tokenizer = Tokenizer.from_backend(
        backend, **ids, add_bos=bool(special["add_bos"]), add_eos=bool(special["add_eos"])
    )
    heads: list[tuple[Tensor, Tensor | None]] = [(weight, None) for weight in weights]
    return Checkpoint(spec, DecoderPart(source, names), tokenizer, heads, notices)
