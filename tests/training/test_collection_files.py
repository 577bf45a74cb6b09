import json

import pytest
from collection_samples import SMART, write_beir, write_smart

from flashvec.training.collection_files import read_collection
from flashvec.training.data import DataError


def test_reads_both_forms(tmp_path):
    smart = read_collection(write_smart(tmp_path))
    assert smart.documents == {"1": "The river flows to the sea.", "2": "Stones lie still."}
    assert smart.queries == {"1": "What flows?", "2": "What lies?"} and smart.relevance["2"] == {"2": 1.0}
    beir = read_collection(write_beir(tmp_path / "beir"))
    assert beir.documents == {"d1": "River to the sea", "d2": "stones"} and beir.relevance == {"q1": {"d1": 2, "d2": 0}}


def test_lines_end_at_line_feeds_alone(tmp_path):
    """JSON strings and tables may hold what ends a line elsewhere."""
    folder = write_beir(tmp_path / "beir")
    odd = "a\u2028b\u0085c"
    for name, key in (("corpus", "d3"), ("queries", "q2")):
        with (folder / f"{name}.jsonl").open("a", encoding="utf-8", newline="") as file:
            file.write(json.dumps({"_id": key, "text": odd}, ensure_ascii=False) + "\r\n")
    with (folder / "qrels" / "test.tsv").open("a", newline="") as file:
        file.write("q2\td3\t1\r\n")
    read = read_collection(folder)
    assert read.documents["d3"] == read.queries["q2"] == odd and read.relevance["q2"] == {"d3": 1.0}


def test_a_mark_of_utf_8_is_no_part_of_the_first_line(tmp_path):
    folder = write_beir(tmp_path / "beir")
    plain = read_collection(folder)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert read_collection(folder) == plain


def test_lines_that_are_not_utf_8_are_told(tmp_path, caplog):
    folder = write_beir(tmp_path / "beir")
    with (folder / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "d3", "text": "caf\xe9"}\n')
    with caplog.at_level("WARNING", logger="flashvec"):
        assert read_collection(folder).documents["d3"] == "caf\ufffd"
    assert [record.message for record in caplog.records] == ["corpus.jsonl: 1 lines are not UTF-8, line 3 first"]


def test_judgements_that_contradict_others_are_told(tmp_path, caplog):
    folder = write_beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text("q1\td1\t1\nq1\td2\t0\nq1\td1\t1\nq1\td1\t2\n")
    with caplog.at_level("WARNING", logger="flashvec"):
        assert read_collection(folder).relevance == {"q1": {"d1": 2, "d2": 0}}
    (told,) = [record.message for record in caplog.records]
    assert told == "test.tsv: 1 lines judge a document anew and otherwise: the last one counts"


def test_a_document_may_be_a_title_alone(tmp_path):
    folder = write_beir(tmp_path / "beir")
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "River", "text": null}\n')
    assert read_collection(folder).documents == {"d1": "River"}


def test_a_query_may_be_named_query(tmp_path):
    folder = write_beir(tmp_path / "beir")
    for name, text in (("queries.jsonl", '{"_id": "query1", "text": "x"}\n'), ("qrels/test.tsv", "query1\td1\t1\n")):
        (folder / name).write_text(text)
    assert read_collection(folder).relevance == {"query1": {"d1": 1}}
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nquery1\td2\t1\n")
    assert read_collection(folder).relevance == {"query1": {"d2": 1}}


def test_judgements_that_are_not_of_test_are_told(tmp_path, caplog):
    folder = write_beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").rename(folder / "qrels/dev.tsv")
    with caplog.at_level("WARNING", logger="flashvec"):
        assert read_collection(folder).relevance == {"q1": {"d1": 2, "d2": 0}}
    assert [record.message for record in caplog.records] == ["beir has no qrels/test.tsv: judged by dev.tsv"]


def test_relevant_documents_that_are_not_there_are_told(tmp_path, caplog):
    folder = write_beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text("q1\td1\t1\nq1\td7\t1\nq1\td8\t0\n")
    with caplog.at_level("WARNING", logger="flashvec"):
        read_collection(folder)
    (told,) = [record.message for record in caplog.records]
    assert told == "beir: 1 of 2 relevant documents are not there, 'd7' among them: no ranking can find them"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("queries.jsonl", "{", "queries.jsonl line 1: expected a JSON object"),
        ("corpus.jsonl", '{"text": "x"}\n', "corpus.jsonl line 1: _id is missing"),
        ("corpus.jsonl", '{"_id": "d1", "txt": "x"}\n', "corpus.jsonl line 1: text is missing"),
        ("corpus.jsonl", '{"_id": "d1", "text": ["x"]}\n', "corpus.jsonl line 1: text is missing or no text"),
        ("qrels/test.tsv", "q1\td1\tmuch\n", "test.tsv line 1: expected query, document and score"),
        ("qrels/test.tsv", "q1\td1\tnan\n", "test.tsv line 1: expected query, document and score"),
        ("qrels/test.tsv", "q1\td1\t1e999\n", "test.tsv line 1: expected query, document and score"),
        ("qrels/test.tsv", "q9\td1\t1\n", "1 queries that are not there, q9"),
        ("qrels/test.tsv", "q1\td1\t0\n", "no query has a relevant document"),
        ("qrels/test.tsv", "q1\td9\t1\n", "1 of 1 relevant documents are not there, 'd9' among them: are the judge"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', "line 2: 'd1' names two texts"),
    ],
)
def test_bad_files_are_named(name, text, named, tmp_path):
    folder = write_beir(tmp_path / "beir")
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=named):
        read_collection(folder)
    with pytest.raises(DataError, match=r"give a BEIR folder"):
        read_collection(folder / "corpus.jsonl")
    with pytest.raises(DataError, match=r"x.ALL: no such file or folder"):
        read_collection(tmp_path / "nothing" / "x.ALL")


@pytest.mark.parametrize(
    ("names", "judgements"),
    [
        (("MED.ALL", "MED.QRY", "MED.REL"), "1 0 1 1\n1 0 2 0\n2 0 2 1\n"),  # TREC's columns
        (("cacm.all", "query.text", "qrels.text"), "01 1  0 0\n02 0002  0 0\n"),  # zeros before names, none after
        (("cran.all.1400", "cran.qry", "cranqrel"), "1 1 4\n1 2 -1\n2 2 1 \n"),  # a code of how relevant; -1: it is not
    ],
)
def test_smart_collections_as_they_are_handed_round(names, judgements, tmp_path, caplog):
    """Medline's, CACM's and Cranfield's own names and columns; the last numbers queries by their place."""
    texts = dict(zip(names, (SMART["x.ALL"], SMART["x.QRY"], judgements), strict=True))
    if names[0].startswith("cran"):
        texts["cran.qry"] = texts["cran.qry"].replace(".I 1", ".I 001").replace(".I 2", ".I 004")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / f"{names[2]}.readme").write_text("What the codes mean.")
    for path in (tmp_path, tmp_path / names[0]):
        read = read_collection(path)
        assert read.documents == {"1": "The river flows to the sea.", "2": "Stones lie still."}
        assert read.queries == {"1": "What flows?", "2": "What lies?"}
        grades = {(query, name): grade for query, found in read.relevance.items() for name, grade in found.items()}
        assert grades == {("1", "1"): 1, ("2", "2"): 1} | ({("1", "2"): 0} if len(grades) == 3 else {})
    told = {record.message for record in caplog.records}
    by_place = {
        f"{name}: its judgements go by a query's place, 1 to 2, and not by .I" for name in (tmp_path.name, names[0])
    }
    assert told == (by_place if names[0].startswith("cran") else set())


def test_two_smart_collections_in_one_folder(tmp_path):
    write_smart(tmp_path)
    for name, text in SMART.items():
        (tmp_path / name.replace("x", "Y")).write_text(text.replace("river", "brook"))
    assert read_collection(tmp_path / "Y.ALL").documents["1"] == "The brook flows to the sea."
    with pytest.raises(DataError, match=r"judgements .* beside it, one of each"):
        read_collection(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("x.ALL", "no record", r"x.ALL: holds no record \(.I ...\)"),
        ("x.ALL", SMART["x.ALL"].replace(".I 2", ".I 01"), "x.ALL: '1' names two texts"),
        ("x.REL", "1 1 0 0.0\n2\n", "x.REL line 2: expected a query and a document"),
        ("x.REL", "1 1 high\n", "x.REL line 1: 'high' is no grade"),
        ("x.REL", "3 1 0 0.0\n", "x.ALL: judgements name 1 queries that are not there, 3 among them"),
    ],
)
def test_bad_smart_files_are_named(name, text, named, tmp_path):
    path = write_smart(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=named):
        read_collection(path)
    (tmp_path / "x.REL").unlink()
    with pytest.raises(DataError, match=r"x.ALL: give a BEIR folder, .*, with its queries .* and judgements"):
        read_collection(path)
