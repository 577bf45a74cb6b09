"""The rules of the tree, checked."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["kernels", "runtime", "training", "bench"]
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_top_level_package_called_kernels():
    """With an __init__.py it would hide Hugging Face's `kernels` from transformers."""
    assert not [str(p) for folder in FOLDERS for p in (ROOT / folder).rglob("__init__.py")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_linked_into_the_package(folder):
    link = ROOT / "flashvec" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_imported_by_a_test(module):
    name = "flashvec." + ".".join(module.relative_to(ROOT).with_suffix("").parts)
    tests = (ROOT / "tests").rglob("*.py")
    mentions = (
        f"{name} import",
        f"import {name}",
        f"{name} ",
        f'"{name}"',
        f"from {name.rpartition('.')[0]} import {module.stem}",
    )
    assert any(any(m in test.read_text() for m in mentions) for test in tests), f"no test imports {name}"
