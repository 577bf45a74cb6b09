"""Input files: found from paths, folders, globs and URIs, with their format read off their names."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from flashvec.runtime.corpus.storage import PLAIN, escaped, is_uri, open_uri

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_GLOB = set("*?[")
_ENDING = re.compile(r"\.[a-z0-9]{1,8}(\.[a-z0-9]{1,3})?")
_ESCAPES = re.compile(r"((?:%[0-9A-Fa-f]{2})+)")
SHOWN_ENDINGS = 5
THREADS = 16  # that wait for storage at the same time
_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Source:
    """One input file as it was when the plan was made."""

    uri: str  # absolute path, or URI
    format: str  # a value of FORMATS
    compression: str | None
    size: int
    mtime_ns: int

    @property
    def counts_rows(self) -> bool:
        """Are places in it row numbers; else they are bytes of the decompressed file."""
        return self.format in ("parquet", "arrow")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, JSON-ready."""
        return asdict(self)


class SourceError(ValueError):
    """An input file that is missing, damaged or not as planned."""


def find_sources(inputs: Sequence[str | Path], note: Callable[[str], None] | None = None) -> list[Source]:
    """The files that a user's inputs name, in the order given; those of a folder or glob sorted by name.

    Args:
        inputs: files, folders (with all below them; hidden files left out), globs (** for any depth), URIs of these.
        note: told which endings were passed over in a folder or glob.

    Raises:
        SourceError: nothing there, an unknown format, or a file that is named twice.
    """
    if not inputs:
        raise SourceError("inputs names no file")
    found: list[Source] = []
    for given in map(str, inputs):
        others: Counter[str] = Counter()
        linked: list[str] = []
        listed = _behind_uri(escaped(given), others) if is_uri(given) else _local(given, others, linked)
        if not listed:
            if given == "-":
                raise SourceError("-: a pipe cannot be read again where a job goes on: write it into a file first")
            seen_there = f", only {_listed(others)}" if others else ""
            raise SourceError(f"{given}: no input file there{seen_there}; known endings are {', '.join(FORMATS)}")
        if others and note is not None:
            note(f"{given}: passed over {_listed(others)}; known endings are {', '.join(FORMATS)}")
        if linked and note is not None:
            what = "folder that is a link" if len(linked) == 1 else "folders that are links"
            note(f"{given}: passed over {len(linked)} {what}; name one to take what it holds")
        found += listed
    seen: set[str] = set()
    for source in found:
        if (shown := source.uri.encode(errors="surrogateescape").decode(errors="replace")) != source.uri:
            raise SourceError(f"{shown}: its name is not UTF-8, which a plan cannot hold: rename it")
        place = source.uri if is_uri(source.uri) else os.path.realpath(source.uri)
        if place in seen:
            raise SourceError(f"{source.uri}: named twice, its rows would be embedded twice")
        seen.add(place)
    return found


def describe_change(planned: Source) -> str | None:
    """What is different about a file now; None if nothing is."""
    try:
        now = stat_source(planned.uri)
    except FileNotFoundError:
        return f"{planned.uri} is gone"
    if now.size != planned.size:
        return f"{planned.uri} had {planned.size} bytes and has {now.size}"
    if now.mtime_ns != planned.mtime_ns:
        return f"{planned.uri} was written to since"
    return None


def at_once(function: Callable[[_Given], _Found], items: Sequence[_Given]) -> list[_Found]:
    """What a function finds of each item, in order; several calls wait for storage at the same time."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        return list(pool.map(function, items))


def stat_source(uri: str, info: pafs.FileInfo | None = None) -> Source:
    """A file's facts as they are now.

    Args:
        info: what a listing said of a file behind a URI, so that it need not be asked for.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: an ending that no format has.
    """
    format_name, compression = _format(uri.split("?")[0] if is_uri(uri) else uri)
    if is_uri(uri):
        filesystem, path = open_uri(uri)
        info = info or filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(uri)
        mtime_ns = info.mtime_ns or 0
        if not isinstance(filesystem, pafs.LocalFileSystem):  # some stores list fractions that a file's own facts lack
            mtime_ns -= mtime_ns % 1_000_000_000
        return Source(uri, format_name, compression, info.size, mtime_ns)
    status = os.stat(uri)
    return Source(uri, format_name, compression, status.st_size, status.st_mtime_ns)


def open_source(source: Source) -> Any:
    """A pyarrow file to read from, seekable, still compressed.

    Raises:
        SourceError: it is gone or cannot be opened.
    """
    try:
        if is_uri(source.uri):
            filesystem, path = open_uri(source.uri)
            return filesystem.open_input_file(path)
        return pafs.LocalFileSystem().open_input_file(source.uri)
    except OSError as error:
        raise SourceError(f"{source.uri}: {_reason(error)}") from None


def fault(error: Exception) -> str:
    """What a failed read says of a file: that it is damaged, or that the place where it lies gives no bytes now."""
    # Only the system's errors have an errno, and only what a store or the network answered has the prefix.
    elsewhere = getattr(error, "errno", None) is not None or "AWS Error" in str(error)
    return "cannot be read" if elsewhere else "damaged"


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file; the job goes on where it stopped once the file is back"
    return error.strerror or str(error).splitlines()[0]


def _listed(endings: Counter[str]) -> str:
    """Endings as a person reads them: those of most files first."""
    shown = [f"{count} {ending}" for ending, count in endings.most_common(SHOWN_ENDINGS)]
    return ", ".join(shown) + (" and others" if len(endings) > SHOWN_ENDINGS else "")


def _local(given: str, others: Counter[str], linked: list[str]) -> list[Source]:
    path = Path(given).expanduser().absolute()
    if path.is_file():
        return [stat_source(str(path))]
    if path.is_dir():
        return _known(((str(p), None) for p in _walk(path, linked)), others)
    if _GLOB & set(given):
        files = (p for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p))
        return _known(((p, None) for p in files), others)
    return []


def _walk(folder: Path, linked: list[str]) -> list[Path]:
    """Files below a folder, no pipes or sockets.

    Links to folders are not followed, which may lead to where a job writes, but listed.
    """
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        linked += [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root) / name for name in files if not name.startswith((".", "_"))]
    # A pipe would be waited for, behind a link too; a link to nothing stays, to be an error.
    return sorted(path for path in found if path.is_file() or not path.exists())


def _behind_uri(given: str, others: Counter[str]) -> list[Source]:
    address, _, query = given.partition("?") if "://" in given else (given, "", "")
    suffix = f"?{query}" if query else ""
    first_glob = min((address.find(c) for c in _GLOB if c in address), default=-1)
    start = address if first_glob < 0 else address[: address.rfind("/", 0, first_glob)]
    filesystem, path = open_uri(start + suffix)
    plain = unquote(start).rstrip("/")
    if not plain.endswith(path):
        raise SourceError(f"{given}: give the path as it is listed, without empty parts or dots")
    prefix = plain[: len(plain) - len(path)]
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [stat_source(given)]
    entries = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    try:
        files = {entry.path: entry for entry in entries if entry.type == pafs.FileType.File}
    except UnicodeDecodeError:
        raise SourceError(f"{given}: the name of a file below it is not UTF-8: rename it") from None
    names = sorted(files)
    if first_glob >= 0:
        pattern = _unescaped(address).split("/")
        names = [name for name in names if glob_matches((prefix + name).split("/"), pattern)]
    names = [name for name in names if not _hidden(name[len(path) :])]
    return _known(((prefix + quote(name, safe=PLAIN) + suffix, files[name]) for name in names), others)


def _unescaped(address: str) -> str:
    """A glob in a URI as one of names; what stands in it escaped, as %5B, means that very character."""
    pieces = _ESCAPES.split(address)
    return "".join(glob.escape(unquote(piece)) if i % 2 else piece for i, piece in enumerate(pieces))


def glob_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As a local glob: * within a name, ** for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(glob_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and glob_matches(parts[1:], pattern[1:])


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _known(files: Iterable[tuple[str, pafs.FileInfo | None]], others: Counter[str]) -> list[Source]:
    """Files of a folder or glob whose ending is a format's; others are not texts, and counted by their endings."""
    found = []
    for uri, info in files:
        try:
            found.append(stat_source(uri, info))
        except SourceError:
            stem, ending = os.path.splitext((uri.split("?")[0] if is_uri(uri) else uri).lower())
            if ending in COMPRESSIONS:
                ending = os.path.splitext(stem)[1] + ending
            # Nothing of a file's contents or name may fill a log: what is no usual ending counts as none.
            others[ending if _ENDING.fullmatch(ending) else "without a usual ending"] += 1
    return found


def _format(uri: str) -> tuple[str, str | None]:
    name = uri.rsplit("/", 1)[-1].lower()
    stem, ending = os.path.splitext(name)
    compression = COMPRESSIONS.get(ending)
    if compression is not None:
        ending = os.path.splitext(stem)[1]
    if ending not in FORMATS:
        raise SourceError(f"{uri}: unknown ending {ending or 'none'!r}; known are {', '.join(FORMATS)}")
    if compression is not None and FORMATS[ending] in ("parquet", "arrow"):
        raise SourceError(f"{uri}: {FORMATS[ending]} files are compressed inside; decompress the file")
    return FORMATS[ending], compression
