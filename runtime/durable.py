"""What was written is there after a power cut, too."""

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, durable.

    A folder's where its file system can be asked to: SMB shares and some others cannot.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
