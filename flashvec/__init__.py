"""Decoder LLMs as text encoders. Start at `Encoder.load`."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]

if TYPE_CHECKING:
    from flashvec.runtime.encoder import Encoder


def __getattr__(name: str) -> Any:
    """Import torch only when the encoder is asked for: `flashvec --version` answers at once."""
    if name == "Encoder":
        from flashvec.runtime.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'flashvec' has no attribute {name!r}")
