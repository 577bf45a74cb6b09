"""Writing an encoder to a folder: for this package, and where its rules allow for sentence-transformers >= 6.

    config.json, model.safetensors         transformers' AutoModel reads them, without code from the folder
    tokenizer files                        with a padding token
    modules.json, 1_Pooling, 2_Dense, ..., config_sentence_transformers.json, sentence_bert_config.json
    flashvec.json                          everything once more, exactly: our own loader reads this one

`convert` reads a model from its files and stores each tensor in the precision it has there: bf16 stays bf16,
GGUF blocks and merged adapters become fp32. So `Encoder.load` gives the same bits from the model and from its
conversion, in every dtype: each weight is rounded once, from the same number. Give `dtype` for a smaller
folder.

`save` writes an encoder as it is in memory, so weights have the precision it runs in.

Some rules fit in no sentence-transformers folder (LLM2Vec's template and its unpooled BOS). `convert`, whose
purpose is such a folder, stops there, or leaves them out when told to; `save` never loses anything: it leaves
out modules.json instead, and the folder opens with this package only.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashvec.runtime.checkpoint.hf_config import hf_config
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides, made_of, open_checkpoint, resolve
from flashvec.runtime.checkpoint.placing import target_folder, write_among_others, write_whole
from flashvec.runtime.checkpoint.safetensors_files import write_tensors
from flashvec.runtime.checkpoint.saved import SPEC_FILE, dense_folder
from flashvec.runtime.checkpoint.sentence_transformers import (
    ACTIVATIONS,
    MODULES_FILE,
    POOLING,
    SETTINGS_FILE,
    TRANSFORMER_FILE,
)
from flashvec.runtime.checkpoint.tensors import CheckedTensors, decoder_shapes, decoder_tensors
from flashvec.runtime.placement import choose_dtype
from flashvec.runtime.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    from flashvec.runtime.encoder import Encoder

SHARD_BYTES = 5 * 10**9
WIDTHS = (torch.float16, torch.bfloat16, torch.float32)  # later: wider, for config.json's dtype
MODULE_TYPES = "sentence_transformers.models."
PROMPT_NOTICE = (
    "with a prompt, sentence-transformers leaves out as many tokens as the prompt has alone, this package "
    "the tokens "
    "before the text: where one token spans the border, the two vectors differ"
)


def convert(
    model: str | Path,
    folder: str | Path,
    *,
    plain: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    overrides: Overrides | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """Write any model that `Encoder.load` takes as a folder that sentence-transformers opens too.

    Args:
        model: as in `Encoder.load`.
        folder: where to; must not exist or be empty, unless `overwrite`.
        plain: where the model has rules that such a folder cannot hold, write it without them and say so.
        dtype: float32, bfloat16 or float16 to store matrices in; default each tensor's own, fp32 for GGUF and
            for merged tensors. Norm weights keep theirs.
        overwrite: replace a model folder that is already there.
        revision, adapters, local_files_only: as in `Encoder.load`.
        overrides: attention, pooling, max_length and truncate_dim, as in `Encoder.load`.

    Returns:
        What the user should know, one sentence each.

    Raises:
        CheckpointError: the model's files.
        ValueError: a rule that does not fit in such a folder, named; a dtype; a folder that may not be
            replaced.
    """
    stored = None if dtype is None else choose_dtype(dtype)
    path = resolve(model, revision, local_files_only)
    own = made_of(path, local_files_only) + [resolve(str(name), None, local_files_only) for name in adapters]
    target = target_folder(folder, overwrite, own)
    checkpoint = open_checkpoint(path, overrides or Overrides(), tuple(map(str, adapters)), local_files_only)
    spec, notices = checkpoint.spec, list(checkpoint.notices)
    if rules := unheld_rules(spec, bool(checkpoint.tokenizer.prefix_ids)):
        if not plain:
            raise ValueError(
                f"a sentence-transformers folder cannot hold: {'; '.join(rules)}. Keep the model as it is "
                "and use it "
                "with this package, or write it without these rules: plain=True (--plain)"
            )
        notices.append(f"written without: {'; '.join(rules)}; vectors differ from the model's own")
        spec = plain_rules(spec)
    if spec.span == "offsets" and not _pools_ends_only(spec):
        notices.append(PROMPT_NOTICE)
    tensors = _stored_tensors(checkpoint, stored)

    def write(into: Path) -> None:
        _write_model(into, spec, tensors, checkpoint.tokenizer, checkpoint.dense)
        _write_modules(into, spec)

    try:
        write_whole(target, write)
    finally:
        checkpoint.source.close()
    return notices


def save(
    encoder: "Encoder",
    folder: str | Path,
    *,
    overwrite: bool = False,
    among_others: bool = False,
    spec: ModelSpec | None = None,
) -> list[str]:
    """Write an encoder as it is in memory; `Encoder.load` restores it bit for bit in the same dtype.

    Args:
        folder: where to; must not exist or be empty, unless `overwrite`.
        overwrite: replace a model folder that is already there.
        among_others: write into a folder whatever it holds, and leave what is no file of a model there.
        spec: written instead of the encoder's own.

    Returns:
        What the user should know: whether sentence-transformers cannot open the folder, and why.
    """
    spec = encoder.spec if spec is None else spec
    spec = replace(spec, decoder=_cut_layers(spec.decoder))
    rules = unheld_rules(spec, bool(encoder.tokenizer.prefix_ids))
    dense = [(head.weight, head.bias) for head in encoder.heads]

    def write(into: Path) -> None:
        _write_model(into, spec, decoder_tensors(encoder.decoder), encoder.tokenizer, dense)
        if not rules:
            _write_modules(into, spec)

    if among_others:
        write_among_others(Path(folder).expanduser(), write)
    else:
        write_whole(target_folder(folder, overwrite), write)
    if not rules:
        return []
    return [f"opens with this package only, because a sentence-transformers folder cannot hold: {'; '.join(rules)}"]


def unheld_rules(spec: ModelSpec, adds_prefix: bool) -> list[str]:
    """Rules of an encoder that a sentence-transformers folder has no place for, named one by one.

    Args:
        adds_prefix: the tokenizer puts a token (BOS) before every text.
    """
    rules = []
    if spec.template is not None:
        rules.append(f"the template {spec.template!r}")
    if spec.text_suffix:
        rules.append(f"the text suffix {spec.text_suffix!r}")
    if spec.span == "count_from_right":
        rules.append("compat='llm2vec', which counts pooled tokens from the right")
    if spec.span == "template" and adds_prefix and not _pools_ends_only(spec):
        rules.append("the span 'template', under which BOS is not pooled")
    if spec.span in ("offsets", "template") and spec.prompts and not _pools_ends_only(spec):
        rules.append(f"prompts ({', '.join(spec.prompts)}) that are left out of pooling by their characters")
    if spec.layout != "sentence-transformers" and spec.truncate_dim and spec.normalize:
        rules.append("truncate_dim before normalising")
    return rules


def plain_rules(spec: ModelSpec) -> ModelSpec:
    """The same model under the rules that a sentence-transformers folder does hold."""
    return replace(
        spec,
        layout="sentence-transformers",
        span="prompt_tokens",
        include_prompt=_includes_prompt(spec),
        template=None,
        text_suffix="",
        compat=None,
        document_max_length=None,
        int8_ranges=None,  # of vectors under the other rules
    )


def _pools_ends_only(spec: ModelSpec) -> bool:
    """Is a text's vector its first or last token's: then it does not matter which others are pooled."""
    return set(spec.pooling) <= {"last", "cls"}


def _includes_prompt(spec: ModelSpec) -> bool:
    return spec.include_prompt if spec.span == "prompt_tokens" else _pools_ends_only(spec)


# --- weights ------------------------------------------------------------------------------------------------


def _stored_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint in the dtype it will be stored in; what loading refuses is refused here."""
    shapes = decoder_shapes(checkpoint.spec.decoder)
    checked = CheckedTensors(checkpoint.spec.decoder, checkpoint.source)
    for name, shape in shapes.items():  # before the first is read: a model is written for minutes
        checked.take(name, shape)
    checked.check_all_taken()
    for name in shapes:
        stored = checkpoint.source.read(name)
        if dtype is not None and not name.endswith("norm.weight"):  # norms run in fp32 whatever the matrices are
            stored = stored.to(dtype)
        checked.check_finite(name, stored)
        yield name, stored


def _cut_layers(spec: DecoderSpec) -> DecoderSpec:
    """An encoder loaded with fewer layers keeps the facts of those only."""
    keep = slice(spec.num_layers)
    return replace(spec, layer_ropes=spec.layer_ropes[keep], layer_windows=spec.layer_windows[keep])


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """model.safetensors, or shards of SHARD_BYTES with their index; returns the widest dtype of a matrix."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    widest = WIDTHS[0]

    def flush() -> None:
        write_tensors(held, folder / f"shard-{len(shards)}")
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            held_bytes = 0
        held[name] = tensor.detach().cpu().contiguous().clone()  # a source's tensors live until its next read only
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        if tensor.ndim > 1:
            widest = max(widest, tensor.dtype, key=WIDTHS.index)
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return widest
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return widest


# --- files --------------------------------------------------------------------------------------------------


def _write_model(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Any,
    dense: Sequence[tuple[Tensor, Tensor | None]],
) -> None:
    """What our own loader needs: weights, config.json, tokenizer, dense heads, flashvec.json."""
    dtype = str(_write_weights(folder, tensors)).removeprefix("torch.")
    _write_json(folder / "config.json", hf_config(spec, dtype))
    tokenizer.save(folder)
    for i, (weight, bias) in enumerate(dense):
        head = folder / dense_folder(i)
        head.mkdir()
        found = {"linear.weight": weight, "linear.bias": bias}
        kept = {name: tensor.cpu().contiguous() for name, tensor in found.items() if tensor is not None}
        write_tensors(kept, head / "model.safetensors")
    _write_json(folder / SPEC_FILE, spec.to_dict())


def _write_modules(folder: Path, spec: ModelSpec) -> None:
    """What sentence-transformers needs besides."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(spec.dense), *["Normalize"] * spec.normalize]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": MODULE_TYPES + kind}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write_json(folder / MODULES_FILE, entries)
    _write_json(folder / TRANSFORMER_FILE, {"max_seq_length": spec.max_length, "do_lower_case": False})
    names = {ours: theirs for theirs, ours in POOLING.items()}
    modes = [names[mode] for mode in spec.pooling]
    (folder / "1_Pooling").mkdir()
    pooling = {
        "embedding_dimension": spec.decoder.hidden_size,
        "pooling_mode": modes[0] if len(modes) == 1 else modes,
        "include_prompt": _includes_prompt(spec),
    }
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    functions = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    for i, head in enumerate(spec.dense):
        module = "linear" if head.activation == "identity" else "activation"
        config = {
            "in_features": head.in_features,
            "out_features": head.out_features,
            "bias": head.bias,
            "activation_function": f"torch.nn.modules.{module}.{functions[head.activation]}",
        }
        _write_json(folder / dense_folder(i) / "config.json", config)
    if spec.normalize:
        (folder / paths[-1]).mkdir()
        _write_json(folder / paths[-1] / "config.json", {})
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": spec.prompts,
        "default_prompt_name": spec.default_prompt_name,
        "similarity_fn_name": spec.similarity,
    }
    if spec.truncate_dim is not None:
        settings["truncate_dim"] = spec.truncate_dim
    _write_json(folder / SETTINGS_FILE, settings)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
