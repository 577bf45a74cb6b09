"""README's code runs, its tree is the tree, and its figures are those of the committed rows."""

import re
from pathlib import Path

from tiny_models import tiny_checkpoint

from flashvec.bench import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_runs(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "smollm2-encoder", "llama", hidden_size=256)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    assert (tmp_path / "my-encoder" / "model.safetensors").is_file()


def test_tree_is_the_tree():
    tree = README.split("## The tree")[1].split("```")[1]
    folders = [line.split("/")[0] for line in tree.strip().splitlines()]
    assert all((ROOT / folder).is_dir() for folder in folders)
    own = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert own - set(folders) <= {"build", "dist", "site", "demo-cache", "peers", "flashvec.egg-info"}


def test_named_files_and_make_targets_exist():
    for name in re.findall(r"`((?:kernels|runtime|training|bench|tests|docs)/[\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_figures_are_those_of_the_rows():
    shown = set()
    for page in report.pages():
        text = page.read_text(encoding="utf-8")
        assert report.render(text) == text, f"{page.name}: run: python -m flashvec.bench.report"
        shown |= set(re.findall(r"<!-- rows: ([a-z ]+) -->", text))
    assert shown == set(report.TABLES)


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150
