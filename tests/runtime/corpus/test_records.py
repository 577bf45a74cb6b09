import bz2
import errno
import gzip
import io

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashvec.runtime.corpus import records as module
from flashvec.runtime.corpus.records import csv_header, next_line_start, read_lines, read_records
from flashvec.runtime.corpus.sources import SourceError, find_sources


def source_of(path, content):
    path.write_bytes(content)
    return find_sources([path])[0]


def without_ending(line: bytes) -> bytes:
    """A carriage return belongs to an ending only before a line feed: a file's last byte may be one of the text's."""
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.booleans(), st.data())
@example([b"a\r", b"\r"], False, None)
@example([b"a\r", b"\r"], True, None)
def test_ranges_cut_anywhere_hold_every_line_once(tmp_path_factory, lines, ends, data):
    content = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    source = source_of(tmp_path_factory.mktemp("r") / "a.txt", content)
    whole = list(read_lines(source, 0))
    assert [without_ending(content[r.start : r.stop]) for r in whole] == [r.content for r in whole]
    drawn = range(source.size + 1) if data is None else data.draw(st.lists(st.integers(0, source.size), max_size=3))
    cuts = sorted({0, source.size, *drawn})
    starts = [next_line_start(source, cut) if cut else 0 for cut in cuts]
    parts = [r for a, b in zip(starts, [*starts[1:], source.size], strict=True) for r in read_lines(source, a, b)]
    assert parts == whole


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_places_are_those_of_the_decompressed_file(tmp_path, ending):
    content = b"".join(b"line %d\n" % i for i in range(5000))
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True),
    }[ending]
    source = source_of(tmp_path / f"a.txt{ending}", pack(content))
    whole = list(read_lines(source, 0))
    assert len(whole) == 5000 and whole[4321].content == b"line 4321"
    assert list(read_lines(source, whole[4000].start, whole[4003].start)) == whole[4000:4003]


def test_an_endless_line_is_skipped_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD", 1000)
    monkeypatch.setattr(module, "BLOCK", 64)
    source = source_of(tmp_path / "a.txt", b"one\n" + b"x" * 5000 + b"\ntwo\n" + b"y" * 2000)
    found = list(read_lines(source, 0))
    assert [r.content for r in found] == [b"one", None, b"two", None]
    assert [r.start for r in found] == [0, 4, 5005, 5009] and found[-1].stop == source.size


@pytest.mark.parametrize(
    "error",
    [OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 52"), OSError(errno.EIO, "I/O")],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_place_that_gives_no_bytes_is_no_damage(tmp_path, monkeypatch, error, name):
    """A store that is gone for a while, or a mount: the file is as it was, and nobody should look for faults in it."""

    class Gone(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise error

    source = source_of(tmp_path / name, b"a\nb\n")
    monkeypatch.setattr(module, "open_source", lambda source: pa.PythonFile(Gone(), "r"))
    with pytest.raises(SourceError, match=f"{name}: cannot be read near byte 0 "):
        list(read_lines(source, 0))


@pytest.mark.parametrize("cut", [-10, -1])
def test_a_cut_off_gz_is_an_error(tmp_path, cut):
    source = source_of(tmp_path / "a.txt.gz", gzip.compress(bytes(range(256)) * 4000)[:cut])
    with pytest.raises(SourceError, match=r"a\.txt\.gz: (damaged|ends)"):
        list(read_lines(source, 0))


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD", 1 << 16)
    source = source_of(tmp_path / "a.txt.gz", gzip.compress(b"x" * (1 << 25)))
    with pytest.raises(SourceError, match="250-fold"):
        sum(1 for _ in read_lines(source, 0))


def test_csv_places_and_broken_records(tmp_path):
    content = b'id,text\n1,"two\nlines"\n\n2,a,b\n3,"bad"x\n4,"\xff"\r\n5,last'
    source = source_of(tmp_path / "a.csv", content)
    names, start = csv_header(source)
    assert names == ["id", "text"]
    whole = list(read_records(source, start))
    assert [r.fields for r in whole] == [
        [b"1", b"two\nlines"],
        [b"2", b"a", b"b"],
        None,
        [b"4", b"\xff"],
        [b"5", b"last"],
    ]
    for record in whole:  # each can be read from its place alone
        assert list(read_records(source, record.start, record.start + 1)) == [record]


def test_blank_lines_of_json_lines_are_no_records(tmp_path):
    rows = b'{"a": 1}\n\n \t\r\n{"a": 2}\n\n'
    found = list(read_records(source_of(tmp_path / "a.jsonl", rows), 0))
    assert [(record.start, record.content) for record in found] == [(0, b'{"a": 1}'), (14, b'{"a": 2}')]
    assert [record.content for record in read_records(source_of(tmp_path / "a.txt", b"a\n\nb"), 0)] == [b"a", b"", b"b"]


def test_a_stray_quote_takes_no_row_with_it(tmp_path):
    source = source_of(
        tmp_path / "a.csv", b'id,text\n1,"He said\n2,good\n3,also "fine"\n4,ok\n5,"two\nlines"\n6,"open\n7,last\n'
    )
    found = list(read_records(source, csv_header(source)[1]))
    assert [record.fields for record in found] == [
        None, [b"2", b"good"], [b"3", b'also "fine"'], [b"4", b"ok"], [b"5", b"two\nlines"], None, [b"7", b"last"]
    ]  # fmt: skip
    assert [record.stop for record in found[:-1]] == [record.start for record in found[1:]]
    assert found[-1].stop == source.size


def test_quotes_that_end_and_open_a_field_on_each_line_are_not_followed_to_the_end(tmp_path, monkeypatch):
    taken = 0
    given = module._Lines.__next__

    def count(lines):
        nonlocal taken
        taken += 1
        return given(lines)

    monkeypatch.setattr(module._Lines, "__next__", count)
    source = source_of(tmp_path / "a.csv", b"a,b\n" + 2000 * b'b","\n' + b"1,good\n")
    *broken, last = read_records(source, csv_header(source)[1])
    assert len(broken) == 2000 and last.fields == [b"1", b"good"]
    assert taken < 2000 * (module.MAX_QUOTE_LINES + 4)
    monkeypatch.setattr(module, "MAX_RECORD", 1000)
    long = b"\n".join(100 * [b"line"])
    source = source_of(
        tmp_path / "b.csv", b'a,b\n1,"' + long + b'"\n2,"' + long + b'","' + long + b'","' + long + b'"\n'
    )
    fitting, *broken = read_records(source, csv_header(source)[1])
    assert fitting.fields == [b"1", long] and broken[0].fields is None


def test_a_header_of_many_columns_is_read_in_a_time_that_goes_with_its_length(tmp_path):
    """Each compared with each took half a minute."""
    names, _ = csv_header(source_of(tmp_path / "a.csv", b",".join(b"a%d" % i for i in range(60_000)) + b"\n"))
    assert len(names) == len(set(names)) == 60_000


def test_a_quoted_header_may_follow_a_mark_of_its_encoding(tmp_path):
    source = source_of(tmp_path / "a.csv", b'\xef\xbb\xbf"a, b","text"\n1,x\n')
    names, start = csv_header(source)
    assert names == ["a, b", "text"]
    assert [record.fields for record in read_records(source, start)] == [[b"1", b"x"]]


def test_csv_header_is_needed(tmp_path):
    with pytest.raises(SourceError, match="no header"):
        csv_header(source_of(tmp_path / "a.csv", b""))
    with pytest.raises(SourceError, match="names the column 'b' twice"):
        csv_header(source_of(tmp_path / "a.csv", b"a,b,b\n"))
    spreadsheet = source_of(tmp_path / "a.csv", b"a,b,,\n1,2,,\n")  # as one writes columns without a name
    assert csv_header(spreadsheet)[0] == ["a", "b", "", ""]
