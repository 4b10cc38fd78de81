# `make sweep` and `make test` are all a new user needs; each sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
SANITIZED := build/sanitized

.PHONY: build sweep test bench lint format sanitize gpu clean

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

bench: build
	$(BIN)/pip install -q "transformer-lens==3.9.0"
	$(BIN)/pytest bench/test_bench_sweep.py bench/test_bench_sweep_nll.py -W default
	$(BIN)/pytest bench/test_bench_composition.py -W default
	$(BIN)/pytest bench/test_bench_frozen_attention.py -W default

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
	rm -rf build out $(VENV) *.egg-info pyfastcircuits/*.so
