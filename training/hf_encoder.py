"""A Hugging Face encoder run by transformers itself, so that encoder-only models stand in the same tables.

Mean of the last layer's states over a text's tokens (all-MiniLM and its kin), in padded batches.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

BATCH_TEXTS = 32
DEFAULT_MAX_LENGTH = 512


class HfEncoder:
    """`AutoModel` with mean pooling.

    Args:
        model: a local folder or a hub id; safetensors only, none of a repository's code is run.
    """

    def __init__(self, model: str) -> None:
        import transformers

        local = {"local_files_only": True} if Path(model).exists() else {}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False, **local)
        loaded = transformers.AutoModel.from_pretrained(
            model, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **local
        )
        self.model = loaded.eval()
        stated = self.tokenizer.model_max_length
        self.max_length = min(stated, DEFAULT_MAX_LENGTH)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """fp32 [n, d], not normalised, in input order."""
        whole = [(instruction or "") + text for text in texts]
        order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
        vectors: dict[int, np.ndarray] = {}
        for start in range(0, len(order), BATCH_TEXTS):
            rows = order[start : start + BATCH_TEXTS]
            batch = self.tokenizer(
                [whole[i] for i in rows], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors |= dict(zip(rows, pooled.numpy(), strict=True))
        return np.stack([vectors[i] for i in range(len(whole))])
