"""Loads one encoder in this process, and says how long it took and how much anonymous memory it needed (Linux alone).

    python -m flashvec.bench.load_worker smollm2-encoder float32 [ADAPTER ...]

Prints one JSON object. Anonymous memory (`RssAnon` of proc(5)) is what a process allocates; pages of mapped files are
not in it, which the system takes back when it likes.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch

from flashvec.runtime.encoder import Encoder

EVERY_S = 0.002  # between two looks


def anonymous_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def main() -> None:
    model, dtype, *adapters = sys.argv[1:]
    torch.ones(8, 8) @ torch.ones(8, 8)  # the matrix library's own memory is not the model's
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(EVERY_S):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)  # a model that does not load ends the process
    watcher.start()
    start = time.perf_counter()
    encoder = Encoder.load(model, dtype=dtype, adapters=adapters)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    decoder = encoder.decoder
    tensors = [decoder.embedding_VD, *(t for layer in decoder.layers for t in vars(layer).values() if t is not None)]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    most = max(peak, anonymous_bytes()) - before
    print(json.dumps({"seconds": round(seconds, 2), "weights_bytes": weights, "peak_bytes": most}))


if __name__ == "__main__":
    main()
