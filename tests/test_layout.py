"""The rules of the tree, checked."""

import ast
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


def imported_by_tests() -> set[str]:
    """Dotted names that the tests import, `from a import b` counting as a and as a.b."""
    names = set()
    for test in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(test.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTED = imported_by_tests()  # once, for all modules


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_imported_by_a_test(module):
    name = "flashvec." + ".".join(module.relative_to(ROOT).with_suffix("").parts)
    assert name in IMPORTED, f"no test imports {name}"
