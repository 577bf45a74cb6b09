"""What becomes of good and bad rows, format by format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stand_in import embed_with_stand_in

from flashvec.runtime.corpus import readers, records, rows
from flashvec.runtime.corpus.readers import read_rows
from flashvec.runtime.corpus.rows import strings
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import SourceError, find_sources

SETTINGS = JobSettings(text_columns=("text",), id_column="id", columns=("n",))


def read(path, settings=SETTINGS, start=0, stop=1 << 40):
    (source,) = find_sources([path])
    found = list(read_rows(0, source, start, stop, settings))
    texts = [text for part in found for text in part.texts]
    at, bad = 0, {}
    for part in found:
        bad |= {at + i: reason.code for i, reason in part.bad.items()}
        at += len(part)
    return found, texts, bad


def test_json_lines(tmp_path):
    lines = [
        b'{"id": 7, "text": "good", "n": [1]}',
        b'{"id": "b", "text": null}',
        b'{"id": "c"}',
        b'{"id": "d", "text": 3}',
        b'{"id": "e", "text": "  "}',
        b'{"id": "f", "text": "\\ud800"}',
        b'{"id": "g", "text": "\xff"}',
        b"[1]",
        b'{"id": "h", ',
        b"\xe2\x80\x83",  # white space to Unicode, not to JSON
        b'{"text": "no id"}',
        b"[" * 100_000,
        b'{"id": "i", "text": NaN}',
        b'{"id": "j", "text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, texts, bad = read(tmp_path / "a.jsonl")
    assert bad == {
        1: "null",
        2: "null",
        3: "wrong_type",
        4: "empty",
        5: "surrogate",
        6: "invalid_utf8",
        7: "broken_json",
        8: "broken_json",
        9: "broken_json",
        10: "no_id",
        11: "broken_json",
        12: "null",
    }
    assert texts[0] == "good" and texts[13] == "last" and not any(texts[1:13])
    assert found[0].columns["id"].to_pylist()[0] == "7" and found[0].columns["n"].to_pylist()[0] == "[1]"


def test_csv_and_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text,n\n1,"a ""b""",x\n2,\xff,y\n3,c\n,d,\n')
    _, texts, bad = read(tmp_path / "a.csv", start=len("id,text,n\n"))
    assert texts[0] == 'a "b"' and bad == {1: "invalid_utf8", 2: "broken_csv"}
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n\xfe\n")
    _, texts, bad = read(tmp_path / "a.txt", JobSettings(text_columns=("text",)))
    assert texts == ["one", "", "two", ""] and bad == {1: "empty", 3: "invalid_utf8"}


def test_large_records(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 1000)
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}) + '\n{"text": "ok"}\n')
    settings = JobSettings(text_columns=("text",))
    assert read(tmp_path / "a.jsonl", settings)[1:] == (["", "ok"], {0: "too_large"})
    pq.write_table(pa.table({"text": ["x" * 5000, "ok"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", settings)[1:] == (["", "ok"], {0: "too_large"})
    (tmp_path / "a.csv").write_text(f"text\nfirst\n{'x' * 5000}\n\nok\n")
    assert read(tmp_path / "a.csv", settings, start=5)[1:] == (["first", "", "ok"], {1: "too_large"})
    (tmp_path / "b.csv").write_text(f"{'x' * 5000}\nok\n")
    with pytest.raises(SourceError, match="no header line"):  # and not the line after it
        read(tmp_path / "b.csv", settings)


def invalid_strings():
    """A text column whose second value is not UTF-8, as careless writers make them."""
    return pa.array([b"good", b"\xff\xfe", None], pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_tables(tmp_path, kind, ending):
    table = pa.table({"text": pa.array([f"t{i}" for i in range(100)]).cast(kind), "id": range(100), "n": [1.5] * 100})
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    found, texts, bad = read(path, start=5, stop=93)
    assert texts == [f"t{i}" for i in range(5, 93)] and not bad
    assert [int(place) for part in found for place in part.places] == list(range(5, 93))
    assert [i for part in found for i in part.columns["id"].to_pylist()] == list(range(5, 93))


def test_invalid_utf8_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": invalid_strings()}), tmp_path / "a.parquet")
    _, texts, bad = read(tmp_path / "a.parquet", JobSettings(text_columns=("text",)))
    assert texts == ["good", "", ""] and bad == {1: "invalid_utf8", 2: "null"}


def test_of_a_dictionary_only_what_is_used_is_read(monkeypatch):
    read_values = []
    monkeypatch.setattr(rows, "strings", lambda array: (read_values.append(array), strings(array))[1])
    dictionary = pa.array([b"good", b"\xff\xfe", *[b"of others"] * 1000], pa.binary()).view(pa.string())
    array = pa.DictionaryArray.from_arrays(pa.array([1, None, 0, 1], pa.int32()), dictionary)
    found = rows.strings(array)
    assert found == [b"\xff\xfe", None, "good", b"\xff\xfe"] and found[0] is found[3]
    assert [len(values) for values in read_values] == [4, 2]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_ids_and_columns_that_are_no_utf8_are_null(kind, tmp_path):
    strange = invalid_strings()
    if pa.types.is_dictionary(kind):
        strange = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), strange.slice(0, 2))
    table = pa.table({"text": ["a", "b", "c"], "id": strange, "note": strange})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    settings = JobSettings(text_columns=("text",), id_column="id", columns=("note",))
    found, _, bad = read(tmp_path / "a.arrow", settings)
    assert bad == {1: "no_id", 2: "no_id"}
    assert [found[0].columns[name].to_pylist() for name in ("id", "note")] == [["good", None, None]] * 2


def test_columns_of_other_kinds_go_through_whatever_they_hold(tmp_path):
    odd = pa.array([1, 86_400_001], pa.int64()).view(pa.date64())  # not a whole day
    with pytest.raises(pa.ArrowInvalid):
        odd.validate(full=True)
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": pa.string(), "day": pa.date64()})) as writer:
        writer.write_table(pa.table({"text": ["a", "b"], "day": odd}))
    found, _, bad = read(tmp_path / "a.arrow", JobSettings(text_columns=("text",), columns=("day",)))
    assert not bad and found[0].columns["day"].equals(odd)


VIEW, BYTES = pa.string_view(), pa.binary_view()


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([b"a", None], BYTES), pa.large_binary()),
        (pa.array(["a", "b"], VIEW), pa.large_string()),
        (pa.DictionaryArray.from_arrays([1, None], pa.array(["a", "b"], VIEW)), pa.large_string()),
        (pa.array([["a"], None], pa.list_(VIEW)), pa.list_(pa.large_string())),
        (pa.array([["a"], None], pa.large_list(VIEW)), pa.large_list(pa.large_string())),
        (pa.array([["a", "b"], None], pa.list_(VIEW, 2)), pa.list_(pa.large_string(), 2)),
        (pa.array([[("a", "b")], None], pa.map_(VIEW, VIEW)), pa.map_(pa.large_string(), pa.large_string())),
        (
            pa.array([{"a": [b"x"]}, None], pa.struct([("a", pa.list_(BYTES))])),
            pa.struct([("a", pa.list_(pa.large_binary()))]),
        ),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_views_as_polars_writes_them_go_through_wherever_they_are(column, kind, tmp_path):
    texts = pa.DictionaryArray.from_arrays([0, 1], pa.array(["one", "two"], VIEW))  # a categorical column
    table = pa.table({"text": texts, "x": column})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    embed_with_stand_in(tmp_path / "a.arrow", tmp_path / "out", text_columns=("text",), columns=("x",))
    written = pq.read_table(tmp_path / "out" / "part-00000.parquet")["x"]
    assert written.to_pylist() == column.to_pylist() and written.type == kind


def test_template_takes_what_is_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "T", "b": "B"}\n{"b": "B"}\n{"t": null}\n{"t": "", "b": " "}\n')
    settings = JobSettings(text_template="{t}: {b}")
    assert read(tmp_path / "a.jsonl", settings)[1:] == (["T: B", ": B", "", ""], {2: "null", 3: "empty"})


def test_truncated_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    with pytest.raises(SourceError, match="no readable Parquet"):
        read(tmp_path / "a.parquet")


def test_a_text_that_a_parquet_file_names_in_many_rows_is_held_once(tmp_path):
    """The file has it once, too: some hundred bytes that were gigabytes in memory."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 500, pa.int32()), pa.array(["word " * 10_000, "b"]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", store_schema=False)
    found = read(tmp_path / "a.parquet", JobSettings(text_columns=("text",)))[1]
    assert found == ["word " * 10_000, "b"] * 500 and len(set(map(id, found))) == 2


@pytest.mark.parametrize("column", ["text", "id", "tags"])
def test_an_arrow_file_whose_offsets_leave_its_data_is_damaged(tmp_path, column):
    """Followed, they show other memory as text, or end the process."""
    values = {"text": ["hello", "world", "xyz"], "id": ["a", "b", "c"], "tags": [["s"], ["t"], ["u"]]}
    table = pa.table(values)
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    offsets = table[column].chunk(0).buffers()[1].to_pybytes()[:16]
    wrong = offsets[:8] + (2000).to_bytes(4, "little") + (3000).to_bytes(4, "little")
    before, found, after = path.read_bytes().rpartition(offsets)
    assert found
    path.write_bytes(before + wrong + after)
    with pytest.raises(SourceError, match="damaged"):
        read(path, JobSettings(text_columns=("text",), id_column="id", columns=("tags",)))


@pytest.mark.parametrize("index", [3, -1])
def test_an_arrow_file_whose_indices_leave_their_dictionary_is_damaged(tmp_path, index):
    indices, own = pa.array([0, index], pa.int8()), pa.array(["a", "b", "c"])
    table = pa.table({"text": ["x", "y"], "id": pa.DictionaryArray.from_arrays(indices, own, safe=False)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match="damaged"):
        read(tmp_path / "a.arrow", JobSettings(text_columns=("text",), id_column="id"))


def test_an_arrow_stream_is_told_from_a_damaged_file(tmp_path):
    """What datasets leaves in its cache has the same ending."""
    table = pa.table({"id": ["1"], "text": ["words"], "n": ["x"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match=r"a\.arrow: an Arrow stream, .* write it as a file .* or as Parquet"):
        read(tmp_path / "a.arrow")
    (tmp_path / "b.arrow").write_bytes(b"anything else")
    with pytest.raises(SourceError, match=r"b\.arrow: no readable Arrow file"):
        read(tmp_path / "b.arrow")


def test_messages_never_quote_the_row(tmp_path):
    reasons = [value for value in vars(rows).values() if isinstance(value, rows.Bad)]
    assert len(reasons) >= 9 and len({reason.code for reason in reasons}) == len(reasons)
    lines = ['{"text": ["secret"]}', '{"text": {"secret": 1}}', "secret", '{"other": "secret"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found, _, bad = read(tmp_path / "a.jsonl", JobSettings(text_columns=("text",)))
    assert len(bad) == 4 and not any("secret" in reason.message for part in found for reason in part.bad.values())


def test_parquet_is_read_no_further_than_a_shard_goes(tmp_path, monkeypatch):
    table = pa.table({"id": [str(i) for i in range(100)], "text": [f"text {i}" for i in range(100)], "n": [[0]] * 100})
    pq.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(readers, "BATCH_ROWS", 10)
    given = []
    parquet = readers._parquet

    def counted(*arguments):
        for at, batch in parquet(*arguments):
            given.append(at)
            yield at, batch

    monkeypatch.setattr(readers, "_parquet", counted)
    _, texts, _ = read(tmp_path / "a.parquet", start=15, stop=30)
    assert texts == [f"text {i}" for i in range(15, 30)] and given == [0, 10, 20, 30]


def test_only_columns_that_are_read_count(tmp_path, monkeypatch):
    rows = {"id": ["a"], "text": ["short"], "n": [[1, 2]], "image": [b"x" * 100_000]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", compression="none")
    monkeypatch.setattr(readers, "MAX_ROW_GROUP", 10_000)
    _, texts, _ = read(tmp_path / "a.parquet")
    assert texts == ["short"]
    monkeypatch.setattr(readers, "MAX_ROW_GROUP", 10)
    with pytest.raises(SourceError, match=r"row group 0 has \d\d\d? bytes of what is read: write smaller ones"):
        read(tmp_path / "a.parquet")


def test_arrow_batches_are_read_by_the_shard_that_they_are_of(tmp_path, monkeypatch):
    schema = pa.schema([("image", pa.binary()), ("text", pa.string()), ("n", pa.int64()), ("id", pa.string())])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for first in range(0, 50, 10):
            rows = range(first, first + 10)
            columns = [[b"x"] * 10, [f"text {i}" for i in rows], list(rows), [str(i) for i in rows]]
            file.write_batch(pa.record_batch(columns, schema=schema))
    opened = []
    open_arrow = readers.open_arrow
    monkeypatch.setattr(readers, "open_arrow", lambda *args: opened.append(args[1:]) or open_arrow(*args))
    for start, stop in ((0, 50), (15, 31), (40, 50), (9, 11)):
        _, texts, bad = read(tmp_path / "a.arrow", start=start, stop=stop)
        assert texts == [f"text {i}" for i in range(start, stop)] and not bad
    assert opened == [(), (["image"],), *[(["text", "id", "n"],)] * 4]  # where batches begin is found once


def test_a_number_that_is_none_is_nothing_and_no_damage(tmp_path):
    """Python writes NaN and the infinities, which are no JSON."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1, "n": NaN}\n{"text": "b", "id": 2, "n": [-Infinity]}\n')
    found, texts, bad = read(tmp_path / "a.jsonl")
    assert texts == ["a", "b"] and not bad and found[0].columns["n"].to_pylist() == [None, "[-Infinity]"]
