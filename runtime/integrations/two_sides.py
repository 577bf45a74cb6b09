"""What the integrations share: one encoder and its two sides, queries and documents, each with its own prompt."""

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flashvec.runtime.drop_in import DOCUMENT_PROMPTS, QUERY_PROMPTS, first_prompt
from flashvec.runtime.encoder import Encoder


def open_encoder(model: Any, load: Mapping[str, Any]) -> Encoder:
    """The encoder given, or the one of that name.

    Args:
        model: an `Encoder`, or what `Encoder.load` takes.
        load: arguments of `Encoder.load`, for a name only.

    Raises:
        TypeError: neither, or arguments of loading for an encoder that is loaded; also for unknown ones.
    """
    if isinstance(model, Encoder):
        if load:
            raise TypeError(f"the encoder is loaded already: {', '.join(load)} must be given to Encoder.load")
        return model
    if not isinstance(model, str | Path):
        raise TypeError(f"model is {type(model).__name__}: give an Encoder, a folder, a GGUF file or a hub id")
    return Encoder.load(model, **load)


class TwoSides:
    """Vectors of queries and of documents by one encoder.

    Calls from several threads wait for each other: one call fills the machine, and two would only share it. Copies are
    the same object, and it is not pickled: weights stay where they are.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            query_instruction, document_instruction: as `embed`'s instruction; None takes the model's own prompt for
                that side where it has one ("query"; "document", "passage" or "corpus"), "" takes none.
            settings: further arguments of `Encoder.embed`.

        Raises:
            TypeError, ValueError: as `embed`, now and not at the first text.
        """
        for name, value in (("query_instruction", query_instruction), ("document_instruction", document_instruction)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is {type(value).__name__}: give a str")
        if own := {"instruction", "prompt_name"} & settings.keys():
            raise TypeError(f"{min(own)} is for one side: give query_instruction or document_instruction")
        self.encoder = encoder
        self._query_settings = {**settings, **_prompt(encoder, query_instruction, QUERY_PROMPTS)}
        self._document_settings = {**settings, **_prompt(encoder, document_instruction, DOCUMENT_PROMPTS)}
        self._lock = threading.Lock()
        for chosen in (self._query_settings, self._document_settings):
            encoder.embed([], **chosen)

    def query(self, text: str) -> np.ndarray:
        """fp32 [d] of one query.

        Raises:
            TypeError: not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"the query is {type(text).__name__}: give one str")
        with self._lock:
            vector: np.ndarray = self.encoder.embed(text, **self._query_settings)
        return vector

    def documents(self, texts: Iterable[str]) -> np.ndarray:
        """fp32 [n, d] of documents; [0, d] of none.

        Raises:
            TypeError: one str, which would be read letter by letter; or rows that are not str.
        """
        if isinstance(texts, str):
            raise TypeError("the documents are one str: give a list of str")
        with self._lock:
            vectors: np.ndarray = self.encoder.embed(texts, **self._document_settings)
        return vectors

    def __deepcopy__(self, memo: dict[int, Any]) -> "TwoSides":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("weights are not pickled: send the model's name and open it there")


def _prompt(encoder: Encoder, instruction: str | None, names: tuple[str, ...]) -> dict[str, str | None]:
    if instruction is not None:
        return {"instruction": instruction}
    name = first_prompt(encoder.spec.prompts, names)
    return (
        {"instruction": ""} if name is None else {"prompt_name": name}
    )  # not the default, as sentence-transformers has it
