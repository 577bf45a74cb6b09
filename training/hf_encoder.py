"""A Hugging Face encoder run by transformers itself, so that encoder-only models stand in the same tables.

Mean of the last layer's states over a text's tokens, in padded batches; a sentence-transformers folder says itself
whether that is the mean or the first token's state, and how many tokens it reads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashvec.runtime.checkpoint.json_files import read_json, read_object
from flashvec.runtime.checkpoint.peft import CONFIG_FILE as ADAPTER_FILE
from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE, OLD_POOLING_KEYS, TRANSFORMER_FILE
from flashvec.runtime.prepare import PLACEHOLDER, char_span_to_tokens

BATCH_TEXTS = 32
DEFAULT_MAX_LENGTH = 512  # where a folder states none
MODULES = ("Transformer", "Pooling", "Normalize")


class HfEncoder:
    """`AutoModel` with the pooling of its folder, or the mean.

    Args:
        model: a local folder or a hub id; safetensors only, none of a repository's code is run.

    Raises:
        ValueError: an adapter's folder, or a sentence-transformers folder with more than a model and mean or cls
            pooling; names file and key.
    """

    def __init__(self, model: str) -> None:
        import transformers

        local: dict[str, Any] = {"local_files_only": True} if Path(model).exists() else {}
        if (Path(model) / ADAPTER_FILE).is_file():
            raise ValueError(f"{model} is an adapter, which backend hf does not merge: leave --backend out")
        folder, self.pooling, stated = _settings(model)
        local["subfolder"] = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False, **local)
        loaded = transformers.AutoModel.from_pretrained(
            model, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **local
        )
        self.model = loaded.eval()
        self.max_length = stated or min(self.tokenizer.model_max_length, DEFAULT_MAX_LENGTH)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and states."""
        return torch.float32

    def embed(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """fp32 [n, d], not normalised, in input order.

        Args:
            instruction: written before each text as it stands, or around it where it holds `{text}`; pooled with it.
        """
        head, _, tail = (instruction or "").partition(PLACEHOLDER)
        vectors: dict[int, np.ndarray] = {}
        for rows, states, batch in self._run([head + text + tail for text in texts]):
            mask = batch["attention_mask"][..., None].to(states)
            if self.pooling == "cls":
                pooled = states[torch.arange(len(states)), mask[..., 0].argmax(1)]  # the first that is no padding
            else:
                pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors |= dict(zip(rows, pooled.numpy(), strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])

    def embed_words(self, words: Sequence[Sequence[str]], shift: int = 0) -> list[np.ndarray]:
        """One vector per word, the mean of its pieces; as `Encoder.embed_words`, zero rows included.

        Words are joined by single spaces and found again by their characters, not given to the tokenizer one by one:
        a byte-level one would read them without the space that text has before a word.

        Raises:
            ValueError: the tokenizer is not a fast one, and knows no characters.
        """
        if not self.tokenizer.is_fast:
            raise ValueError("words need a fast tokenizer (tokenizer.json): this one does not say what a token covers")
        found = [np.zeros((len(own), self.model.config.hidden_size), np.float32) for own in words]
        for rows, states, batch in self._run([" ".join(own) for own in words], return_offsets_mapping=True):
            masks = batch["attention_mask"].bool()
            for row, padded_LD, mask, offsets in zip(rows, states, masks, batch["offset_mapping"], strict=True):
                states_TD, places = padded_LD[mask].numpy(), offsets[mask].numpy()
                no_special = np.zeros(len(places), bool)  # a special token covers no character
                start = 0
                for i, word in enumerate(words[row]):
                    first, last = char_span_to_tokens(places, no_special, start, start + len(word))
                    first, last = max(first - shift, 0), last - shift
                    if last > first:
                        found[row][i] = states_TD[first:last].mean(0)
                    start += len(word) + 1
        return found

    @torch.inference_mode()
    def _run(self, texts: Sequence[str], **more: Any) -> Iterator[tuple[list[int], torch.Tensor, Any]]:
        """Batches of texts of like length: their numbers, last states [B, L, D] and the tokenizer's answer."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH_TEXTS):
            rows = order[start : start + BATCH_TEXTS]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                **more,
            )
            inputs = {name: value for name, value in batch.items() if name != "offset_mapping"}
            yield rows, self.model(**inputs).last_hidden_state, batch


def _settings(model: str) -> tuple[str, str, int | None]:
    """What a sentence-transformers folder states: its transformer's place, mean or cls, and the tokens it reads."""
    if (modules := _file(model, MODULES_FILE)) is None:
        return "", "mean", None
    entries = read_json(modules)
    try:
        folders = {str(entry["type"]).rpartition(".")[2]: str(entry["path"]) for entry in entries}
    except (TypeError, KeyError):
        raise ValueError(f"{MODULES_FILE}: expected a list of modules with type and path") from None
    for name, path in folders.items():
        if name not in MODULES or ".." in path:
            raise ValueError(f"{MODULES_FILE}: {name} in {path!r}: backend hf runs {', '.join(MODULES)} of the folder")
    transformer, pooling = folders.get("Transformer", ""), folders.get("Pooling", "1_Pooling")
    mode = _pooling(_file(model, f"{pooling}/config.json"))
    settings = _file(model, f"{transformer}/{TRANSFORMER_FILE}".lstrip("/"))
    length = None if settings is None else read_object(settings).get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"{TRANSFORMER_FILE}: max_seq_length is {length!r}; expected a positive whole number")
    return transformer, mode, length


def _pooling(file: Path | None) -> str:
    values = {} if file is None else read_object(file)
    modes = values.get("pooling_mode") or [mode for key, mode in OLD_POOLING_KEYS.items() if values.get(key)]
    mode = "+".join(map(str, modes)) if isinstance(modes, list) else str(modes)
    if mode not in ("", "mean", "cls"):
        raise ValueError(f"1_Pooling/config.json: pooling is {mode!r}; backend hf knows mean and cls")
    return mode or "mean"


def _file(model: str, name: str) -> Path | None:
    """A file of a local folder or of a hub id's, if there is one."""
    if Path(model).exists():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(model, name) is _CACHED_NO_EXIST:
            return None
        raise ValueError(
            f"{model}: {name}, which may state its pooling, is not here, and the hub was not reached ({error})"
        ) from None
    except EntryNotFoundError:
        return None
