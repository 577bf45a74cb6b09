"""A Hugging Face encoder run by transformers itself, so that encoder-only models stand in the same tables.

Mean of the last layer's states over a text's tokens (all-MiniLM and its kin), in padded batches.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashvec.runtime.prepare import char_span_to_tokens

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

    def embed(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """fp32 [n, d], not normalised, in input order."""
        vectors: dict[int, np.ndarray] = {}
        for rows, states, batch in self._run([(instruction or "") + text for text in texts]):
            mask = batch["attention_mask"][..., None].to(states)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors |= dict(zip(rows, pooled.numpy(), strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])

    def embed_words(self, words: Sequence[Sequence[str]], shift: int = 0) -> list[np.ndarray]:
        """One vector per word, the mean of its pieces; as `Encoder.embed_words`, zero rows included.

        Words are joined by single spaces and found again by their characters, not given to the tokenizer one by one:
        a byte-level one would read them without the space that text has before a word.

        Raises:
            ValueError: the tokenizer is not a fast one, and knows no characters.
        """
        if not self.tokenizer.is_fast:
            raise ValueError("words need a fast tokenizer (tokenizer.json): this one does not say what a token covers")
        found = [np.zeros((len(own), self.model.config.hidden_size), np.float32) for own in words]
        for rows, states, batch in self._run([" ".join(own) for own in words], return_offsets_mapping=True):
            masks = batch["attention_mask"].bool()
            for row, padded_LD, mask, offsets in zip(rows, states, masks, batch["offset_mapping"], strict=True):
                states_TD, places = padded_LD[mask].numpy(), offsets[mask].numpy()
                no_special = np.zeros(len(places), bool)  # a special token covers no character
                start = 0
                for i, word in enumerate(words[row]):
                    first, last = char_span_to_tokens(places, no_special, start, start + len(word))
                    first, last = max(first - shift, 0), last - shift
                    if last > first:
                        found[row][i] = states_TD[first:last].mean(0)
                    start += len(word) + 1
        return found

    @torch.inference_mode()
    def _run(self, texts: Sequence[str], **more: Any) -> Iterator[tuple[list[int], torch.Tensor, Any]]:
        """Batches of texts of like length: their numbers, last states [B, L, D] and the tokenizer's answer."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH_TEXTS):
            rows = order[start : start + BATCH_TEXTS]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                **more,
            )
            inputs = {name: value for name, value in batch.items() if name != "offset_mapping"}
            yield rows, self.model(**inputs).last_hidden_state, batch
