"""Without its library an integration says what to install, and that extra exists."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
LIBRARIES = {
    "runtime.integrations.sentence_transformers": "sentence_transformers",
    "runtime.integrations.langchain": "langchain_core",
    "runtime.integrations.llama_index": "llama_index",
    "runtime.integrations.lancedb": "lancedb",
    "runtime.integrations.sklearn": "sklearn",
    "runtime.integrations.faiss": "faiss",
    "runtime.integrations.duckdb": "duckdb",
    "training.mteb_encoder": "mteb",
}


@pytest.mark.parametrize(("module", "library"), LIBRARIES.items())
def test_what_to_install(module, library, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"flashvec.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {library}.*: pip install 'flashvec\[[\w-]+\]'") as caught:
        importlib.import_module(f"flashvec.{module}")
    (extra,) = re.findall(r"\[([\w-]+)\]", str(caught.value))
    packages = {"sklearn": "scikit_learn"}
    assert any(re.sub(r"\W", "_", name).startswith(packages.get(library, library)) for name in EXTRAS[extra])
