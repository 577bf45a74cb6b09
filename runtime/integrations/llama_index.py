"""LlamaIndex's `BaseEmbedding` over an `Encoder`.

Needs the extra `llama-index`: pip install 'flashvec[llama-index]'.
"""

import asyncio
import uuid
from pathlib import Path
from typing import Any

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[llama-index]'") from None

from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import TwoSides, open_encoder

BATCH_SIZE = 2048  # texts handed over at once, the most LlamaIndex allows: packs are filled by tokens from all of them


class FlashvecEmbedding(BaseEmbedding):
    """For indices and pipelines: `VectorStoreIndex(nodes, embed_model=FlashvecEmbedding("smollm2-encoder"))`.

    Its fields are what it is made of, so that `to_dict`, an ingestion cache and pickling hold a name and settings,
    never weights; a copy in another process loads the model by that name, and one that is set later counts at once.
    """

    query_instruction: str | None = Field(default=None, description="Before queries; None: the model's own prompt.")
    document_instruction: str | None = Field(default=None, description="Before texts; None: the model's own prompt.")
    normalize: bool | None = Field(default=None, description="L2-normalise; None: the model's own rule.")
    truncate_dim: int | None = Field(default=None, description="Keep the leading dimensions.")
    load: dict[str, Any] = Field(default_factory=dict, description="Arguments of Encoder.load.")
    loaded_elsewhere: bool = Field(default=False, description="Made of an Encoder: no name to load it by.")
    _sides: TwoSides | None = PrivateAttr(default=None)
    _made_of: tuple[Any, ...] = PrivateAttr(default=())  # the fields that `_sides` is made of

    def __init__(self, model_name: Encoder | str | Path, **fields: Any) -> None:
        """
        Args:
            model_name: an `Encoder`, or what `Encoder.load` takes.
            fields: `query_instruction`, `document_instruction` (None takes the model's own prompt for that side, ""
                none), `normalize`, `truncate_dim`, `load` (a dict of arguments of `Encoder.load`), and those of
                LlamaIndex's `BaseEmbedding`.

        Raises:
            TypeError: another kind of model or an unknown argument.
            CheckpointError: the model's files.
        """
        unknown = set(fields) - set(type(self).model_fields)
        if unknown:
            raise TypeError(f"FlashvecEmbedding does not take {', '.join(sorted(unknown))}")
        if fields.get("loaded_elsewhere"):
            raise TypeError(f"{model_name!r} was made of an Encoder: there is no name to load it by")
        encoder = open_encoder(model_name, fields.get("load") or {})
        if isinstance(model_name, Encoder):
            # No two encoders in memory share a name: a cache of vectors that goes by it must not mix them up.
            family = model_name.spec.base_model or model_name.spec.decoder.family
            fields["loaded_elsewhere"], model_name = True, f"{family} in memory {uuid.uuid4().hex[:12]}"
        super().__init__(model_name=str(model_name), **{"embed_batch_size": BATCH_SIZE, **fields})
        self._sides, self._made_of = self._sides_of(encoder), self._facts()

    @classmethod
    def class_name(cls) -> str:
        return "FlashvecEmbedding"

    @property
    def encoder(self) -> Encoder:
        return self._open().encoder

    def _sides_of(self, encoder: Encoder) -> TwoSides:
        return TwoSides(
            encoder,
            query_instruction=self.query_instruction,
            document_instruction=self.document_instruction,
            normalize=self.normalize,
            truncate_dim=self.truncate_dim,
        )

    def _facts(self) -> tuple[Any, ...]:
        settings = (self.query_instruction, self.document_instruction, self.normalize, self.truncate_dim)
        return self.model_name, dict(self.load), *settings

    def _open(self) -> TwoSides:
        facts, sides = self._facts(), self._sides
        if sides is None or facts != self._made_of:  # a pickled copy, or fields were set since
            is_open = sides is not None and (self.loaded_elsewhere or facts[:2] == self._made_of[:2])
            encoder = sides.encoder if sides is not None and is_open else open_encoder(self.model_name, self.load)
            self._sides, self._made_of = sides, _ = self._sides_of(encoder), facts
        return sides

    def __getstate__(self) -> dict[str, Any]:
        if self.loaded_elsewhere:
            raise TypeError("made of an Encoder, whose weights are not pickled: make it of the model's name")
        held, self._sides = self._sides, None
        try:
            state: dict[str, Any] = super().__getstate__()
        finally:
            self._sides = held
        return state

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._open().query(query).tolist()
        return vector

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._open().documents(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    # In a thread, so that the event loop stays free; and all texts of a batch together, not one by one.

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
