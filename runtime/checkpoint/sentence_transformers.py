"""A sentence-transformers folder: modules.json and the modules it names.

    Transformer, Pooling, any number of Dense, Normalize        in this order; any other module is refused by
    name

Rules are the library's own (6.2), to the letter: prompt tokens are counted alone, BOS is pooled unless it is
left out with the prompt, vectors are normalised only where the module is there, a folder that states no
direction is causal. Modules are told by their class's name, which must be the library's own: no class path from a
folder is ever imported, and a class of the folder's may do anything under such a name.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from flashvec.runtime.checkpoint.chain import adapter_chain
from flashvec.runtime.checkpoint.hf import (
    choose_attention,
    choose_pooling,
    plain_spec,
    read_config,
)
from flashvec.runtime.checkpoint.json_files import read_json, read_object
from flashvec.runtime.checkpoint.llm2vec import has_tokenizer
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides
from flashvec.runtime.checkpoint.peft import AdapterSource
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.families import LIMITS, stated_attention
from flashvec.runtime.spec import DenseSpec, ModelSpec, PoolingMode
from flashvec.runtime.tokenize import Tokenizer

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
LIBRARY = "sentence_transformers."
TRANSFORMER_FILE = "sentence_bert_config.json"
POOLING: dict[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
OLD_POOLING_KEYS = {  # in the order in which the library concatenates them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
ACTIVATION_MODULES = ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear")
DEFAULT_ACTIVATION = "torch.nn.modules.activation.Tanh"  # the library's, where config.json has none
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

# Settings of the Transformer module under which it does more than run a decoder over text: key -> harmless
# values.
NEUTRAL = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "do_lower_case": (False,),
    "processing_kwargs": ({},),
    "query_length": (),
    "document_length": (),
    "query_expansion": (),
    "tokenizer_name_or_path": (),
}
# Arguments that a folder passes on to transformers: those that change no vector here, and those that are
# followed.
HARMLESS_ARGUMENTS = (
    "attn_implementation", "trust_remote_code", "torch_dtype", "dtype", "use_cache", "device_map", "use_safetensors",
    "revision", "low_cpu_mem_usage", "padding_side", "use_fast", "model_max_length", "clean_up_tokenization_spaces",
)  # fmt: skip
FOLLOWED_ARGUMENTS = ("is_causal", "use_bidirectional_attention")


@dataclass(frozen=True)
class _Modules:
    """Folders of modules.json's entries."""

    transformer: Path
    pooling: Path
    dense: tuple[Path, ...]
    normalize: bool


def open_sentence_transformers(folder: Path, overrides: Overrides, local_files_only: bool = False) -> Checkpoint:
    """Open a sentence-transformers folder.

    Raises:
        CheckpointError: a module or setting that is not known, or a damaged file; names file and key.
    """
    modules = _read_modules(folder)
    base, adapters = adapter_chain(modules.transformer, local_files_only)
    settings = _read_transformer_settings(modules.transformer)
    config = read_config(next(f for f in (*adapters, base) if (f / "config.json").is_file() or f == base))
    config |= {k: v for k, v in _arguments(settings).items() if k in FOLLOWED_ARGUMENTS}

    # A folder that states no direction is read as sentence-transformers and transformers read it: causal.
    attention = choose_attention(overrides.attention) or stated_attention(config) or "causal"
    modes, include_prompt = _read_pooling(modules.pooling, config)
    modes = choose_pooling(overrides.pooling) or modes
    tokenizer_folder = next(f for f in (*reversed(adapters), base) if has_tokenizer(f) or f == base)
    stated = _max_length(settings, tokenizer_folder)
    chosen = replace(overrides, attention=attention, pooling=modes)
    spec, notices = plain_spec(config, chosen, "sentence-transformers")
    dense = [_read_dense(path) for path in modules.dense]
    spec = replace(
        spec,
        span="prompt_tokens",
        include_prompt=include_prompt,
        normalize=modules.normalize,
        dense=tuple(dense),
        max_length=overrides.max_length or min(stated or spec.decoder.max_positions, spec.decoder.max_positions),
        **_read_settings(folder, overrides),
    )
    check_dense_chain(spec, MODULES_FILE)
    source: TensorSource = SafetensorsSource(base)
    for adapter in adapters:
        source = AdapterSource(source, adapter)
    heads = [read_dense_weights(path, head) for path, head in zip(modules.dense, dense, strict=True)]
    return Checkpoint(spec, source, Tokenizer.from_folder(tokenizer_folder), heads, notices)


def transformer_folder(folder: Path) -> Path:
    """Where the decoder lies, or an adapter in its place.

    Raises:
        CheckpointError: as `open_sentence_transformers`.
    """
    return _read_modules(folder).transformer


def read_dense_weights(folder: Path, head: DenseSpec) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a Dense folder, copied."""
    source = SafetensorsSource(folder)
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (head.out_features, head.in_features)}
    if head.bias:
        expected["linear.bias"] = (head.out_features,)
    if source.names() != frozenset(expected):
        raise CheckpointError(
            f"{folder.name}/model.safetensors: holds {sorted(source.names())}, not {sorted(expected)}"
        )
    tensors = []
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{folder.name}/model.safetensors: {name} has shape {source.shape(name)}, config.json asks for {shape}"
            )
        tensors.append(source.read(name).clone())
        if not tensors[-1].isfinite().all():
            raise CheckpointError(f"{folder.name}/model.safetensors: {name} holds NaN or infinity; the file is damaged")
    source.close()
    return tensors[0], tensors[1] if head.bias else None


def check_dense_chain(spec: ModelSpec, where: str) -> None:
    """Each dense head must take as many features as come out of what is before it."""
    width = spec.decoder.hidden_size * len(spec.pooling)
    for head in spec.dense:
        if head.in_features != width:
            raise CheckpointError(f"{where}: a Dense head takes {head.in_features} features, it is given {width}")
        width = head.out_features


def _read_modules(folder: Path) -> _Modules:
    entries = read_json(folder / MODULES_FILE)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{MODULES_FILE}: expected a list of modules")
    types = [str(entry.get("type", "")) for entry in entries]
    for kind in types:
        if not kind.startswith(LIBRARY):
            raise CheckpointError(
                f"{MODULES_FILE}: module {kind[:80]!r} is not sentence-transformers' own; no code of a model is run"
            )
    names = [kind.rpartition(".")[2] for kind in types]
    found = [(name, _module_folder(folder, e.get("path", ""))) for name, e in zip(names, entries, strict=True)]
    for name in names:
        if name not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise CheckpointError(
                f"{MODULES_FILE}: module {name!r} is not known; known are Transformer, Pooling, Dense, Normalize"
            )
    if names == ["Transformer"]:
        raise CheckpointError(
            f"{MODULES_FILE}: a Transformer alone gives no vectors of texts; a cross-encoder (it scores pairs) is such"
        )
    dense = names.count("Dense")
    expected = ["Transformer", "Pooling"] + ["Dense"] * dense
    if names not in (expected, [*expected, "Normalize"]):
        raise CheckpointError(
            f"{MODULES_FILE}: the modules are {', '.join(names)}; only Transformer, Pooling, Dense..., Normalize run"
        )
    if names[-1] == "Normalize":
        _check_input(found[-1][1])
    paths = [path for _, path in found]
    return _Modules(paths[0], paths[1], tuple(paths[2 : 2 + dense]), names[-1] == "Normalize")


def _module_folder(folder: Path, path: Any) -> Path:
    """A module's folder, inside the model's own."""
    if not isinstance(path, str) or len(path) > 255 or "\0" in path or "\\" in path or PureWindowsPath(path).drive:
        raise CheckpointError(f"{MODULES_FILE}: path {str(path)[:255]!r} is no plain relative path")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise CheckpointError(f"{MODULES_FILE}: path {path!r} leaves the model's folder")
    found = folder / path
    if not found.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{MODULES_FILE}: path {path!r} is a link that leaves the model's folder")
    return found


def _check_input(folder: Path) -> None:
    """A module that reads or writes something else than the text's vector is refused."""
    if not (folder / "config.json").is_file():
        return
    config = read_object(folder / "config.json")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise CheckpointError(
                f"{folder.name}/config.json: {key} is {config[key]!r}; only sentence_embedding is run"
            )


def _read_transformer_settings(folder: Path) -> dict[str, Any]:
    if not (folder / TRANSFORMER_FILE).is_file():
        return {}
    settings = read_object(folder / TRANSFORMER_FILE)
    for key, neutral in NEUTRAL.items():
        value = settings.get(key)
        if value is not None and value not in neutral:
            raise CheckpointError(f"{TRANSFORMER_FILE}: {key} is {str(value)[:80]!r}, which is not supported")
    modalities = settings.get("modality_config")
    if modalities is not None and (
        not isinstance(modalities, dict) or "text" not in modalities or "message" in modalities
    ):
        raise CheckpointError(f"{TRANSFORMER_FILE}: modality_config: only plain text is run, no chat messages")
    return settings


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder passes on to transformers, in all its spellings."""
    merged: dict[str, Any] = {}
    for kind in ("model", "processor", "tokenizer", "config"):
        for ending in ("args", "kwargs"):
            values = settings.get(f"{kind}_{ending}") or {}
            if not isinstance(values, dict):
                raise CheckpointError(
                    f"{TRANSFORMER_FILE}: {kind}_{ending} is {str(values)[:80]!r}; expected an object"
                )
            for key, value in values.items():
                if key not in (*HARMLESS_ARGUMENTS, *FOLLOWED_ARGUMENTS):
                    raise CheckpointError(f"{TRANSFORMER_FILE}: {kind}_{ending} sets {key}, which is not supported")
                merged[key] = value
    return merged


def _read_pooling(folder: Path, config: dict[str, Any]) -> tuple[tuple[PoolingMode, ...], bool]:
    """Modes in the order of their concatenation, and whether prompt tokens are pooled."""
    where = f"{folder.name}/config.json"
    values = read_object(folder / "config.json")
    modes = values.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in OLD_POOLING_KEYS.items() if values.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes:
        raise CheckpointError(f"{where}: pooling_mode is {modes!r}; expected a name or a list of names")
    for mode in modes:
        if not isinstance(mode, str) or mode not in POOLING:
            raise CheckpointError(f"{where}: pooling_mode is {mode!r}, known are {', '.join(POOLING)}")
    width = values.get("embedding_dimension", values.get("word_embedding_dimension"))
    if width is not None and width != config.get("hidden_size", width):
        raise CheckpointError(
            f"{where}: embedding_dimension is {width}, the model's hidden size {config['hidden_size']}"
        )
    include_prompt = values.get("include_prompt", True)
    if not isinstance(include_prompt, bool):
        raise CheckpointError(f"{where}: include_prompt is {include_prompt!r}; expected true or false")
    return tuple(POOLING[mode] for mode in modes), include_prompt


def _read_dense(folder: Path) -> DenseSpec:
    where = f"{folder.name}/config.json"
    config = read_object(folder / "config.json")
    _check_input(folder)
    if config.get("use_residual"):
        raise CheckpointError(f"{where}: use_residual is set, which is not supported")
    sizes = []
    for key in ("in_features", "out_features"):
        size = config.get(key)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LIMITS["intermediate_size"]:
            raise CheckpointError(f"{where}: {key} is {size!r}; expected a positive whole number")
        sizes.append(size)
    path = str(config.get("activation_function", DEFAULT_ACTIVATION))
    module, _, name = path.rpartition(".")
    if module not in ACTIVATION_MODULES or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: activation_function is {path!r}; known are {', '.join(ACTIVATIONS)} of torch.nn"
        )
    return DenseSpec(sizes[0], sizes[1], bool(config.get("bias", True)), ACTIVATIONS[name])


def _max_length(settings: dict[str, Any], tokenizer_folder: Path) -> int | None:
    """Tokens per text: the module's setting, else the tokenizer's, which may be absurd; None for neither."""
    arguments = [
        settings.get(f"{kind}_{end}") or {} for kind in ("processor", "tokenizer") for end in ("args", "kwargs")
    ]
    stated = [values["model_max_length"] for values in arguments if "model_max_length" in values]
    stated.append(settings.get("max_seq_length"))
    if (tokenizer_folder / "tokenizer_config.json").is_file():
        stated.append(read_object(tokenizer_folder / "tokenizer_config.json").get("model_max_length"))
    for value in stated:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
            raise CheckpointError(f"{TRANSFORMER_FILE}: max_seq_length is {value!r}; expected a positive whole number")
        return int(min(value, LIMITS["max_position_embeddings"]))
    return None


def _read_settings(folder: Path, overrides: Overrides) -> dict[str, Any]:
    """Fields of the spec that config_sentence_transformers.json states."""
    settings = read_object(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str | None) for p in prompts.values()):
        raise CheckpointError(f"{SETTINGS_FILE}: prompts must be texts by name")
    prompts = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    default = settings.get("default_prompt_name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise CheckpointError(
            f"{SETTINGS_FILE}: default_prompt_name is {default!r}; prompts are {', '.join(prompts) or 'none'}"
        )
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(
            f"{SETTINGS_FILE}: similarity_fn_name is {similarity!r}, known are {', '.join(SIMILARITIES)}"
        )
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise CheckpointError(f"{SETTINGS_FILE}: model_type is {settings['model_type']!r}; only dense encoders run")
    dim = settings.get("truncate_dim")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
        raise CheckpointError(f"{SETTINGS_FILE}: truncate_dim is {dim!r}; expected a positive whole number")
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": similarity,
        "truncate_dim": overrides.truncate_dim or dim,
    }
