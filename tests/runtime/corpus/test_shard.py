"""One shard, in this process: bytes, counts, bad rows, chunks, locks."""

import errno
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from full_disk import full_disk
from stand_in import NOT_FINITE, StandIn, facts, tree

from flashvec.runtime.corpus import shard as shard_module
from flashvec.runtime.corpus import windows
from flashvec.runtime.corpus.cuts import cut
from flashvec.runtime.corpus.inspect import inspect_sources, resolve_columns
from flashvec.runtime.corpus.manifest import Entry, is_done
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import LOCKS, ShardInUse, TooManyErrors, open_lock, run_shard
from flashvec.runtime.corpus.sources import SourceError, find_sources
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.windows import read_windows
from flashvec.runtime.corpus.worker import ShardRunner
from flashvec.runtime.corpus.writers import facts_schema, part_names
from flashvec.runtime.tokenize import TokenizerError


def plan_of(path, **settings):
    sources = find_sources([path])
    inspected = inspect_sources(sources)
    own, columns = resolve_columns(JobSettings(**settings), sources, inspected)
    shards = cut(sources, inspected, own.shard_size)
    return Plan(own, tuple(sources), tuple(shards), columns, facts({}))


@pytest.fixture
def table_file(tmp_path):
    texts = ["one", None, "two", "one", "", NOT_FINITE, "three", NOT_FINITE]
    pq.write_table(pa.table({"text": texts, "id": range(10, 18), "tag": list("abcdefgh")}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_good_rows_have_vectors_and_bad_ones_reasons(table_file, tmp_path):
    plan = plan_of(table_file, id_column="id", columns=("tag",))
    encoder = StandIn()
    entry = run_shard(plan, 0, encoder, Storage(tmp_path / "out"))
    assert (entry.rows_read, entry.rows, entry.errors, entry.duplicates) == (8, 4, 4, 2)
    assert encoder.num_texts == 4  # of the repeated texts one each
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table["row"].to_pylist() == [0, 2, 3, 6] and table["id"].to_pylist() == [10, 12, 13, 16]
    assert table["tag"].to_pylist() == list("acdg")
    np.testing.assert_array_equal(
        np.array(table["vector"].to_pylist(), np.float32), StandIn().embed(["one", "two", "one", "three"])
    )
    errors = [json.loads(line) for line in (tmp_path / "out" / "_errors" / "00000.jsonl").read_text().splitlines()]
    assert [(e["row"], e["code"]) for e in errors] == [(1, "null"), (4, "empty"), (5, "not_finite"), (7, "not_finite")]
    assert NOT_FINITE not in (tmp_path / "out" / "_errors" / "00000.jsonl").read_text()


@pytest.mark.parametrize("dedupe", [True, False])
def test_a_text_at_which_the_tokenizer_fails_is_one_row_without_a_vector(tmp_path, dedupe):
    """It ended its shard, each time anew."""

    class Failing(StandIn):
        def embed(self, texts, **settings):
            if "poison" in texts:
                raise TokenizerError("the tokenizer fails at a text")
            return super().embed(texts, **settings)

    texts = ["one", "poison", "two", "three", "poison", "four", "five"]
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in texts))
    entry = run_shard(plan_of(tmp_path / "in.txt", dedupe=dedupe), 0, Failing(), Storage(tmp_path / "out"))
    assert (entry.rows, entry.errors) == (5, 2)
    found = np.array(pq.read_table(tmp_path / "out" / "part-00000.parquet")["vector"].to_pylist(), np.float32)
    np.testing.assert_array_equal(found, StandIn().embed([text for text in texts if text != "poison"]))
    assert (tmp_path / "out" / "_errors" / "00000.jsonl").read_text().count("no_tokens") == 2
    (tmp_path / "in.txt").write_text("poison\n")
    entry = run_shard(plan_of(tmp_path / "in.txt"), 0, Failing(), Storage(tmp_path / "alone"))
    assert (entry.rows, entry.errors) == (0, 1)
    vectors = StandIn().embed(["one", "two"])
    ranges = ShardRunner(Failing(), facts({})).ranges(["one", "poison", "two"], JobSettings())["ranges"]
    assert ranges == [vectors.min(0).tolist(), vectors.max(0).tolist()]
    with pytest.raises(ValueError, match="fewer than two"):
        ShardRunner(Failing(), facts({})).ranges(["poison", "poison"], JobSettings())


def test_vectors_that_float16_cannot_hold_are_errors(tmp_path):
    """Infinite values stood in the part, and a search compared them."""

    class Large(StandIn):
        def embed(self, texts, **settings):
            scales = np.array([1e6 if text == "large" else 1.0 for text in texts], np.float32)
            return super().embed(texts, **settings) * scales[:, None]

    (tmp_path / "in.txt").write_text("one\nlarge\ntwo\n")
    for precision, rows in (("float16", [0, 10]), ("float32", [0, 4, 10])):
        plan = plan_of(tmp_path / "in.txt", precision=precision, normalize=False)
        run_shard(plan, 0, Large(), Storage(tmp_path / precision))
        table = pq.read_table(tmp_path / precision / "part-00000.parquet")
        assert table["row"].to_pylist() == rows and np.isfinite(table["vector"].to_pylist()).all()
    assert "not_finite" in (tmp_path / "float16" / "_errors" / "00000.jsonl").read_text()


def test_a_window_that_takes_long_is_told_of_in_parts(tmp_path, monkeypatch):
    """Ten texts a pack, each pack longer than between two looks; in the end every row and token is told once."""

    class Slow(StandIn):
        num_texts_run = num_tokens_run = 0

        def embed(self, texts, **settings):
            for start in range(0, len(texts), 10):
                time.sleep(0.1)
                self.num_texts_run += len(texts[start : start + 10])
                self.num_tokens_run += 7
            return super().embed(texts, **settings)

    monkeypatch.setattr(shard_module, "TELL_EVERY_S", 0.02)
    (tmp_path / "in.txt").write_text("".join(f"text {i % 40}\n" for i in range(60)))  # a third comes again
    steps = []
    run_shard(plan_of(tmp_path / "in.txt"), 0, Slow(), Storage(tmp_path / "out"), on_step=steps.append)
    assert len(steps) > 2 and all(step.rows >= 0 and step.tokens >= 0 and step.embed_s >= 0 for step in steps)
    assert sum(step.rows for step in steps) == 60 and sum(step.tokens for step in steps) == 28
    assert 0 < steps[0].rows < 60 and 0.3 < sum(step.embed_s for step in steps) < 5
    (last,) = [step for step in steps if step.read_s > 0]
    assert last is steps[-1] and last.rows >= 20
    assert not [thread for thread in threading.enumerate() if thread.name == "flashvec-teller"]


def test_again_does_nothing_and_the_same_elsewhere(table_file, tmp_path):
    plan = plan_of(table_file)
    encoder = StandIn()
    first = run_shard(plan, 0, encoder, Storage(tmp_path / "a"))
    assert run_shard(plan, 0, encoder, Storage(tmp_path / "a")) == first and encoder.num_texts == 4
    run_shard(plan, 0, StandIn(), Storage(tmp_path / "b"))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("precision", ["float32", "float16", "binary"])
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_precisions_and_dims(table_file, tmp_path, precision, format):
    plan = plan_of(table_file, precision=precision, format=format, dims=8)
    entry = run_shard(plan, 0, StandIn(), Storage(tmp_path / "out"))
    vectors = StandIn().embed(["one", "two", "one", "three"])[:, :8]
    expected = np.packbits(vectors > 0, axis=1) if precision == "binary" else vectors.astype(precision)
    if format == "npy":
        found = np.load(tmp_path / "out" / "part-00000.npy")
        assert pq.read_table(tmp_path / "out" / "part-00000.ids.parquet").schema == facts_schema(plan)
    else:
        column = pq.read_table(tmp_path / "out" / "part-00000.parquet")["vector"]
        found = np.array(column.to_pylist(), column.type.value_type.to_pandas_dtype())
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert [facts.name for facts in entry.files[:-1]] == part_names(plan, 0)


def test_without_dedupe_every_row_is_encoded(table_file, tmp_path):
    encoder = StandIn()
    entry = run_shard(plan_of(table_file, dedupe=False), 0, encoder, Storage(tmp_path / "out"))
    assert encoder.num_texts == 6 and entry.duplicates == 0 and entry.rows == 4


def test_too_many_errors_stop_and_keep_nothing(table_file, tmp_path):
    with pytest.raises(TooManyErrors, match="empty 1, not_finite 2, null 1"):
        run_shard(plan_of(table_file), 0, StandIn(), Storage(tmp_path / "out"), max_errors=3)
    assert set(tree(tmp_path / "out")) == {f"{LOCKS}/00000"}
    assert run_shard(plan_of(table_file), 0, StandIn(), Storage(tmp_path / "out"), max_errors=4).errors == 4


def test_an_input_that_changes_or_goes(table_file, tmp_path):
    plan = plan_of(table_file)
    content = table_file.read_bytes()
    table_file.unlink()
    with pytest.raises(SourceError, match=r"in\.parquet is gone: finished shards are kept"):
        run_shard(plan, 0, StandIn(), Storage(tmp_path / "out"))
    table_file.write_bytes(content)
    with pytest.raises(SourceError, match="written to since"):
        run_shard(plan, 0, StandIn(), Storage(tmp_path / "out"))
    assert is_done(Storage(tmp_path / "out"), 0) is None


def test_a_disk_without_room_is_named_behind_a_uri_too(table_file):
    """Parts lie in a temporary folder before they are sent, of which an output at s3:// says nothing."""
    storage = Storage("mock:///bucket/out")
    place = re.escape(tempfile.gettempdir())
    with full_disk(), pytest.raises(OSError, match=rf"'{place}, where parts lie until they are sent \(TMPDIR names"):
        run_shard(plan_of(table_file), 0, StandIn(), storage)


def test_a_shard_out_of_range(table_file, tmp_path):
    with pytest.raises(ValueError, match="the plan has 1: 0 to 0"):
        run_shard(plan_of(table_file), 1, StandIn(), Storage(tmp_path / "out"))


def test_leftovers_of_a_killed_process_go(table_file, tmp_path):
    storage = Storage(tmp_path / "out")
    storage.make()
    left = storage.stage("part-00000.parquet"), storage.stage("part-00001.parquet")
    run_shard(plan_of(table_file), 0, StandIn(), storage)
    assert [os_name.suffix for os_name in (tmp_path / "out").glob(".*")] == [".tmp"]  # the other shard's
    for staged in left:
        staged.discard()


def _hold(path, ready, release):
    with open_lock(path, 0, "taken"):
        ready.set()
        release.wait(30)


def test_a_lock_belongs_to_one_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", ready, release))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ShardInUse, match="taken"), open_lock(tmp_path / "lock", 0.1, "taken"):
        pass
    process.kill()  # the lock goes with it
    process.join()
    with open_lock(tmp_path / "lock", 5, "taken"):
        (tmp_path / "lock").unlink()  # as a finished job does
        with open_lock(tmp_path / "lock", 0, "taken"):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_as_one_behind_a_uri(tmp_path, monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_module.fcntl, "flock", flock)
    with open_lock(tmp_path / "lock", 0.0, "held"), open_lock(tmp_path / "lock", 0.0, "held"):
        pass
    number = errno.EIO  # any other failure is one
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), open_lock(tmp_path / "lock", 0.0, "held"):
        pass


def test_windows_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_CHARS", 400_000)
    (tmp_path / "a.txt").write_text("".join("x" * 99 + "\n" for _ in range(20_000)))
    plan = plan_of(tmp_path / "a.txt")
    sizes = [len(window.texts) for window in read_windows(plan, plan.shards[0].pieces)]
    assert sum(sizes) == 20_000 and max(sizes) <= 4096


def test_windows_are_bounded_by_their_columns_too(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_CHARS", 400_000)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "t", "body": "x" * 99}) + "\n" for _ in range(20_000))
    )
    plan = plan_of(tmp_path / "a.jsonl", text_columns=("text",), columns=("body",))
    sizes = [len(window.texts) for window in read_windows(plan, plan.shards[0].pieces)]
    assert sum(sizes) == 20_000 and max(sizes) <= 4096


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Python's own allocations over four times the rows; `bench/bench_corpus.py` measures the process up to 10^6."""
    peaks = []
    for num_rows in (10_000, 40_000):
        path = tmp_path / f"{num_rows}.txt"
        path.write_text("".join(f"row {i}\n" for i in range(num_rows)))
        plan = plan_of(path, shard_size=5000)
        storage = Storage(tmp_path / f"out{num_rows}")
        tracemalloc.start()
        rows = sum(run_shard(plan, i, StandIn(), storage).rows for i in range(len(plan.shards)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == num_rows
    assert peaks[1] < peaks[0] + (1 << 20), peaks


def test_an_entry_names_no_machine_unless_mixed():
    entry = Entry(0, 1, 1, 0, 0, 0, 0, "x")
    assert "machine" not in json.loads(entry.to_json())
