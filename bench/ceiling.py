"""What the matrix library gives for the bare products of a model's layers: the rate that nothing can exceed.

The best of 1,024, 2,048 and 4,096 rows, on all threads or on single-threaded workers; of packed weights where the
encoder's are (`kernels/linear.py`).
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from flashvec.kernels.linear import linear
from flashvec.runtime.encoder import Encoder

CEILING_ROWS = (1024, 2048, 4096)
CEILING_TOKENS = 16_384  # tokens' worth of one layer's products in a measurement


class Ceiling:
    """The bare matrix products of a decoder's layers."""

    def __init__(self, encoder: Encoder) -> None:
        layer = encoder.decoder.layers[0]
        self.weights = [layer.qkv, layer.out, layer.gate_up, layer.down]
        self.num_layers = len(encoder.decoder.layers)
        self.forms: dict[str, Callable[[int], None]] = {}
        for rows in CEILING_ROWS:
            inputs = [torch.randn(rows, w.shape[1]).to(w.dtype) for w in self.weights]
            self.forms[f"{rows} rows, all threads"] = partial(self._layers, inputs)
            self.forms[f"{rows} rows, a worker a core"] = partial(self._workers, inputs)

    def _layers(self, inputs: Sequence[torch.Tensor], repetition: int) -> None:
        for _ in range(CEILING_TOKENS // len(inputs[0])):
            for x, weight in zip(inputs, self.weights, strict=True):
                linear(x, weight)

    def _workers(self, inputs: Sequence[torch.Tensor], repetition: int) -> None:
        threads = torch.get_num_threads()
        rounds = _rounds_of_worker(len(inputs[0]))

        def work() -> None:
            torch.set_num_threads(1)
            for _ in range(rounds):
                for x, weight in zip(inputs, self.weights, strict=True):
                    linear(x, weight)

        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)

    def tokens_per_second(self, seconds: dict[str, list[float]]) -> tuple[float, str]:
        """The best form's rate for the whole model, and its name."""
        rates = {form: _tokens_of(form) / median(seconds[form]) for form in self.forms}
        best = max(rates, key=lambda form: rates[form])
        return rates[best] / self.num_layers, best


def _rounds_of_worker(rows: int) -> int:
    return max(1, CEILING_TOKENS // rows // torch.get_num_threads())


def _tokens_of(form: str) -> int:
    """Rows that a form multiplies: workers share them out, and each does one round at least."""
    rows = int(form.split()[0])
    if form.endswith("all threads"):
        return CEILING_TOKENS // rows * rows
    return _rounds_of_worker(rows) * rows * torch.get_num_threads()
