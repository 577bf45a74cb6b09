"""LangChain's `Embeddings` over an `Encoder`. Needs the extra `langchain`: pip install 'flashvec[langchain]'."""

from pathlib import Path
from typing import Any

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[langchain]'") from None

from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import TwoSides, open_encoder


class FlashvecEmbeddings(Embeddings):
    """For vector stores and retrievers: `InMemoryVectorStore(FlashvecEmbeddings("smollm2-encoder"))`.

    The asynchronous forms run in LangChain's executor, so that the event loop stays free.
    """

    def __init__(
        self,
        model: Encoder | str | Path,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        show_progress: bool | None = None,
        **load: Any,
    ) -> None:
        """
        Args:
            model: an `Encoder`, or what `Encoder.load` takes.
            query_instruction, document_instruction: None takes the model's own prompt for that side, "" none.
            normalize, truncate_dim, show_progress: as in `Encoder.embed`.
            load: arguments of `Encoder.load`, where `model` is not loaded yet.

        Raises:
            TypeError: another kind of model or an unknown argument.
            CheckpointError: the model's files.
        """
        self._sides = TwoSides(
            open_encoder(model, load),
            query_instruction=query_instruction,
            document_instruction=document_instruction,
            normalize=normalize,
            truncate_dim=truncate_dim,
            show_progress=show_progress,
        )

    @property
    def encoder(self) -> Encoder:
        return self._sides.encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector of `d` floats per text; [] of none.

        Raises:
            TypeError: one str, or rows that are not str.
        """
        vectors: list[list[float]] = self._sides.documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of one query, `d` floats.

        Raises:
            TypeError: not a str.
        """
        vector: list[float] = self._sides.query(text).tolist()
        return vector
