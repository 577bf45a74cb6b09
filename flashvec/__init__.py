"""Decoder LLMs as text encoders. Start at `Encoder.load`; `embed_corpus` embeds files."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "JobSettings", "__version__", "embed_corpus"]

if TYPE_CHECKING:
    from flashvec.runtime.corpus.job import embed_corpus
    from flashvec.runtime.corpus.settings import JobSettings
    from flashvec.runtime.encoder import Encoder


def __getattr__(name: str) -> Any:
    """Import torch only when the encoder is asked for: `flashvec --version` answers at once."""
    if name == "Encoder":
        from flashvec.runtime.encoder import Encoder

        return Encoder
    if name == "embed_corpus":
        from flashvec.runtime.corpus.job import embed_corpus

        return embed_corpus
    if name == "JobSettings":
        from flashvec.runtime.corpus.settings import JobSettings

        return JobSettings
    raise AttributeError(f"module 'flashvec' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is imported when it is asked for is there for completion, too."""
    return sorted({*globals(), *__all__})
