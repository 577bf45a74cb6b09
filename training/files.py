"""What a run leaves on disk: there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvec.runtime.checkpoint.placing import naming


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields the name to write a file or folder under; in the end it is renamed to `path`, in place of what was there.

    The folder that it is to lie in is made where there is none.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
