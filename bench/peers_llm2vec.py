"""The reference implementation of LLM2Vec, package llm2vec, in the environment that it asks for (transformers 4.44)."""

import json
import tempfile
from pathlib import Path

from flashvec.bench.own_process import OwnProcess

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "peers" / "llm2vec" / "bin" / "python"  # `make peers`
WORKER = ROOT / "bench" / "embed_worker.py"


class Llm2Vec(OwnProcess):
    """`LLM2Vec.encode` as installed: fp32, batches of 32, sorted by length.

    Args:
        folder: the model, as `flashvec convert` writes it.
        max_length: tokens of a text.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        self.older = tempfile.TemporaryDirectory()
        write_for_older(folder, Path(self.older.name))
        settings = {"variant": "llm2vec", "model": self.older.name, "max_length": max_length}
        super().__init__([PYTHON, WORKER], settings)


def is_installed() -> bool:
    """Whether the package is in its environment, which may be there without it."""
    return any(PYTHON.parents[1].glob("lib/python*/site-packages/llm2vec"))


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
