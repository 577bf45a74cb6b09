"""What `Encoder`'s methods take by name beside what each of them spells out, as types for checkers and completion.

With them an overload of a method states what makes its result another one, and not all arguments again. Methods are
overloaded by `@typing.overload`, written so: jedi, which completes in notebooks, knows only `@overload` and would show
the overloads in place of the method, whose signature has every name.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

Instruction = str | Sequence[str] | None


class RunOptions(TypedDict, total=False):
    """How texts are run."""

    max_length: int | None
    batch_tokens: int | None
    split_special: bool
    show_progress: bool | None


class VectorOptions(RunOptions, total=False):
    """That, and which vector a text has."""

    prompt_name: str | None
    normalize: bool | None
    truncate_dim: int | None
    precision: str


class EmbedOptions(VectorOptions, total=False):
    """All that changes nothing about the kind of `embed`'s result."""

    instruction: Instruction


class StreamOptions(VectorOptions, total=False):
    """The same of `embed_iter`."""

    window: int
    instruction: str | None


class EncodeOptions(TypedDict, total=False):
    """The same of `encode`."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: bool | None
    precision: str | None
    device: Any
    normalize_embeddings: bool
    truncate_dim: int | None
