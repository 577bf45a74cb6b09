import gzip
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvec.runtime.corpus.cuts import cut
from flashvec.runtime.corpus.inspect import check_unique_ids, inspect_sources, resolve_columns
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import SourceError, find_sources


def resolve(paths, **settings):
    sources = find_sources(paths)
    return resolve_columns(JobSettings(**settings), sources, inspect_sources(sources))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": [1], "body": ["x"], "when": [1.5]}), path)
    return path


def test_the_only_text_column_is_the_text(table):
    settings, columns = resolve([table], id_column="key", columns=("when",))
    assert settings.text_columns == ("body",)
    assert columns == pa.schema([("id", pa.int64()), ("when", pa.float64())])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"text_columns": ("txt",)}, "'txt' is missing; columns are key, body, when"),
        ({"text_columns": ("key",)}, "'key' is int64, not text"),
        ({"text_template": "{body} {nothing}"}, "'nothing' is missing"),
        ({"id_column": "when"}, "ids are text or integers"),
        ({"columns": ("where",)}, "'where' is missing"),
    ],
)
def test_bad_columns_stop_before_work(table, settings, named):
    with pytest.raises(SourceError, match=named):
        resolve([table], **settings)


def test_a_column_of_a_table_that_is_there_twice_is_told(tmp_path):
    """As a join of two tables leaves them."""
    arrays = [pa.array(["x"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.table(arrays, names=["text", "n", "n"]), tmp_path / "a.parquet")
    assert resolve([tmp_path / "a.parquet"])[0].text_columns == ("text",)
    with pytest.raises(SourceError, match="the column 'n' is there 2 times: rename one"):
        resolve([tmp_path / "a.parquet"], columns=("n",))


def test_a_type_that_no_part_can_hold_stops_before_work(tmp_path):
    spans = pa.array([pa.MonthDayNano([1, 2, 3])])
    table = pa.table({"text": ["x"], "span": spans})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match=r"a\.arrow: column 'span' is month_day_nano_interval, which no part"):
        resolve([tmp_path / "a.arrow"], columns=("span",))


def test_files_must_agree(table, tmp_path):
    pq.write_table(pa.table({"key": ["1"], "body": ["x"], "when": [1.5]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match="in an earlier file it is int64"):
        resolve([table, tmp_path / "b.parquet"], id_column="key")


def test_json_lines_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "title": "x"}\n{"body": null}\n')
    assert resolve([tmp_path / "a.jsonl"], text_columns=("title",))[0].text_columns == ("title",)
    with pytest.raises(SourceError, match="'n' is double, not text"):
        resolve([tmp_path / "a.jsonl"], text_columns=("n",))
    with pytest.raises(SourceError, match="Name it with text_columns; there is title, body"):
        resolve([tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    "content", ['[{"text": "a"},\n{"text": "b"}]\n', '{\n "text": "a"\n}\n'], ids=["list", "indented"]
)
@pytest.mark.parametrize("named", [(), ("text",)], ids=["guessed", "named"])
def test_json_that_is_no_lines_is_told(content, named, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SourceError, match="none of its first lines is a JSON object with keys: write one on each line"):
        resolve([tmp_path / "a.jsonl"], text_columns=named)


def test_a_key_that_comes_late_is_found_where_it_is_asked_for(tmp_path):
    """Optional fields: no line of the first hundred has one."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 500 + '{"text": "b", "lang": "de"}\n')
    _, columns = resolve([tmp_path / "a.jsonl"], columns=("lang",))
    assert columns == pa.schema([("lang", pa.large_string())])
    with pytest.raises(SourceError, match="'place' is missing in its first 100,000 lines; columns are text, lang"):
        resolve([tmp_path / "a.jsonl"], columns=("place",))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_empty_files_are_no_complaint_also_compressed(ending, tmp_path):
    texts = {"jsonl": '{"text": "a"}\n', "csv": "text\na\n", "txt": "a\n"}
    (tmp_path / f"a.{ending}").write_text(texts[ending])
    (tmp_path / f"b.{ending}.gz").write_bytes(gzip.compress(b""))
    sources = find_sources([tmp_path])
    assert len(sources) == 2
    resolve_columns(JobSettings(), sources, inspect_sources(sources))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_with_the_cure(encoding, tmp_path):
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / "a.txt").write_bytes((mark + "words\nand more\n").encode(encoding))
    with pytest.raises(SourceError, match=r"a\.txt: is UTF-16; convert it, as with iconv"):
        inspect_sources(find_sources([tmp_path / "a.txt"]))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("le.csv", "text\nwords\n".encode("utf-16-le"), "seems to be UTF-16; convert it, as with iconv -f utf-16le"),
        ("be.txt", "words\n".encode("utf-16-be"), "seems to be UTF-16; convert it, as with iconv -f utf-16be"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}\n', mtime=0), "its name does not say so: add .gz to it"),
        ("a.txt", pa.Codec("zstd").compress(b"x\n").to_pybytes(), "its name does not say so: add .zst to it"),
    ],
)
def test_other_contents_than_the_name_says_are_refused(name, content, named, tmp_path):
    """UTF-16 without a mark was embedded, a NUL after every letter."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=named):
        inspect_sources(find_sources([tmp_path / name]))


@pytest.mark.parametrize(("name", "header"), [("a.csv", "id;text"), ("b.csv", "id\ttext"), ("c.tsv", "id,text")])
def test_fields_separated_otherwise_are_no_text(name, header, tmp_path):
    """Whole lines were embedded, numbers and separators with them, and nothing was said."""
    path = tmp_path / name
    path.write_text(f"{header}\n" + header.replace("id", "1").replace("text", "words") + "\n")
    with pytest.raises(SourceError, match=r"the only column is .*\. Are its fields separated by"):
        resolve([path])
    assert resolve([path], text_columns=(header,))[0].text_columns == (header,)


def test_unique_ids(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 2, 3, 1], "text": ["x"] * 5}), tmp_path / "a.parquet")
    sources = find_sources([tmp_path / "a.parquet"])
    settings = JobSettings(text_columns=("text",), id_column="id")
    check_unique_ids(settings, sources, [(0, 0, 2), (0, 3, 4)])
    with pytest.raises(ValueError, match="2 of 5 ids are repetitions"):
        check_unique_ids(settings, sources, [(0, 0, 5)])


def test_planning_many_files_is_quick(tmp_path):
    """At this rate 10,000 take under 10 s; measured on fewer to keep the test short."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "0.parquet")
    content = (tmp_path / "0.parquet").read_bytes()
    for i in range(1, 500):
        (tmp_path / f"{i}.parquet").write_bytes(content)
    start = time.perf_counter()
    sources = find_sources([tmp_path])
    inspected = inspect_sources(sources)
    settings, _ = resolve_columns(JobSettings(), sources, inspected)
    shards = cut(sources, inspected, 300)
    assert time.perf_counter() - start < 5  # ten times the rate that is needed would be 0.5; other work goes on here
    assert len(shards) == 4 and shards[0].num_rows == 300 and settings.text_columns == ("text",)


def test_a_damaged_batch_of_an_arrow_file_is_named(tmp_path):
    path, table = tmp_path / "a.arrow", pa.table({"text": ["cat"] * 50})
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=packed) as writer:
        writer.write_table(table)
    magic = b"\x28\xb5\x2f\xfd"
    path.write_bytes(path.read_bytes().replace(magic, b"\0\0\0\0"))
    with pytest.raises(SourceError, match=r"a\.arrow: damaged \("):
        inspect_sources(find_sources([path]))
