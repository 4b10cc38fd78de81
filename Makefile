# `make sweep` and `make test` are all a new user needs; each sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/*/*.cpp tests/*/*.h)
SANITIZED := build/sanitized
LENS ?= 3.9.0 4.3.0

LENS_BIN = .venv-lens-$*/bin

.PHONY: build sweep test lens notebooks bench neutral lint format sanitize gpu clean

build: $(BIN)/pyfastcircuits
	@$(BIN)/python setup.py -q build_ext --inplace

$(BIN)/pyfastcircuits: pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) "setuptools>=77" "pybind11>=3.0" ninja "cmake>=3.24"
	$(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

sweep: build
	$(BIN)/pyfastcircuits sweep induction-2l

test: build
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/interpreted

# Against Hugging Face models (once) and TransformerLens before and after its version 4, and the latter's own tests of
# FactoredMatrix with ours in the place of theirs. Each version has an environment of its own, which shares torch and this
# library with the first.
lens: $(LENS:%=lens-%)

lens-%: .venv-lens-%/ready
	$(LENS_BIN)/python -m pytest tests/integrations $(if $(filter $*,$(firstword $(LENS))),tests/adapters,tests/adapters/test_lens*.py)
	cd .venv-lens-$*/theirs/transformer_lens-$* && PYTHONPATH=$(CURDIR)/tests/integrations \
	../../bin/python -m pytest -q -c /dev/null -p ours_in_place tests/unit/factored_matrix

.PRECIOUS: .venv-lens-%/ready
.venv-lens-%/ready: | build
	$(PYTHON) -m venv .venv-lens-$*
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	> "$$($(LENS_BIN)/python -c "import site; print(site.getsitepackages()[0])")/shared.pth"
	$(LENS_BIN)/pip install -q transformer-lens==$* hatchling poetry-core poetry-dynamic-versioning
	$(LENS_BIN)/pip download -q --no-deps --no-build-isolation --no-binary :all: -d .venv-lens-$*/theirs transformer-lens==$*
	tar -xzf .venv-lens-$*/theirs/transformer_lens-$*.tar.gz -C .venv-lens-$*/theirs
	@touch $@

# Write into the notebooks what their cells print; `make test` holds them to it.
notebooks: .venv-lens-$(firstword $(LENS))/ready
	for file in examples/*.ipynb; do .venv-lens-$(firstword $(LENS))/bin/python tests/run_notebook.py $$file || exit 1; done

bench: build
	$(BIN)/pip install -q "transformer-lens==$(firstword $(LENS))"
	$(BIN)/pytest bench/test_bench_sweep.py bench/test_bench_sweep_nll.py -W default
	$(BIN)/pytest bench/test_bench_composition.py -W default
	$(BIN)/pytest bench/test_bench_factored_topk.py bench/test_bench_diagonal_ranks.py -W default
	$(BIN)/pytest bench/test_bench_frozen_attention.py bench/test_bench_models.py -W default
	$(BIN)/pytest bench/test_bench_experiments.py -W default

# The CPU kernels of this tree against those of an older revision: instructions and paired times.
neutral: build
	$(BIN)/python -m bench.neutral --base $(BASE)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# AddressSanitizer and UBSan over the op tests, on a build of its own.
sanitize: build
	PYFASTCIRCUITS_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/pytest -s -m sanitize

gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu

clean:
	rm -rf build out $(VENV) .venv-lens-* *.egg-info pyfastcircuits/*.so
