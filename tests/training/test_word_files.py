import pytest

from flashvec.training.data import DataError
from flashvec.training.word_files import MAX_FILE_BYTES, read_tagged

CONLL_2003 = """-DOCSTART- -X- -X- O

The DT B-NP O
Alps NNP I-NP B-LOC
rise VBP B-VP O

Rain NN B-NP O
"""
CONLLU = """# sent_id = 1
# text = It can't
1\tIt\tit\tPRON\tPRP\t_\t2\tnsubj\t_\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\tMD\t_\t0\troot\t_\t_
3\tn't\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_
3.1\tgo\tgo\tVERB\tVB\t_\t_\t_\t_\t_

# sent_id = 2
1\tRain\train\tNOUN\tNN\t_\t0\troot\t_\t_
"""


def read(tmp_path, text, task="pos", name="own.conll", **choices):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [(" ".join(words), " ".join(tags)) for words, tags in read_tagged(path, task, **choices)]


@pytest.mark.parametrize(
    ("task", "column", "first"),
    [
        ("pos", None, "DT NNP VBP"),
        ("chunk", None, "B-NP I-NP B-VP"),
        ("ner", None, "O B-LOC O"),
        ("pos", "3", "B-NP I-NP B-VP"),
    ],
)
def test_columns_of_conll_2003(task, column, first, tmp_path):
    sentences = read(tmp_path, CONLL_2003, task, column=column)
    assert sentences[0] == ("The Alps rise", first) and len(sentences) == 2


def test_other_column_files_have_their_tags_last(tmp_path):
    assert read(tmp_path, "New York\tB-loc\r\n#1\tO\r\n\t\r\nx\tO", "ner") == [("New York #1", "B-loc O"), ("x", "O")]
    assert read(tmp_path, "a 1 2 3 DT\n") == [("a", "DT")]
    assert read(tmp_path, "a DT B-NP\n", "chunk") == [("a", "B-NP")] and read(tmp_path, "a DT B-NP\n") == [("a", "DT")]


def test_conllu_without_multiword_tokens_and_empty_nodes(tmp_path):
    wanted = [("It ca n't", "PRON AUX PART"), ("Rain", "NOUN")]
    assert read(tmp_path, CONLLU, name="own.conllu") == wanted
    assert read(tmp_path, CONLLU, name="own.conllu", max_sentences=1) == wanted[:1]
    for column in ("xpos", "5"):
        assert read(tmp_path, CONLLU, name="own.conllu", column=column)[0][1] == "PRP MD RB"
    assert read(tmp_path, CONLLU, "chunk", name="own.conllu") == [("It ca n't", "B-NP B-VP I-VP"), ("Rain", "B-NP")]


@pytest.mark.parametrize(
    ("name", "text", "choices", "named"),
    [
        ("a.conll", "a DT\nb\n", {}, "a.conll line 2: expected a word and its tag"),
        ("a.conll", "a DT\nb DT O\n", {}, "a.conll line 2: 3 columns, the lines before have 2"),
        ("a.conll", "a\tDT\n\tDT\n", {}, "line 2: a tag without its word"),
        ("a.conll", "a\tDT\nb\t\n", {}, "line 2: a word without its tag"),
        ("a.conll", "a DT\n", {"column": "3"}, "line 1: no column '3' of tags; expected a number from 2 to 2"),
        ("a.conll", "a DT\n", {"column": "upos"}, "no column 'upos' of tags"),
        ("a.conll", "a O\nb DT\n", {"task": "ner"}, "line 2: the ner tag 'DT' is not O, B-kind or I-kind"),
        ("a.conll", "a B-\n", {"task": "chunk"}, "line 1: the chunk tag 'B-'"),
        ("a.conll", "", {}, "a.conll: holds no sentence"),
        ("a.conll", "\n-DOCSTART- O\n\n", {}, "a.conll: holds no sentence"),
        ("a.conll", "a DT\n\u00e9 DT\n".encode("latin-1"), {}, "a.conll: not UTF-8"),
        ("a.conll", "a DT\n", {"task": "srl"}, "task is 'srl'; known are pos, ner, chunk"),
        ("a.conllu", CONLLU, {"task": "ner"}, "line 3: CoNLL-U has no column of its own for ner"),
        ("a.conllu", CONLLU, {"column": "tag"}, "line 3: no column 'tag' of tags; expected id, form, .* or a number"),
        ("a.conllu", "1\tIt\tPRON\n", {}, "line 1: 3 columns; CoNLL-U has 10"),
        ("a.conllu", CONLLU.replace("1\tIt", "one\tIt"), {}, "line 3: starts with 'one'"),
        ("a.conllu", CONLLU.replace("PRON", "_"), {}, "line 3: a word without its tag"),
        ("a.conllu", CONLLU.replace("\t2\tnsubj", "\t9\tnsubj"), {"task": "chunk"}, "line 3: depends on word 9 of 3"),
        ("a.conllu", CONLLU.replace("\t2\tnsubj", "\tx\tnsubj"), {"task": "chunk"}, "line 3: depends on 'x', not on"),
        ("a.conllu", CONLLU.replace("nsubj", "_"), {"task": "chunk"}, "line 3: no deprel; chunks are cut from trees"),
        ("a.conllu", CONLLU.replace("PRON", "_"), {"task": "chunk"}, "line 3: no upos"),
        ("a.conllu", CONLLU.replace("\n\n", "\n"), {"task": "chunk"}, "line 9: word 1 where 4 is next; an empty line"),
        ("a.conllu", CONLLU.replace("\n\n", "\n"), {}, "line 9: word 1 within a sentence; an empty line ends a"),
    ],
    ids=str,
)
def test_bad_files_are_named(name, text, choices, named, tmp_path):
    with pytest.raises(DataError, match=named):
        read(tmp_path, text, name=name, **choices)


def test_missing_and_monstrous_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_tagged(tmp_path / "none.conll", "pos")
    with (tmp_path / "large.conll").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(DataError, match="more than tagged sentences"):
        read_tagged(tmp_path / "large.conll", "pos")
