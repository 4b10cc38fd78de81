# `make sweep` and `make test` are all a new user needs; each sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/*/*.cpp tests/*/*.h)
SANITIZED := build/sanitized
LENS ?= 3.9.0 4.3.0
JOBS ?= 2
TOGETHER ?= $(JOBS)
CALLS ?= 20000
SEED ?= 0

LENS_BIN = .venv-lens-$*/bin
# Files with tests of a mark: to collect all tests takes several seconds, and more under the sanitizers.
marked = $(shell grep -rl 'mark\.$(1)\b' tests --include='test_*.py')
FIRST = $(firstword $(LENS))

.PHONY: build developed report site wheels sweep test test-together test-interpreted test-alone fuzz mutations lens notebooks models bench neutral instructions mca predict predict-check lint format sanitize sanitized arm arm-build arm-check gpu clean

build: $(BIN)/pyfastcircuits
	@$(BIN)/python setup.py -q build_ext --inplace

# What compiling takes.
$(BIN)/buildable: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) "setuptools>=77" "pybind11>=3.0" ninja "cmake>=3.24"
	@touch $@

$(BIN)/pyfastcircuits: $(BIN)/buildable pyproject.toml setup.py
	$(BIN)/pip install -q --no-build-isolation -e '.[cli]'
	@touch $@

# What tests, benches and linters need besides.
developed: build $(BIN)/developed

$(BIN)/developed: $(BIN)/pyfastcircuits
	$(BIN)/pip install -q 'pyfastcircuits[dev]'
	@touch $@

sweep: build
	$(BIN)/pyfastcircuits sweep induction-2l --resume

# One page of the bundled model's circuits, for a browser.
report: build
	$(BIN)/pip install -q 'pyfastcircuits[report]'
	$(BIN)/pyfastcircuits report induction-2l --out out/report.html

# The tests by $(TOGETHER) processes of a thread each, most being too small for two (those of threads set their number);
# kernels in Triton's interpreter; and, one by one on a machine that does nothing else, those of time and memory.
test: test-together test-interpreted test-alone

test-together: developed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TOGETHER) -m "not alone"

test-interpreted: developed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n $(JOBS) tests/interpreted

test-alone: developed
	$(BIN)/pytest -m alone $(call marked,alone)

# Against Hugging Face models (once) and TransformerLens before and after its version 4, and the latter's own tests of
# FactoredMatrix with ours in the place of theirs. Each version has an environment of its own, which shares torch and this
# library with ours; all but the first install only what they need another version of.
lens: $(LENS:%=lens-%)

lens-%: .venv-lens-%/ready developed
	$(LENS_BIN)/python -m pytest tests/integrations $(if $(filter $*,$(FIRST)),tests/adapters,tests/adapters/test_lens*.py)
	cd .venv-lens-$*/theirs/transformer_lens-$* && PYTHONPATH=$(CURDIR)/tests \
	../../bin/python -m pytest -q -c /dev/null -p support.ours_in_place tests/unit/factored_matrix

.PRECIOUS: .venv-lens-%/ready
$(patsubst %,.venv-lens-%/ready,$(filter-out $(FIRST),$(LENS))): .venv-lens-$(FIRST)/ready

.venv-lens-%/ready: | $(BIN)/developed
	$(PYTHON) -m venv .venv-lens-$*
	$(if $(filter $*,$(FIRST)),$(BIN),.venv-lens-$(FIRST)/bin)/python \
	-c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	> "$$($(LENS_BIN)/python -c "import site; print(site.getsitepackages()[0])")/shared.pth"
	$(LENS_BIN)/pip install -q transformer-lens==$* hatchling poetry-core poetry-dynamic-versioning
	$(LENS_BIN)/pip download -q --no-deps --no-build-isolation --no-binary :all: -d .venv-lens-$*/theirs transformer-lens==$*
	tar -xzf .venv-lens-$*/theirs/transformer_lens-$*.tar.gz -C .venv-lens-$*/theirs
	@touch $@

# Write into the notebooks what their cells print; `make test` holds them to it.
notebooks: .venv-lens-$(FIRST)/ready developed
	for file in examples/*.ipynb; do .venv-lens-$(FIRST)/bin/python tests/support/run_notebook.py $$file || exit 1; done

# Write into docs/models.md which families the tests run; `make lens` holds the page to it.
models: .venv-lens-$(FIRST)/ready developed
	PYTHONPATH=tests .venv-lens-$(FIRST)/bin/python -m support.models_page

# Every bench in a process of its own, so that one that fails stops no other and peaks of memory are its own. Then
# docs/performance.md and the headline ratios of README.md are written of what they found; see bench/write.py.
bench: developed
	$(BIN)/pip install -q "transformer-lens==$(FIRST)"
	rm -rf build/bench
	@failed=0; for file in bench/test_bench_*.py; do $(BIN)/pytest $$file -W default || failed=1; done; \
	$(BIN)/python -m bench.mca || failed=1; $(BIN)/python -m bench.write || failed=1; exit $$failed

# An estimate by llvm-mca of the multiply loop of every tier, those of 64-bit Arm too.
mca: developed arm-build
	$(BIN)/python -m bench.mca

# The CPU kernels of this tree against those of an older revision: instructions and paired times.
neutral: developed
	$(BIN)/python -m bench.neutral --base $(BASE)

# The time of every GPU kernel on A100, H100, H200 and B200, counted in its machine code: print it and keep it in
# bench/predictions.json, or compare it with what is kept there, as `make test` does for most.
predict: developed
	PYTHONPATH=tests $(BIN)/python -m bench.predict

predict-check: developed
	PYTHONPATH=tests $(BIN)/python -m bench.predict --check

# The instructions of each CPU op against bench/instructions.json; it needs valgrind.
instructions: developed
	$(BIN)/python -m bench.instructions --check

lint: developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: developed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# AddressSanitizer and UBSan over the op tests, on a build of its own.
sanitize: sanitized developed
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/pytest -s -m sanitize $(call marked,sanitize)

sanitized: | $(BIN)/pyfastcircuits
	PYFASTCIRCUITS_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)

# Compiled for 64-bit Arm on another machine, and the op tests run there on every tier, in qemu: for once a week.
arm: | $(BIN)/pyfastcircuits
	PATH="$(abspath $(BIN)):$$PATH" .ci/arm test

arm-check: developed
	PATH="$(abspath $(BIN)):$$PATH" .ci/arm check

arm-build: | $(BIN)/pyfastcircuits
	PATH="$(abspath $(BIN)):$$PATH" .ci/arm build

# The documentation, in build/site; a link that leads nowhere fails.
site: developed
	$(BIN)/mkdocs build --quiet --strict

# A wheel for every Python of this machine, and an sdist, into dist/, and both tried in a fresh environment.
wheels: developed
	PATH="$(abspath $(BIN)):$$PATH" .ci/wheels

# Random calls of everything public, valid ones and others: each ends in a value, or in an error that names an argument.
fuzz: developed
	$(BIN)/python tests/fuzz.py --calls $(CALLS) --seed $(SEED)

# Tests must fail where the code is made wrong: each mutation in a copy of this folder, as in tests/mutations.py.
mutations: developed
	$(BIN)/python tests/mutations.py

gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu

clean:
	rm -rf build dist out $(VENV) .venv-lens-* *.egg-info pyfastcircuits/*.so
