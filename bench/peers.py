"""What a user would run instead: the same model in other libraries, as a careful user sets them up.

Each has `embed(list of str) -> [n, d]` unit vectors, tokenisation included.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint, resolve
from flashvec.runtime.verify import hugging_face_model

BATCH_SIZE = 32
BUDGET = 1024  # padded tokens per OpenVINO batch: where it is fastest


class HuggingFace:
    """transformers' own model: sorted by length, padded to the batch, mean pooled in fp32."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        checkpoint = open_checkpoint(resolve(model), Overrides())
        self.spec = checkpoint.spec
        self.tokenizer = checkpoint.tokenizer
        self.module = hugging_face_model(checkpoint, resolve(model), dtype)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        ids = self._tokenise(texts)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        batches = [order[at : at + BATCH_SIZE] for at in range(0, len(order), BATCH_SIZE)]
        vectors = np.zeros((len(ids), self.spec.decoder.hidden_size), np.float32)
        for rows in batches:
            vectors[rows] = F.normalize(self._mean(*_pad([ids[i] for i in rows])), dim=-1).numpy()
        return vectors

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids[: self.spec.max_length] for e in self.tokenizer.backend.encode_batch_fast(list(texts))]

    @torch.inference_mode()
    def _mean(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.module(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class OpenVINO(HuggingFace):
    """The same model and pooling converted to OpenVINO, in batches of at most `BUDGET` padded tokens."""

    def __init__(self, model: str, dtype: str) -> None:
        import openvino

        super().__init__(model, torch.float32)
        pooled = _Pooled(self.module).eval()
        example = {
            "input_ids": torch.ones(2, 8, dtype=torch.int64),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        }
        with torch.inference_mode():
            converted = openvino.convert_model(pooled, example_input=example)
        hint = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        self.compiled: Any = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        del self.module

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        ids = self._tokenise(texts)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        vectors = np.zeros((len(ids), self.spec.decoder.hidden_size), np.float32)
        while order:
            count = max(1, BUDGET // len(ids[order[0]]))
            rows, order = order[:count], order[count:]
            padded, mask = _pad([ids[i] for i in rows])
            mean = self.compiled({"input_ids": padded.numpy(), "attention_mask": mask.numpy()})[0]
            vectors[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return vectors


class _Pooled(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        mask = attention_mask[..., None].float()
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


class SentenceTransformers:
    """sentence-transformers as installed: its defaults, fp32, batches of 32."""

    def __init__(self, folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(folder, device="cpu", local_files_only=True)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


def has_openvino() -> bool:
    """True if the package openvino can be imported."""
    return importlib.util.find_spec("openvino") is not None


def _pad(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, int64 [B, longest], padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask.long()
