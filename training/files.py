"""What a run leaves on disk: there whole or not at all."""

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvec.runtime.checkpoint.placing import naming
from flashvec.training.data import text_files


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields the name to write a file or folder under; in the end it is renamed to `path`, in place of what was there.

    The folder that it is to lie in is made where there is none. A file never takes the place of a folder.

    Raises:
        OSError: the disk is full or not writable, or a folder where a file is to be; `path` is as it was.
    """
    if not path.name:  # "." and "/"
        check_file_or_absent(path)
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            yield partial
            if path.is_dir():
                if not partial.is_dir():
                    check_file_or_absent(path)
                _remove(path)
            partial.replace(path)
        finally:
            _remove(partial)


def check_file_or_absent(path: Path, inputs: Iterable[str | Path] = (), suffix: str = "") -> None:
    """Refuse, before any work, to write a file where a folder or what it is made from is.

    Args:
        inputs: files, and folders that stand for the files in them.
        suffix: how the name must end: training reads a file by it, and would take JSON in a .txt file for texts.

    Raises:
        IsADirectoryError: a folder.
        ValueError: one of `inputs`, or of another suffix.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder: name a file to write", str(path))
    if any(path.resolve() == file.resolve() for file in text_files(list(map(str, inputs)))):
        raise ValueError(f"{path}: is also read from; name another file to write")
    if suffix and path.suffix != suffix:
        kind = {".jsonl": "JSON lines", ".txt": "texts, one a line"}[suffix]
        raise ValueError(f"{path}: what is written are {kind}: name a {suffix} file")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
