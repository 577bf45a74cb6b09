"""What a run leaves on disk: there whole or not at all, and a failure to write says what and where."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
        cure = "see that it may be written" if isinstance(error, PermissionError) else "make room there"
        raise OSError(
            f"{path} could not be written ({error}): {cure} and run again; what was saved before is as it was"
        ) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields the name to write a file or folder under; in the end it is renamed to `path`, in place of what was there.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            _remove(partial)
            yield partial
            if path.is_dir():
                _remove(path)
            partial.replace(path)
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
