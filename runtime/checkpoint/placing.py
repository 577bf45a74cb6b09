"""Where a written model comes to lie: in a folder of its own, whole or not at all, or among other files."""

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flashvec.runtime.checkpoint.safetensors_files import INDEX_FILE, WEIGHTS_FILE
from flashvec.runtime.checkpoint.saved import SPEC_FILE
from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE, SETTINGS_FILE, TRANSFORMER_FILE
from flashvec.runtime.texts import check_path, check_truth

# A place that takes no file, however much room there is.
NO_PLACE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
# Of a model written before into the same folder: beside files of the new one they would be read as its own.
REPLACED_FILES = (WEIGHTS_FILE, INDEX_FILE, MODULES_FILE, SETTINGS_FILE, TRANSFORMER_FILE)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, a failure to write names `path` and the cure.

    A full disk is a `SafetensorError` to safetensors, which is no OSError, a bare Exception to tokenizers, and an
    OSError without a name to Python.

    Raises:
        OSError: in place of any of them.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        cure = "see that it may be written" if isinstance(error, NO_PLACE) else "make room there"
        raise OSError(
            f"{path} could not be written ({error}): {cure} and run again; what was saved before is as it was"
        ) from error


def target_folder(folder: str | Path, overwrite: bool, sources: Iterable[Path] = ()) -> Path:
    """The folder to write, if it may be written: none of `sources`, of which the model is made, is it or lies in it."""
    check_truth("overwrite", overwrite)
    if not str(folder):
        raise ValueError("folder is '': name one to write ('.' is the current one)")
    target = Path(folder).expanduser().resolve()
    check_path(target)
    for source in map(Path.resolve, sources):
        if source == target:
            raise ValueError(f"{folder}: is the model's own folder; write to another")
        if source.is_relative_to(target):
            raise ValueError(f"{folder}: holds {source.name}, of which the model is made; write to another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder to write")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{folder}: exists and is not empty; choose another folder, or overwrite=True (--overwrite)"
            )
        if not (_is_model_config(target / "config.json") or (target / SPEC_FILE).is_file()):
            raise ValueError(f"{folder}: is not a model folder, so it is not replaced; choose another")
    return target


def _is_model_config(path: Path) -> bool:
    """Many programs keep a config.json beside what is theirs: a model's names its kind."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "model_type" in values


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write into a folder beside the target, then put it in its place: nobody ever sees half a model.

    Raises:
        OSError: the disk is full or not writable; names the target, which is as it was.
    """
    with naming(target), _folder_in(target.parent, f".{target.name}.") as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        new.mkdir()
        write(new)
        if target.exists():
            _set_aside(target, old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


def _set_aside(target: Path, old: Path) -> None:
    """Rename a folder; one of a container's image, in a layer below the writable one, is copied and dropped instead."""
    try:
        target.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(target, old, symlinks=True)
        try:
            shutil.rmtree(target)
        except OSError:  # a part of it may be gone
            shutil.copytree(old, target, symlinks=True, dirs_exist_ok=True)
            raise


def write_among_others(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a whole model into a folder inside this one, then move its files here; nothing else here is touched.

    Raises:
        OSError: the disk is full or not writable; names the folder.
    """
    with naming(folder), _folder_in(folder, ".flashvec.") as inside:
        new = Path(inside)
        write(new)
        for name in REPLACED_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(new.rglob("*")):
            target = folder / path.relative_to(new)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)


@contextmanager
def _folder_in(parent: Path, prefix: str) -> Iterator[str]:
    """A folder of its own for as long as something is written."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
        yield folder
