"""Embedding token ids on a GPU: our decoder, and what a user would run instead on the same weights.

Each has `embed(list of id arrays) -> fp32 [n, d]` unit vectors on the host: the mean over all tokens.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.gpu_models import RandomModel
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.engine import Engine
from flashvec.runtime.packing import pack
from flashvec.runtime.program import embedding_program


class Ours:
    """The packed decoder as `Encoder` runs it: its engine and its program, from tokens on."""

    def __init__(self, model: RandomModel, budget: int) -> None:
        self.engine, self.budget = Engine(model.decoder), budget
        self.program = embedding_program(model.spec, [])

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(t) for t in texts], np.int32)
        spans = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.int64)
        rows = TokenRows(np.concatenate(texts), lengths, spans)
        vectors = np.zeros((len(texts), self.engine.decoder.spec.hidden_size), np.float32)
        for ran in self.engine.run(rows, self.budget, self.program):
            vectors[ran.indices] = ran.outputs[0].numpy()
        return vectors


class HuggingFacePadded:
    """transformers' model with its own padded attention, mean pooled in fp32.

    Args:
        budget: padded tokens of a batch of texts sorted by length; None takes batches of 32 in the order they come.
    """

    BATCH = 32

    def __init__(self, module: torch.nn.Module, budget: int | None) -> None:
        self.module, self.budget = module, budget
        self.device = next(module.parameters()).device

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        if self.budget is None:
            yield from (np.arange(i, min(i + self.BATCH, len(lengths))) for i in range(0, len(lengths), self.BATCH))
            return
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            count = max(1, self.budget // int(lengths[order[0]]))
            yield order[:count]
            order = order[count:]

    @torch.inference_mode()
    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(t) for t in texts])
        results = []
        for rows in self._batches(lengths):
            ids = np.zeros((len(rows), lengths[rows].max()), np.int64)
            for place, row in enumerate(rows):
                ids[place, : lengths[row]] = texts[row]
            mask = np.arange(ids.shape[1]) < lengths[rows][:, None]
            results.append((rows, self._mean(torch.from_numpy(ids), torch.from_numpy(mask))))
        vectors = np.zeros((len(texts), results[0][1].shape[1]), np.float32)
        for rows, result in results:  # fetched last: the device is never waited for in between
            vectors[rows] = result.cpu().numpy()
        return vectors

    def _mean(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids, mask = (x.to(self.device, non_blocking=True) for x in (ids, mask))
        states = self.module(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        mean = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)


class SentenceTransformers:
    """sentence-transformers over a saved copy of the model; with flash attention it lays texts end to end, as we do.

    Its texts are words that stand for single tokens, so that it runs the same ids; splitting them is in its time.
    """

    def __init__(self, module: torch.nn.Module, vocabulary: int, how: str) -> None:
        from sentence_transformers import SentenceTransformer
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        first = next(module.parameters())
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        with tempfile.TemporaryDirectory() as folder:
            save: Any = module.save_pretrained
            save(folder)
            PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", unk_token="t0").save_pretrained(folder)
            self.model = SentenceTransformer(
                str(Path(folder)),
                device=str(first.device),
                local_files_only=True,
                model_kwargs={"attn_implementation": how, "dtype": first.dtype},
            )
        self.model.max_seq_length = 8192

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        words = [" ".join(f"t{i}" for i in text) for text in texts]
        return self.model.encode(words, normalize_embeddings=True, show_progress_bar=False, batch_size=64)


class Vllm:
    """vLLM's pooling runner over a saved copy of the model, from token ids, without a tokenizer.

    It schedules tokens of all requests together, as we do, by settings of its own; a process of its own holds its
    weights, and as much memory as it is told it may take.
    """

    TOKENS_AT_ONCE = 16_384
    ACTIVATIONS_GIB = 6.0  # beside its weights

    def __init__(self, module: torch.nn.Module) -> None:
        from vllm import LLM
        from vllm.config import PoolerConfig

        first = next(module.parameters())
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        total = torch.cuda.get_device_properties(first.device).total_memory
        with tempfile.TemporaryDirectory() as folder:
            save: Any = module.save_pretrained
            save(folder)
            self.model = LLM(
                folder,
                runner="pooling",
                convert="embed",
                pooler_config=PoolerConfig(pooling_type="MEAN", use_activation=True),  # "activation": to unit length
                skip_tokenizer_init=True,
                dtype=str(first.dtype).removeprefix("torch."),
                max_model_len=8192,
                max_num_batched_tokens=self.TOKENS_AT_ONCE,
                gpu_memory_utilization=min(0.9, (weights + self.ACTIVATIONS_GIB * 2**30) / total),
            )

    def embed(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        answers = self.model.embed([{"prompt_token_ids": text.tolist()} for text in texts], use_tqdm=False)
        return np.array([answer.outputs.embedding for answer in answers], np.float32)


def packs_of(texts: Sequence[np.ndarray], budget: int) -> list[np.ndarray]:
    """The packs that ours runs these texts in."""
    return list(pack(np.array([len(t) for t in texts]), budget))
