"""The reference implementation of LLM2Vec, package llm2vec, in the environment that it asks for (transformers 4.44)."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "peers" / "llm2vec" / "bin" / "python"  # `make peers`
WORKER = ROOT / "bench" / "llm2vec_worker.py"


class Llm2Vec:
    """`LLM2Vec.encode` as installed: fp32, batches of 32, sorted by length; texts and vectors go through a pipe.

    Args:
        folder: the model, as `flashvec convert` writes it.
        max_length: tokens of a text.

    Raises:
        ValueError: the other process ended; says with what.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        with tempfile.TemporaryDirectory() as older:
            write_for_older(folder, Path(older))
            self.log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process is)
            self.process = subprocess.Popen(
                [PYTHON, WORKER, older, str(max_length), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
            )
            self.embed(["ready?"])  # before its files go

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(list(texts)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # said below
        header = self.process.stdout.readline()
        if not header:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"llm2vec's process ended: {said[-1] if said else 'without a word'}")
        rows, size = json.loads(header)
        vectors = np.frombuffer(self.process.stdout.read(4 * rows * size), np.float32).reshape(rows, size)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def close(self) -> None:
        """Ends the other process."""
        self.process.communicate()
        self.log.close()


def write_for_older(folder: Path, into: Path) -> None:
    """The model as transformers 4.44 reads it: rotary base beside its new place, merges as strings, weights by link."""
    config = json.loads((folder / "config.json").read_text())
    config |= {key: value for key, value in config.get("rope_parameters", {}).items() if key == "rope_theta"}
    (into / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    merges = tokenizer["model"].get("merges", [])
    tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (into / "tokenizer.json").write_text(json.dumps(tokenizer))
    for file in folder.glob("*.json"):
        if file.name.startswith(("tokenizer_config", "special_tokens", "model.safetensors.index")):
            (into / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("*.safetensors"):
        (into / file.name).symlink_to(file.resolve())
