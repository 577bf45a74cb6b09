import os

import pytest

from flashvec.runtime.corpus.sources import SourceError, describe_change, find_sources, open_source


def names(sources):
    return [os.path.basename(source.uri) for source in sources]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "sub/c.txt", ".hidden.txt", "readme.md", "_skip/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x\n")
    return tmp_path


def test_files_folders_and_globs(folder):
    assert names(find_sources([folder])) == ["a.csv.gz", "b.jsonl", "c.txt"]
    assert names(find_sources([folder / "b.jsonl", folder / "a.csv.gz"])) == ["b.jsonl", "a.csv.gz"]
    assert names(find_sources([f"{folder}/**/*.txt"])) == ["d.txt", "c.txt"]
    (source,) = find_sources([f"file://{folder}/b.jsonl"])
    assert (source.format, source.compression, source.size) == ("jsonl", None, 2)
    assert names(find_sources([f"file://{folder}/*.gz"])) == ["a.csv.gz"]


def test_globs_behind_uris_are_those_of_paths(folder):
    (folder / "sub/deep").mkdir()
    (folder / "sub/deep/e.txt").write_text("x\n")
    for pattern in ("sub/*.txt", "**/*.txt", "sub/**/*.txt", "s[tu]b/*", "**", "*/deep/*.txt"):
        local = {s.uri for s in find_sources([f"{folder}/{pattern}"]) if "/_skip/" not in s.uri}
        behind = {s.uri for s in find_sources([f"file://{folder}/{pattern}"])}
        assert behind == {f"file://{uri}" for uri in local}, pattern
    with pytest.raises(SourceError, match=r"-: a pipe cannot be read again .* write it into a file first"):
        find_sources(["-"])
    with pytest.raises(SourceError, match="no input file there"):
        find_sources([f"file://{folder}/*.txt"])  # those further down are not meant


def test_names_that_uris_write_otherwise(tmp_path):
    for name in ("Who am I?.txt", "a#1.txt", "a%20b.txt", "a b.txt", "\u00fc.txt", "year=2024,x.txt"):
        (tmp_path / name).write_text(name)
    found = find_sources([f"file://{tmp_path}"])
    contents = {open_source(source).read().decode() for source in found}
    assert contents == {path.name for path in tmp_path.iterdir()}
    assert f"file://{tmp_path}/year=2024,x.txt" in {source.uri for source in found}


def test_uris_with_escapes_name_what_they_stand_for(tmp_path):
    """A URI can hold no space, so that a folder with one could not be named at all."""
    (tmp_path / "a b").mkdir()
    for name in ("x[1].txt", "x1.txt", "50%.txt"):
        (tmp_path / "a b" / name).write_text(name)
    folder = f"file://{tmp_path}/a%20b"

    def contents(given):
        return [open_source(source).read().decode() for source in find_sources([given])]

    assert contents(folder) == contents(f"file://{tmp_path}/a%20*/*") == ["50%.txt", "x1.txt", "x[1].txt"]
    assert contents(f"{folder}/50%25.txt") == contents(f"{folder}/5*%25.txt") == ["50%.txt"]
    assert contents(f"{folder}/x%5B1%5D.*") == ["x[1].txt"]
    assert contents(f"{folder}/x[1].*") == ["x1.txt"]


def test_uris_as_people_write_them_are_escaped(tmp_path):
    (tmp_path / "a \u00fc").mkdir()
    for name in ("b c.txt", "n#1.txt"):
        (tmp_path / "a \u00fc" / name).write_text(name)
    folder = f"file://{tmp_path}/a \u00fc"
    named = [source.uri for source in find_sources([folder])]
    assert named == [f"file://{tmp_path}/a%20%C3%BC/b%20c.txt", f"file://{tmp_path}/a%20%C3%BC/n%231.txt"]
    assert [source.uri for source in find_sources([f"{folder}/b c.txt", f"{folder}/n#*"])] == named
    with pytest.raises(SourceError, match="named twice"):
        find_sources([f"{folder}/b c.txt", f"{folder}/b%20c.txt"])
    with pytest.raises(ValueError, match=r"50%ce.txt: its escapes are not UTF-8. A % in a name is written %25"):
        find_sources([f"{folder}/50%ce.txt"])


def test_names_that_are_no_text_are_said(tmp_path):
    """The error was an encoding's, and named no file."""
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("x")
    for given in (path, tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(SourceError, match="caf\ufffd\\.txt: its name is not UTF-8"):
            find_sources([given])
    with pytest.raises(SourceError, match="the name of a file below it is not UTF-8"):
        find_sources([f"file://{tmp_path}"])


def test_links_to_folders_are_not_followed_and_said_to_be_there(tmp_path):
    said: list[str] = []
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("x\n")
    (tmp_path / "in/b.txt").write_text("x\n")
    (tmp_path / "in/year").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/round").symlink_to(tmp_path / "in")
    assert names(find_sources([tmp_path / "in"], said.append)) == ["b.txt"]
    assert said == [f"{tmp_path}/in: passed over 2 folders that are links; name one to take what it holds"]
    assert names(find_sources([tmp_path / "in", tmp_path / "in/year"])) == ["b.txt", "a.txt"]


def test_pipes_in_a_folder_are_not_waited_for(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "link.txt").symlink_to(folder / "pipe.txt")
    assert names(find_sources([folder])) == ["a.csv.gz", "b.jsonl", "c.txt"]
    (folder / "gone.txt").symlink_to(folder / "nothing")
    with pytest.raises(FileNotFoundError):  # an input that was meant is not left out
        find_sources([folder])


def test_what_was_passed_over_is_said(folder):
    said = []
    for name in ("b.md", "notes.MD", "strange.~~~", "Makefile", "c.parquet.gz"):
        (folder / name).touch()
    find_sources([folder, f"{folder}/_skip/*.txt"], said.append)
    known = "known endings are .parquet, .pq"
    assert len(said) == 1 and said[0].startswith(
        f"{folder}: passed over 3 .md, 2 without a usual ending, 1 .parquet.gz; {known}"
    )
    for ending in "pqrst":
        (folder / f"kind.x{ending}").touch()
    find_sources([folder], said.append)
    assert " and others; known endings" in said.pop()
    find_sources([f"file://{folder}/*b*"], said.append)
    assert said[1].startswith(f"file://{folder}/*b*: passed over 1 .md; {known}")
    with pytest.raises(SourceError, match=r"no input file there, only 2 \.md; known endings are"):
        find_sources([f"{folder}/[bn]*.[mM][dD]"])


def test_a_question_mark_is_part_of_a_local_name(tmp_path):
    (tmp_path / "faq?").mkdir()
    for name in ("Who am I?.txt", "faq?/a.jsonl"):
        (tmp_path / name).write_text("x")
    assert [source.format for source in find_sources([tmp_path])] == ["text", "jsonl"]
    assert find_sources([tmp_path / "Who am I?.txt"])[0].format == "text"


def test_refused(folder):
    with pytest.raises(SourceError, match="names no file"):
        find_sources([])
    with pytest.raises(SourceError, match="no input file there"):
        find_sources([folder / "missing"])
    with pytest.raises(SourceError, match=r"unknown ending '.md'"):
        find_sources([folder / "readme.md"])
    with pytest.raises(SourceError, match="named twice"):
        find_sources([folder, folder / "b.jsonl"])
    (folder.parent / "link.jsonl").symlink_to(folder / "b.jsonl")
    for other in (folder / ".." / folder.name / "b.jsonl", folder.parent / "link.jsonl"):
        with pytest.raises(SourceError, match="named twice"):
            find_sources([folder / "b.jsonl", other])
    (folder / "p.parquet.gz").touch()
    with pytest.raises(SourceError, match="compressed inside"):
        find_sources([folder / "p.parquet.gz"])


def test_changes_are_seen(folder):
    (source,) = find_sources([folder / "b.jsonl"])
    assert describe_change(source) is None
    os.utime(folder / "b.jsonl", ns=(1, 1))
    assert "written to" in describe_change(source)
    (folder / "b.jsonl").write_text("longer\n")
    assert "had 2 bytes" in describe_change(source)
    (folder / "b.jsonl").unlink()
    assert "gone" in describe_change(source)
