"""Named tensors of a checkpoint, read one at a time: the one interface every file format is read through.

Names are Hugging Face's parameter names without a leading `model.`: `embed_tokens.weight`,
`layers.0.self_attn.q_proj.weight`, `norm.weight`. They end at `runtime/decoder.py`'s loader.
"""

from typing import Protocol

from torch import Tensor


class CheckpointError(ValueError):
    """A model's files are missing, damaged or not what they claim; the message names the file, the key and the cure."""


class TensorSource(Protocol):
    """Tensors by name. Nothing is read before `read`; nothing read is kept."""

    def names(self) -> frozenset[str]:
        """Every tensor this source can give."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        ...

    def place(self, name: str) -> str:
        """The file that a tensor is read from, for messages; where it should be, if it is missing."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU: fp32, bf16 or fp16, possibly a view of a read-only mapped file.

        Valid until the next `read` or `close`; copy what is to live longer, and never write into it.
        """
        ...

    def close(self) -> None:
        """Release every mapped file."""
        ...
