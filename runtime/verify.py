"""Are our vectors the model's own? Compared with Hugging Face's code in fp32 on a user's texts.

Both sides get the same weights, token ids and pooled tokens; what is compared is the forward pass, the pooling and
everything after it. Hugging Face runs twice: in fp32, which counts as the truth, and in the dtype under test, which
shows how much of a difference that dtype makes by itself.
"""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime import prepare
from flashvec.runtime.checkpoint.hf import read_config
from flashvec.runtime.checkpoint.hf_config import hf_config
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides, open_checkpoint, resolve
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.families import standard_config
from flashvec.runtime.packing import pack
from flashvec.runtime.placement import DTYPES
from flashvec.runtime.pooling import finish
from flashvec.runtime.spec import ModelSpec

FP32_GATE = 1e-5  # largest absolute difference of unit vectors
DTYPE_MARGIN = 1e-4  # other dtypes: cosines may fall this far below Hugging Face's in the same dtype
QUANTILES = {"minimum": 0.0, "1 %": 0.01, "median": 0.5}
HF_BUDGET = 2048  # padded tokens per Hugging Face batch
MAX_TEXT_BYTES = 64 * 2**20


def read_texts(path: Path | None, limit: int) -> list[str]:
    """The first `limit` non-empty lines of a text file, or prose that Python itself carries."""
    if path is None:
        from pydoc_data.topics import topics

        paragraphs = [" ".join(p.split()) for text in topics.values() for p in text.split("\n\n")]
        return [p for p in paragraphs if 80 <= len(p) <= 2000][:limit]
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes; verify reads at most {MAX_TEXT_BYTES}")
    content = path.read_bytes()
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"{path.name} is UTF-16; convert it, as with iconv -f utf-16 -t utf-8")
    texts = [line.strip() for line in content.decode("utf-8-sig", errors="replace").splitlines()]
    texts = [t for t in texts if t][:limit]
    if len(texts) < 2:
        raise ValueError(f"{path.name} has {len(texts)} texts, one a line; verify compares at least 2")
    return texts


def verify_model(
    model: str | Path,
    texts: Sequence[str],
    *,
    dtype: str | None = None,
    max_length: int | None = None,
    adapters: Sequence[str | Path] = (),
    attention: str | None = None,
    pooling: Sequence[str] | None = None,
    compat: str | None = None,
) -> dict[str, Any]:
    """Compare our vectors with Hugging Face's on the CPU.

    Args:
        model, dtype, adapters, attention, pooling, compat, max_length: as in `Encoder.load`.
        texts: at least two.

    Returns:
        A JSON-ready report: cosine quantiles of ours and of Hugging Face in this dtype against Hugging Face in fp32,
        largest difference, top-10 overlap, sign flips, non-finite values, `gate`, and `failures` (empty if it passed).
    """
    path = resolve(model)
    modes = None if pooling is None else tuple(pooling)
    overrides = Overrides(attention, modes, max_length, None, compat)
    names = tuple(str(a) for a in adapters)
    checkpoint = open_checkpoint(path, overrides, names)
    cpu = torch.device("cpu")
    chosen = dtype or ("bfloat16" if has_hardware_bf16(cpu) else "float32")
    if chosen not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
    encoder = Encoder._from_checkpoint(checkpoint, cpu, DTYPES[chosen], None)
    # Neither side writes the default prompt, and both normalise last, whatever the folder's rules are.
    ours = torch.from_numpy(encoder.embed(list(texts), instruction="", normalize=True))

    theirs = {}
    for name in dict.fromkeys(("float32", chosen)):
        module = hugging_face_model(open_checkpoint(path, overrides, names), path, DTYPES[name])
        theirs[name] = _hugging_face_vectors(module, encoder, list(texts))
        del module
    return _report(ours, theirs[chosen], theirs["float32"], chosen, encoder.spec)


def hugging_face_model(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' own model of this checkpoint, from its own config.json where it has one."""
    from transformers import AutoModel

    spec = checkpoint.spec
    if spec.layout in ("hf", "sentence-transformers", "flashvec") and (path / "config.json").is_file():
        config = read_config(path)
        _state_direction(config, spec)
    else:
        config = hf_config(spec, "float32")
    # transformers' SDPA path leaves soft-caps out
    how = "eager" if spec.decoder.softcap is not None else "sdpa"
    standard = standard_config(spec.decoder.family, config, "config.json")
    module = AutoModel.from_config(standard, attn_implementation=how, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.source.read(name))
    checkpoint.source.close()
    return module


def _state_direction(config: dict[str, Any], spec: ModelSpec) -> None:
    """Write the direction that runs into a config.json, whatever it, or its model's name, says."""
    if spec.attention == "causal":
        config |= {"is_causal": True, "use_bidirectional_attention": False}
    elif spec.decoder.family != "gemma3_text" or not config.get("use_bidirectional_attention"):
        config["is_causal"] = False  # that family's own key halves its windows; this one does not


@torch.inference_mode()
def _hugging_face_vectors(module: torch.nn.Module, encoder: Encoder, texts: list[str]) -> Tensor:
    """Padded batches through Hugging Face's model, pooled in fp32 over the tokens that our layout names."""
    spec, tokenizer = encoder.spec, encoder.tokenizer
    prepared = prepare.prepare(spec, texts, None, tokenizer)
    tokens = prepare.tokenise(tokenizer, prepared, spec.max_length, offsets=True)
    spans = prepare.pooled_spans(spec, tokens, prepared, None, tokenizer)
    bounds = list(pairwise(np.concatenate([[0], np.cumsum(tokens.lengths, dtype=np.int64)])))
    vectors = torch.empty(len(texts), spec.decoder.hidden_size * len(spec.pooling))
    for indices in pack(tokens.lengths, HF_BUDGET):
        rows = [torch.from_numpy(tokens.ids[slice(*bounds[i])].astype(np.int64)) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        states = module(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
        for i, row, state in zip(indices, rows, states, strict=True):
            start, stop = spans[i]
            pooled = [_pool(state[: len(row)], mode, start, stop, spec) for mode in spec.pooling]
            vectors[i] = torch.cat(pooled)
    return finish(spec, vectors, encoder.heads, True, None)


def _pool(state: Tensor, mode: str, start: int, stop: int, spec: ModelSpec) -> Tensor:
    if mode in ("last", "cls"):
        return state[-1 if mode == "last" else 0]
    part = state[start:stop]
    if mode == "weighted_mean":
        first = start + 1 if spec.span == "prompt_tokens" else 1
        weights = torch.arange(first, first + len(part))[:, None]
        return (part * weights).sum(0) / weights.sum()
    if mode == "mean_sqrt_len":
        return part.sum(0) / len(part) ** 0.5
    return part.mean(0) if mode == "mean" else part.max(0).values


def _report(ours: Tensor, same: Tensor, truth: Tensor, dtype: str, spec: ModelSpec) -> dict[str, Any]:
    rows = {"flashvec": _against(ours, truth)}
    if dtype != "float32":
        rows["hugging face"] = _against(same, truth)
    failures = []
    if rows["flashvec"]["non_finite"]:
        failures.append(f"{rows['flashvec']['non_finite']} of our values are not finite")
    if dtype == "float32":
        gate = f"largest difference of unit vectors at most {FP32_GATE:g}"
        if not rows["flashvec"]["max_difference"] <= FP32_GATE:
            failures.append(f"largest difference {rows['flashvec']['max_difference']:.2e} is above {FP32_GATE:g}")
    else:
        gate = f"cosine to fp32 nowhere below Hugging Face's in {dtype} by more than {DTYPE_MARGIN:g}"
        for name in QUANTILES:
            got, least = rows["flashvec"]["cosine"][name], rows["hugging face"]["cosine"][name] - DTYPE_MARGIN
            if not got >= least:
                failures.append(f"cosine at the {name} is {got:.5f}, below {least:.5f}")
    return {
        "dtype": dtype,
        "texts": len(ours),
        "attention": spec.attention,
        "pooling": list(spec.pooling),
        "against": "hugging face float32",
        "rows": rows,
        "gate": gate,
        "failures": failures,
    }


def _against(x: Tensor, truth: Tensor) -> dict[str, Any]:
    cosine = torch.nn.functional.cosine_similarity(x.double(), truth.double()).numpy()
    return {
        "cosine": {name: float(np.quantile(cosine, q)) for name, q in QUANTILES.items()},
        "max_difference": float((x - truth).abs().max()),
        "top10_overlap": _top_overlap(x, truth, 10),
        "sign_flips": float(((x > 0) != (truth > 0)).float().mean()),
        "non_finite": int((~x.isfinite()).sum()),
    }


def _top_overlap(x: Tensor, truth: Tensor, k: int) -> float:
    """Mean share of each text's k nearest other texts that both sets of vectors agree on."""
    k = min(k, len(x) - 1)

    def nearest(v: Tensor) -> Tensor:
        scores = (v @ v.T).fill_diagonal_(-torch.inf)
        return torch.zeros_like(scores).scatter_(1, scores.topk(k).indices, 1.0)

    return float((nearest(x) * nearest(truth)).sum() / (k * len(x)))


def report_rows(report: dict[str, Any]) -> list[list[str]]:
    """The report as a table: header, then one row for each side."""
    header = [report["dtype"], *QUANTILES]
    table = [[*header, "max diff", "top-10", "signs", "NaN/inf"]]
    for name, row in report["rows"].items():
        table.append(
            [
                name,
                *(f"{row['cosine'][q]:.6f}" for q in QUANTILES),
                f"{row['max_difference']:.1e}",
                f"{row['top10_overlap']:.1%}",
                f"{row['sign_flips']:.2%}",
                str(row["non_finite"]),
            ]
        )
    return table
