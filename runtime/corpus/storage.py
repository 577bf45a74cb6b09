"""A folder that a job writes into: a local one, or one behind a URI.

A file appears whole or not at all. Locally it is written beside its place under a private name, flushed to the disk,
renamed, and the folder is flushed too; behind a URI it is sent as one object, which stores show once it is complete.
"""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, quote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from flashvec.runtime.durable import sync
from flashvec.runtime.texts import check_path

BLOCK = 1 << 20
PLAIN = "/=+,:;@&!$'()*~"  # what stands in a URI as it is
# Of a URI's query: S3's access_key, Azure's client_secret and the signature of a shared access, sig, and their kin.
_SECRET_KEY = re.compile(r"secret|token|passw|key|credential$|^sig(nature)?$", re.IGNORECASE)
_TEMPORARY = re.compile(r"^\..+\.\d+-[0-9a-f]{12}\.tmp$")


def is_uri(location: str) -> bool:
    """Is this a URI rather than a local path."""
    return "://" in location


def escaped(uri: str) -> str:
    """A URI as it may be written: what none can hold as it is, a space, # or a letter beyond ASCII, stands escaped."""
    return quote(uri, safe=f"{PLAIN}%?[]", errors="surrogateescape")


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's filesystem for a URI, and the path in it.

    Raises:
        ValueError: a URI that carries a password (it would be kept in the plan), or of an unknown kind.
    """
    parts = urlsplit(uri)
    query = parse_qsl(parts.query)
    inner = [value for _, value in query if "@" in value]  # an address with a user and a password of its own
    if parts.password or any(_SECRET_KEY.search(key) for key, _ in query) or any(map(_has_password, inner)):
        raise ValueError(f"the {parts.scheme} URI holds a secret: give credentials through the environment instead")
    try:
        filesystem, path = pafs.FileSystem.from_uri(escaped(uri))
    except UnicodeDecodeError:
        raise ValueError(f"cannot open {uri}: its escapes are not UTF-8. A % in a name is written %25") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot open {uri}: {str(error).splitlines()[0]}") from None
    return filesystem, path.rstrip("/")


def _has_password(address: str) -> bool:
    return ":" in address.partition("//")[2].rpartition("@")[0]


def digest(file: IO[bytes]) -> str:
    """xxh3 (64 bits, hexadecimal) of the rest of a file."""
    found = xxhash.xxh3_64()
    while block := file.read(BLOCK):
        found.update(block)
    return found.hexdigest()


class Staged:
    """A file being written: `file` takes its bytes, `commit` makes it appear, `discard` drops it."""

    def __init__(self, storage: "Storage", name: str) -> None:
        self.storage, self.name = storage, name
        if storage.root is None:
            handle, path = tempfile.mkstemp(prefix="flashvec-")  # 0600
            os.unlink(path)  # the handle is all that is used: a process that is stopped leaves nothing
        else:
            place = storage.root / name
            path = str(place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp"))
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self.path = path
        self.file: IO[bytes] = os.fdopen(handle, "w+b")

    def digest(self) -> tuple[int, str]:
        """Bytes and xxh3 of what was written so far."""
        self.file.flush()
        size = self.file.tell()
        self.file.seek(0)
        found = digest(self.file)
        self.file.seek(size)
        return size, found

    def commit(self) -> None:
        """Make the file durable, then visible."""
        self.file.flush()
        if self.storage.root is None:
            self.file.seek(0)
            self.storage.send(self.name, self.file)
            self.discard()
            return
        os.fsync(self.file.fileno())
        os.fchmod(self.file.fileno(), 0o666 & ~_umask())
        self.file.close()
        place = self.storage.root / self.name
        os.rename(self.path, place)
        sync(place.parent)

    def discard(self) -> None:
        """Drop the file; does nothing where it is gone."""
        with contextlib.suppress(OSError):  # a full disk fails again on what is still buffered
            self.file.close()
        Path(self.path).unlink(missing_ok=True)


class Storage:
    """A job's folder.

    Args:
        location: a local path or a URI.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.root: Path | None = None
        if is_uri(self.location):
            self.location = escaped(self.location)
            self.filesystem, self.base = open_uri(self.location)
            if isinstance(self.filesystem, pafs.LocalFileSystem):
                self.root = Path(self.base)
        else:
            self.root = Path(self.location).absolute()
            check_path(self.root)
            self.filesystem, self.base = pafs.LocalFileSystem(), str(self.root)

    def make(self, *folders: str) -> None:
        """Create the folder and folders in it, durably.

        Raises:
            ValueError: a file is in the way.
        """
        for name in ("", *folders):
            if self.root is None:
                continue  # object stores have names, not folders
            path = self.root / name if name else self.root
            missing = [p for p in (path, *path.parents) if not p.exists()]
            try:
                path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                held = next(p for p in (path, *path.parents) if os.path.lexists(p))  # a link to nothing, too
                raise ValueError(f"out is {self.location}, and {held} is no folder: give another") from None
            for made in missing:
                sync(made.parent)

    @property
    def staging(self) -> str:
        """Where files are written before they appear, in the words of an error message."""
        if self.root is not None:
            return str(self.root)
        return f"{tempfile.gettempdir()}, where parts lie until they are sent (TMPDIR names another place)"

    def stage(self, name: str) -> Staged:
        """Begin a file."""
        return Staged(self, name)

    def write(self, name: str, content: bytes) -> None:
        """A whole small file."""
        staged = self.stage(name)
        try:
            staged.file.write(content)
            staged.commit()
        except BaseException:
            staged.discard()
            raise

    def send(self, name: str, file: IO[bytes]) -> None:
        """Put a local file's bytes behind the URI; nothing is there where this was stopped."""
        out = self.filesystem.open_output_stream(f"{self.base}/{name}", compression=None)
        try:
            with out:
                while block := file.read(8 * BLOCK):
                    out.write(block)
        except BaseException:
            with contextlib.suppress(OSError):  # the store cannot be reached, which then shows nothing either
                self.remove(name)  # pyarrow cannot abort: it closes the stream, and a part of the file appears
            raise

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        info = self.filesystem.get_file_info(f"{self.base}/{name}")
        return info.size if info.type == pafs.FileType.File else None

    def read(self, name: str, limit: int = 1 << 30) -> bytes | None:
        """A whole file of at most `limit` bytes; None where there is none."""
        size = self.size(name)
        if size is None:
            return None
        if size > limit:
            raise ValueError(f"{self.location}/{name} has {size} bytes, more than such a file can have")
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> Any:
        """A pyarrow file to read, seekable."""
        return self.filesystem.open_input_file(f"{self.base}/{name}")

    def names(self, folder: str = "") -> list[str]:
        """Files of one folder, sorted, temporary ones left out."""
        base = f"{self.base}/{folder}" if folder else self.base
        found = self.filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        names = (info.base_name for info in found if info.type == pafs.FileType.File)
        return sorted(name for name in names if not _TEMPORARY.match(name))

    def remove(self, name: str) -> None:
        """Drop a file; does nothing where there is none."""
        if self.size(name) is not None:
            self.filesystem.delete_file(f"{self.base}/{name}")

    def sweep(self, folder: str, belongs: Callable[[str], bool]) -> None:
        """Drop temporary files of a local folder that a killed process left, where `belongs(their final name)`."""
        if self.root is None or not (self.root / folder).is_dir():
            return
        for entry in os.scandir(self.root / folder):
            if _TEMPORARY.match(entry.name) and belongs(entry.name[1:].rsplit(".", 2)[0]):
                Path(entry.path).unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask, read without changing it for other threads."""
    with contextlib.suppress(FileNotFoundError):  # no Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
