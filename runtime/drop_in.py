"""sentence-transformers' method names and parameters, as synonyms of `Encoder`'s own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.runtime.spec import ModelSpec


class SentenceTransformerNames:
    """`encode`, `encode_query`, `encode_document` and `similarity`, for code written for that library."""

    spec: ModelSpec
    embed: Callable[..., Any]
    embed_tokens: Callable[..., Any]

    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """`embed` under sentence-transformers' name and parameters.

        `batch_size` counts rows there and has no meaning here (packs are filled by tokens); `device` is where the
        encoder was loaded. Both are accepted so that code written for that library runs as it is.
        """
        if output_value == "token_embeddings":
            if prompt_name is not None:
                prompt = self.spec.prompts[prompt_name]
            states = self.embed_tokens(inputs, instruction=prompt)
            tensors = [torch.from_numpy(state.vectors) for state in states]
            return tensors[0] if isinstance(inputs, str) else tensors
        if output_value != "sentence_embedding":
            raise ValueError(f"output_value is {output_value!r}, known are sentence_embedding, token_embeddings")
        result = self.embed(
            inputs,
            instruction=prompt,
            prompt_name=prompt_name,
            normalize=True if normalize_embeddings else None,
            truncate_dim=truncate_dim,
            precision=precision,
            show_progress=show_progress_bar,
            output="torch" if convert_to_tensor else "numpy",
        )
        return result if convert_to_numpy or convert_to_tensor else [torch.from_numpy(row) for row in result]

    def encode_query(self, inputs: str | Iterable[str], **settings: Any) -> Any:
        """`encode` with the prompt named "query", where the model has one."""
        return self._encode_as(("query",), inputs, settings)

    def encode_document(self, inputs: str | Iterable[str], **settings: Any) -> Any:
        """`encode` with the first prompt named "document", "passage" or "corpus" that the model has."""
        return self._encode_as(("document", "passage", "corpus"), inputs, settings)

    def _encode_as(self, names: Sequence[str], inputs: Any, settings: dict[str, Any]) -> Any:
        if settings.get("prompt") is None and settings.get("prompt_name") is None:
            settings["prompt_name"] = next((name for name in names if name in self.spec.prompts), None)
        return self.encode(inputs, **settings)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Score of every vector of the first against every one of the second.

        Args:
            embeddings1, embeddings2: arrays or tensors [n, d] (or [d]).

        Returns:
            fp32 [n1, n2]: cosine, dot product, or minus the distance, as `spec.similarity` says; higher is closer.
        """
        a, b = (torch.atleast_2d(_as_tensor(x)) for x in (embeddings1, embeddings2))
        if self.spec.similarity == "dot":
            return a @ b.T
        if self.spec.similarity in ("euclidean", "manhattan"):
            return -torch.cdist(a, b, p=2 if self.spec.similarity == "euclidean" else 1)
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _as_tensor(x: Any) -> Tensor:
    if isinstance(x, list | tuple) and len(x) and isinstance(x[0], Tensor):
        return torch.stack([row.float() for row in x])
    return x.float() if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x, dtype=np.float32))
