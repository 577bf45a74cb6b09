"""The documentation's code runs, page by page, and its site builds without a warning."""

import glob
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import SENTENCES, tiny_checkpoint

from flashvec.runtime import cli
from flashvec.runtime.corpus import rows

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
KINDS = {"python", "sh", "yaml", "text"}  # text: needs another machine, a scheduler or an hour


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the pages speak of: a model, texts, tables, scored pairs."""
    tiny_checkpoint(tmp_path / "smollm2-encoder", "llama", hidden_size=256, tie_word_embeddings=True)  # as SmolLM2's
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "wiki.txt").write_text("\n".join(f"{text} {i}" for i in range(3) for text in SENTENCES))
    paragraph = (
        "The lantern of house {0} was lit all winter. Nobody in the town knew who paid house {0} for it. "
        "The keeper of house {0} never told them.\n"
    )
    (tmp_path / "articles.txt").write_text("".join(paragraph.format(i) for i in range(30)))
    for split, times in (("train", 5), ("dev", 1)):
        pairs = [(f"{a} {i}", f"{b} {-i}") for i in range(times) for a, b in pairwise(SENTENCES)]
        lines = [f"main\tnews\t2017\t{s}\t{s % 6}\t{a}\t{b}" for s, (a, b) in enumerate(pairs)]
        (tmp_path / f"sts-{split}.csv").write_text("\n".join(lines))
    (tmp_path / "data").mkdir()
    table = pa.table({"id": [f"row {i}" for i in range(len(SENTENCES))], "text": list(SENTENCES)})
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a page starts and leaves running."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.terminate()
        process.wait(30)


def run_line(line: str, servers: list[subprocess.Popen[bytes]], monkeypatch) -> None:
    """One line of a shell block: this package's command in this process, a module or a server in its own."""
    words = [name for word in shlex.split(line) for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    if words[:2] == ["flashvec", "serve"]:
        servers.append(subprocess.Popen([sys.executable, "-m", "flashvec.runtime.cli", *words[1:]]))
        wait_for(f"http://127.0.0.1:{words[words.index('--port') + 1]}/health")
    elif words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, cwd=ROOT)
    else:
        assert words[0] == "flashvec", line
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None), line


def wait_for(address: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, folder, servers, monkeypatch):
    names: dict[str, object] = {}
    for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert kind in KINDS, f"{page.name}: a block of kind {kind!r}"
        if kind == "python":
            exec(compile(code, page.name, "exec"), names)
        elif kind == "yaml":
            (folder / "distill.yaml").write_text(code)
        elif kind == "sh":
            for line in code.strip().splitlines():
                run_line(line.split("  #")[0], servers, monkeypatch)


def test_every_page_is_in_the_site_and_it_builds_without_a_warning(tmp_path):
    named = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert named == {page.name for page in PAGES}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert "Load a model from a folder" in (tmp_path / "site" / "reference" / "index.html").read_text()


def test_every_reason_for_a_row_without_a_vector_is_documented():
    text = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    reasons = [value for value in vars(rows).values() if isinstance(value, rows.Bad)]
    assert len(reasons) >= 9
    assert [reason.code for reason in reasons if f"| `{reason.code}` | {reason.message} |" not in text] == []
