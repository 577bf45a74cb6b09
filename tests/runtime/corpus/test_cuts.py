import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvec.runtime.corpus.cuts import cut
from flashvec.runtime.corpus.inspect import inspect_sources
from flashvec.runtime.corpus.readers import read_rows
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import SourceError, find_sources

SETTINGS = JobSettings(text_columns=("text",))


@pytest.fixture
def mixed(tmp_path):
    """Row ranges, counted bytes and estimated bytes in one job, an empty file among them."""
    pq.write_table(pa.table({"text": [f"p{i}" for i in range(25)]}), tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"c{i}\n"\n' for i in range(33)))
    for name in ("a.csv", "c.txt", "d.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("".join(f"g{i}\n" for i in range(41)).encode()))
    (tmp_path / "e.txt").write_text("".join(f"line number {i}\n" for i in range(57)))
    return find_sources([tmp_path])


@pytest.mark.parametrize("size", [1, 7, 10, 1000])
def test_shards_hold_every_row_once_in_order(mixed, size):
    shards = cut(mixed, inspect_sources(mixed), size)
    texts = [
        text.strip()
        for shard in shards
        for piece in shard.pieces
        for rows in read_rows(piece.file, mixed[piece.file], piece.start, piece.stop, SETTINGS)
        for text in rows.texts
    ]
    expected = [f"p{i}" for i in range(25)] + [f"c{i}" for i in range(33)] + [f"g{i}" for i in range(41)]
    assert texts == [*expected, *(f"line number {i}" for i in range(57))]
    counted = [shard for shard in shards if all(not mixed[piece.file].uri.endswith("e.txt") for piece in shard.pieces)]
    assert all(shard.num_rows == size for shard in counted[:-1])


def test_a_large_first_record_does_not_size_all_shards(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 300_000 + "\n" + ("y" * 99 + "\n") * 20_000)
    sources = find_sources([path])
    shards = cut(sources, inspect_sources(sources), 1000)
    assert 15 <= len(shards) <= 30


def test_nothing_to_embed(tmp_path):
    (tmp_path / "a.txt").touch()
    sources = find_sources([tmp_path / "a.txt"])
    with pytest.raises(SourceError, match="no rows"):
        cut(sources, inspect_sources(sources), 10)
