"""Folders that this package wrote, beside what they were written from and beside sentence-transformers."""

import json

import numpy as np
import torch
from parity import note
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder

TOLERANCE = 1e-5


def texts(encoder):
    return encoder.embed(list(TEXTS))


def same_bits(a, b, dtype):
    return np.array_equal(texts(Encoder.load(a, dtype=dtype)), texts(Encoder.load(b, dtype=dtype)))


def library_difference(folder, of="a decoder", **settings):
    """Largest absolute difference between sentence-transformers and this package over one folder, fp32.

    Args:
        folder: that `convert` or `save` wrote.
        of: what it was written from.
    """
    kwargs = {"dtype": torch.float32}
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs).encode(list(TEXTS), **settings)
    ours = Encoder.load(folder, dtype="float32").encode(list(TEXTS), **settings)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.01
    found = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    return note("layout", f"converted folder, from {of}", "sentence-transformers", found)


def library_model(folder, **keys):
    tiny_checkpoint(folder / "base", "gemma3", use_bidirectional_attention=True)
    heads = [Dense(32, 96, bias=False, activation_function=torch.nn.Identity()), Dense(96, 24, bias=True)]
    modules = [Transformer(str(folder / "base")), Pooling(32, "mean", include_prompt=False), *heads, Normalize()]
    SentenceTransformer(modules=modules, device="cpu", **keys).save(str(folder / "model"))


def llm2vec_model(folder, base, *, bos=True):
    tiny_checkpoint(folder, "qwen2", bos=bos)
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": base}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')


def names(folder):
    return sorted(path.name for path in folder.iterdir())
