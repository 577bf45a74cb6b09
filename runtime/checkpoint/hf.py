"""A plain Hugging Face decoder folder: config.json, safetensors, tokenizer.json."""

from pathlib import Path
from typing import Any, cast

from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.families import decoder_spec, stated_attention
from flashvec.runtime.spec import ATTENTIONS, POOLING_MODES, Attention, ModelSpec, PoolingMode
from flashvec.runtime.tokenize import Tokenizer

DEFAULT_MAX_LENGTH = 512  # tokens, where neither the layout nor the caller says; long enough for passages
HF_POOLING = {"avg": "mean", "mean": "mean", "cls": "cls", "last": "last", "weighted_mean": "weighted_mean"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as an object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    below = folder / "encoder" / "config.json"  # where a run that trained the body leaves it
    if not (folder / "config.json").is_file() and below.is_file():
        raise CheckpointError(f"{folder / 'config.json'} is missing: the model of this run is {below.parent}")
    files = (path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not (folder / "config.json").is_file() and (found := sorted(files)):
        listed = ", ".join(found[:3]) + (" and others" if len(found) > 3 else "")
        raise CheckpointError(f"{folder}: holds GGUF files and no other model: give one of them ({listed})")
    return read_object(folder / "config.json")


def choose_attention(override: str | None) -> Attention | None:
    """The caller's attention direction, checked."""
    if override is not None and override not in ATTENTIONS:
        raise ValueError(f"attention is {override!r}, known are {', '.join(ATTENTIONS)}")
    return cast(Attention | None, override)


def direction_key(config: dict[str, Any]) -> str:
    """The key by which config.json says, or would say, that the model is bidirectional; EmbeddingGemma's is its own."""
    return "use_bidirectional_attention" if config.get("use_bidirectional_attention") else "is_causal"


def choose_pooling(override: str | tuple[str, ...] | list[str] | None) -> tuple[PoolingMode, ...] | None:
    """The caller's pooling, checked, as a tuple of modes."""
    if override is None:
        return None
    modes = (override,) if isinstance(override, str) else tuple(override)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise ValueError(f"pooling is {mode!r}, known are {', '.join(POOLING_MODES)}")
    return cast(tuple[PoolingMode, ...], modes)


def choose_max_length(override: int | None, stated: int | None, max_positions: int) -> int:
    """Tokens a text may have: the caller's word, else the layout's, else the default; never past the model's."""
    if override is not None and override < 1:
        raise ValueError(f"max_length is {override}; expected at least 1")
    if override is not None and override > max_positions:
        raise ValueError(f"max_length is {override}, the model has {max_positions} positions")
    return override or min(stated or DEFAULT_MAX_LENGTH, max_positions)


def plain_spec(
    config: dict[str, Any],
    overrides: Overrides,
    layout: str = "hf",
    where: str = "config.json",
    stated_pooling: str | None = None,
) -> tuple[ModelSpec, list[str]]:
    """The encoder that a decoder's configuration makes, and what its user should know.

    Nothing is guessed in silence: a decoder that does not say how it is to be read becomes bidirectional with mean
    pooling, and a notice says that it was not trained for that.
    """
    stated = stated_attention(config, where)
    attention: Attention = choose_attention(overrides.attention) or stated or "bidirectional"
    decoder = decoder_spec(config, attention, where)
    modes = choose_pooling(overrides.pooling)
    stated_pooling = stated_pooling or config.get("pooling")
    if modes is None and stated_pooling is not None:
        if not isinstance(stated_pooling, str) or stated_pooling not in HF_POOLING:
            raise CheckpointError(
                f"{where}: pooling is {stated_pooling!r}; pass pooling= with one of {', '.join(POOLING_MODES)}"
            )
        modes = (cast(PoolingMode, HF_POOLING[stated_pooling]),)
    notices = []
    if stated is None and overrides.attention is None:
        notices.append(
            "this checkpoint is a plain decoder: it runs with bidirectional attention and "
            f"{'+'.join(modes or ('mean',))} pooling, which it was not trained for; expect rough similarities, or "
            "train it first (pass attention= and pooling= to choose)"
        )
    code = config.get("auto_map")
    if isinstance(code, dict) and any(str(key).startswith("AutoModel") for key in code):
        notices.append(
            f"{where} names a model class of its own (auto_map), whose code is never run: this is transformers' "
            f"{decoder.family}, and vectors differ from the model's own where its code does"
        )
    spec = ModelSpec(
        decoder=decoder,
        attention=attention,
        pooling=modes or (("mean",) if attention == "bidirectional" else ("last",)),
        layout=layout,
        max_length=choose_max_length(overrides.max_length, None, decoder.max_positions),
        truncate_dim=overrides.truncate_dim,
        direction_key=direction_key(config),
        base_model=config.get("_name_or_path") or None,
    )
    return spec, notices


def open_hf(folder: Path, overrides: Overrides) -> Checkpoint:
    """Open a plain decoder folder."""
    spec, notices = plain_spec(read_config(folder), overrides)
    return Checkpoint(spec, SafetensorsSource(folder), Tokenizer.from_folder(folder), notices=notices)
