"""One encoder or peer as a process of its own: none of the others' threads, memory or libraries are beside it.

    python -m flashvec.bench.embed_worker '{"variant": "flashvec", "model": "smollm2-encoder", ...}'
    peers/llm2vec/bin/python bench/embed_worker.py '{"variant": "llm2vec", "model": "folder", ...}'

`bench/own_process.py` starts it, with one JSON object of settings. It reads a JSON list of texts a line, and answers
each with a line of JSON, the vectors' shape and the most memory meanwhile, and then their fp32 bytes. Under the name
"llm2vec" it runs in the reference's own environment, which knows nothing of this project.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print where they like; the pipe is for vectors
    settings = json.loads(sys.argv[1])
    _be_modest(settings["memory_gib"])
    torch.set_num_threads(settings["threads"])
    embed = (_llm2vec if settings["variant"] == "llm2vec" else _of_this_project)(settings)
    for line in sys.stdin:
        vectors = torch.as_tensor(embed(json.loads(line))).float().contiguous()
        header = {"shape": list(vectors.shape), "peak_mib": peak_mib()}
        answers.write(json.dumps(header).encode() + b"\n" + vectors.numpy().tobytes())
        answers.flush()
        forget_peak()


def _be_modest(memory_gib: float) -> None:
    """Takes no more memory than that, is the first to end where the machine has none left, and ends with its parent."""
    with suppress(OSError):  # proc(5), Linux alone
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    most = int(memory_gib * 2**30)
    with suppress(ValueError, OSError):  # a lower limit than this is there already
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _of_this_project(settings: dict[str, Any]) -> Callable[[Sequence[str]], Any]:
    """Ours, or a peer of `bench/peers.py`."""
    variant, model, dtype, max_length = (settings[key] for key in ("variant", "model", "dtype", "max_length"))
    if variant.startswith("flashvec"):
        from flashvec.runtime.encoder import Encoder

        encoder = Encoder.load(model, dtype=dtype, max_length=max_length)
        encoder.workers = settings["workers"]
        return encoder.embed
    from flashvec.bench.peers import ways

    gguf = settings["gguf"] and Path(settings["gguf"])
    return ways(model, dtype, gguf, max_length)[variant].open().embed


def _llm2vec(settings: dict[str, Any]) -> Callable[[Sequence[str]], Any]:
    """`LLM2Vec.encode` as installed: fp32, batches of 32, sorted by length."""
    from llm2vec import LLM2Vec

    length = settings["max_length"]
    model = LLM2Vec.from_pretrained(
        settings["model"], torch_dtype=torch.float32, pooling_mode="mean", max_length=length, doc_max_length=length
    )
    return lambda texts: model.encode(texts, device="cpu", show_progress_bar=False, convert_to_numpy=True)


def forget_peak() -> None:
    """From here on `peak_mib` counts anew, from what is resident now."""
    with suppress(OSError):  # elsewhere, peaks are since the start
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak falls to what is resident now


def peak_mib() -> float:
    """The most resident memory, of this program alone (`ru_maxrss` begins with that of whoever started it)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
