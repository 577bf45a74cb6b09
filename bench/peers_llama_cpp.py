"""llama.cpp on the GGUF file that the model was converted from: its quantised weights, attention in both directions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class LlamaCpp:
    """llama.cpp through llama-cpp-python: texts side by side in batches.

    Args:
        file: GGUF; its products run in the file's types, inputs as 8-bit integers.
        max_length: tokens of a text, the rest is cut; and of a batch, which is where the library cuts. A text must fit
            in one: attention that looks ahead cannot be split.

    Raises:
        ValueError: llama.cpp cannot open the file; says why.
    """

    def __init__(self, file: Path, max_length: int) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(file),
            embedding=True,
            pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
            n_ctx=max_length,
            n_batch=max_length,
            n_ubatch=max_length,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        llama_cpp.llama_set_causal_attn(self.model.ctx, False)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # those of a batch are about as long
        vectors = np.zeros((len(texts), self.model.n_embd()), np.float32)
        vectors[order] = self.model.embed([texts[i] for i in order], normalize=True)
        return vectors
