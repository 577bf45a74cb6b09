"""A shard's rows in windows: large enough to fill packs evenly, bounded in rows and bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from flashvec.runtime.corpus.cuts import Piece
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.readers import read_rows
from flashvec.runtime.corpus.rows import Bad, Rows
from flashvec.runtime.corpus.sources import SourceError, at_once, describe_change

WINDOW_ROWS = 8192  # the encoder's own window
WINDOW_CHARS = 32 << 20  # of texts, and bytes of the columns that go with them


@dataclass
class Window:
    """Rows of one or several files, in order.

    Attributes:
        files, places: int32 and int64 [n], where each row came from.
        texts: "" where `bad` has the row.
        columns: of the plan's `columns`.
        chunks: int32 [n], number of the chunk within its row; None unless chunks are rows.
        num_read: rows of the input that this window stands for.
    """

    files: np.ndarray
    places: np.ndarray
    texts: list[str]
    bad: dict[int, Bad]
    columns: pa.Table
    num_read: int
    chunks: np.ndarray | None = field(default=None)


def read_windows(plan: Plan, pieces: Sequence[Piece]) -> Iterator[Window]:
    """All rows of a shard.

    Raises:
        SourceError: an input that is gone, damaged or was written to since the plan was made.
    """
    files = dict.fromkeys(piece.file for piece in pieces)
    _check_unchanged(plan, files)
    held: list[Rows] = []
    num_rows = num_chars = 0
    for piece in pieces:
        for rows in read_rows(piece.file, plan.sources[piece.file], piece.start, piece.stop, plan.settings):
            chars = sum(map(len, rows.texts)) + sum(column.nbytes for column in rows.columns.values())
            if held and (num_rows + len(rows) > WINDOW_ROWS or num_chars + chars > WINDOW_CHARS):
                yield _window(plan, held)
                held, num_rows, num_chars = [], 0, 0
            held.append(rows)
            num_rows, num_chars = num_rows + len(rows), num_chars + chars
    if held:
        yield _window(plan, held)
    _check_unchanged(plan, files)  # or a file that grew or shrank while it was read would go unseen


def _check_unchanged(plan: Plan, files: dict[int, None]) -> None:
    for change in at_once(describe_change, [plan.sources[file] for file in files]):
        if change is not None:
            raise SourceError(f"{change}: finished shards are kept; with the planned file back the job goes on")


def _window(plan: Plan, held: list[Rows]) -> Window:
    bad: dict[int, Bad] = {}
    texts: list[str] = []
    tables = []
    for rows in held:
        bad |= {len(texts) + i: reason for i, reason in rows.bad.items()}
        texts += rows.texts
        arrays = [rows.columns[field.name].cast(field.type) for field in plan.columns]
        tables.append(pa.table(arrays, schema=plan.columns) if arrays else pa.table({}))
    return Window(
        files=np.concatenate([np.full(len(rows), rows.file, np.int32) for rows in held]),
        places=np.concatenate([rows.places for rows in held]).astype(np.int64),
        texts=texts,
        bad=bad,
        columns=pa.concat_tables(tables),
        num_read=len(texts),
    )
