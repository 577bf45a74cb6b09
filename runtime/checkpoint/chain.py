"""From an adapter folder to the folders below it: what was trained on what, down to the base weights."""

import os
from pathlib import Path

from flashvec.runtime.checkpoint.llm2vec import is_llm2vec, is_second_adapter, mntp_name
from flashvec.runtime.checkpoint.open import resolve
from flashvec.runtime.checkpoint.peft import CONFIG_FILE, read_adapter_config
from flashvec.runtime.checkpoint.source import CheckpointError

MAX_CHAIN = 4  # adapters one on top of the other; more is a loop


def model_name(folder: Path) -> str:
    """Hub id of a folder in the hub's cache (models--owner--name/snapshots/commit), else its own name."""
    folder = Path(os.path.abspath(folder))
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def adapter_chain(folder: Path, local_files_only: bool = False) -> tuple[Path, list[Path]]:
    """The base, a folder or .gguf file, and adapters to merge into it in order; a folder with weights is its own base.

    Raises:
        CheckpointError: a model that an adapter needs is not to be had, or adapters name each other in a
            circle.
    """
    adapters: list[Path] = []
    while (folder / CONFIG_FILE).is_file() and not _has_weights(folder):
        if len(adapters) == MAX_CHAIN:
            raise CheckpointError(f"{folder.name}/{CONFIG_FILE}: more than {MAX_CHAIN} adapters name one another")
        adapters.insert(0, folder)
        folder = _below(folder, local_files_only)
    return folder, adapters


def adapter_below(folder: Path) -> Path | None:
    """The adapter that this one was trained on top of, where it says so and that lies on this machine."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    stated = read_adapter_config(folder).get("base_model_name_or_path")
    place = _local(stated, folder) if isinstance(stated, str) and stated else None
    return place if place is not None and (place / CONFIG_FILE).is_file() and not _has_weights(place) else None


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _below(folder: Path, local_files_only: bool) -> Path:
    """The model that an adapter is to be merged into."""
    name = model_name(folder)
    stated = read_adapter_config(folder).get("base_model_name_or_path")
    if not is_second_adapter(folder, name):
        if not stated or not isinstance(stated, str):
            raise CheckpointError(
                f"{name}/{CONFIG_FILE}: base_model_name_or_path is {stated!r}; name the base yourself: "
                "Encoder.load(base, adapters=[this folder])"
            )
        try:
            return _local(stated, folder) or resolve(stated, None, local_files_only)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{name}/{CONFIG_FILE}: base_model_name_or_path: {error}; where you have the base, use "
                "Encoder.load(base, adapters=[this folder])"
            ) from None
    # It names the raw base, but was trained on base + MNTP adapter.
    mntp = mntp_name(name)
    cure = "pass it yourself: Encoder.load(base_or_mntp, adapters=[...]) with the adapters in their order"
    if mntp is not None:
        if "/" in mntp:
            try:
                return resolve(mntp, None, local_files_only)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: needs the MNTP adapter {mntp}: {error}; {cure}") from None
        if (folder.parent / mntp).is_dir():
            return folder.parent / mntp
    local = _local(str(stated), folder) if stated else None
    if local is not None and is_llm2vec(local, model_name(local)):
        return local
    if mntp is None:  # LLM2Vec's second adapters look so, and ours without the rest of their folder
        raise CheckpointError(f"{name}: does not tell whether an MNTP adapter goes between it and its base; {cure}")
    raise CheckpointError(
        f"{name}: was trained on top of the MNTP adapter {mntp}, expected beside it, and is wrong without it; {cure}"
    )


def _local(stated: str, folder: Path) -> Path | None:
    """A base on this machine, folder or .gguf file: at the path as stated, from the adapter's folder, or beside it.

    `./` and `../` are meant from the adapter's folder first, as a training run writes them: what lies at such a path
    from the working directory is another folder of that name.
    """
    name = Path(stated).name
    places = [Path(stated).expanduser(), folder / stated]
    if stated.startswith("."):
        places.reverse()
    places += [folder.parent / name] if name else []
    here = folder.resolve()
    try:
        return next((place for place in places if _is_model(place) and place.resolve() != here), None)
    except OSError:  # a name longer than the file system takes
        return None


def _is_model(place: Path) -> bool:
    return place.is_dir() or (place.suffix.lower() == ".gguf" and place.is_file())
