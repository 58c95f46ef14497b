# Every target makes .venv first, so none needs anything before it.
# GPU users: put your own torch build into .venv, then `make setup CONSTRAINTS=`.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && command -v $$p && break; done)
CONSTRAINTS ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= benchmarks/results
SELDOM := /tests?/|/(awkward|moto|mypyc?|narwhals|nltk|phonenumbers|pip|transformers/models|virtualenv)/

.PHONY: help setup quickstart test test-long faults lint docs docs-refresh bench gpu-check gpu-bench-kernels gpu-bench-train gpu-tune clean

help:
	@echo "make quickstart   train, evaluate and convert a small model on this machine (8 to 23 minutes)"
	@echo "make test         every test that needs no GPU"
	@echo "make test-long    the same tests with more seeds, and the long ones"
	@echo "make faults       kill runs 200 times, and see what becomes of them (about half an hour)"
	@echo "make lint         ruff, mypy, the import contract"
	@echo "make bench        every CPU benchmark, JSON into $(OUT)"
	@echo "make gpu-check    the tests marked gpu"
	@echo "make gpu-bench-kernels   our CUDA kernels on a GPU, beside others"
	@echo "make gpu-tune     the same with other sizes of blocks, runs and slots: which are the fastest on this GPU"

# On a machine without a network that has everything: make gpu-check INSTALLED=python3
ifdef INSTALLED
PY := $(INSTALLED)
setup:
	$(PY) setup.py --quiet build_ext --inplace
else
PY := $(BIN)/python
setup: $(STAMP)
endif

$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*)
	@test -n "$(PYTHON)" || { echo "megatron-davinci needs Python 3.11 or 3.12; none was found. Set PYTHON=/path/to/python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) -e '.[data,darwin,eval,dev]'
	@# Byte-code by all cores, where pip would write it by one; templates that are no Python are passed over. What is
	@# seldom imported is nearly half of all: a program that does has it compiled then.
	@$(BIN)/python -m compileall -q -j 0 -x '$(SELDOM)' $(VENV)/lib > /dev/null 2>&1 || true
	@touch $(STAMP)

quickstart: setup
	$(BIN)/python examples/quickstart/run.py

# A file's tests stay together, since they share what is dear to make.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25

test: setup
	$(PYTEST)

test-long: setup
	@mkdir -p $(OUT)
	$(PYTEST) --long --record $(OUT)/test_long.json

faults: setup
	@mkdir -p $(OUT)
	$(BIN)/python benchmarks/faults.py --json $(OUT)/faults.json

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-refresh: setup
	$(BIN)/python tools/make_reference.py
	$(BIN)/python tools/refresh_messages.py

bench: setup
	@mkdir -p $(OUT)
	$(BIN)/python benchmarks/loop_overhead.py --json $(OUT)/loop_overhead.json
	$(BIN)/python benchmarks/phase_timers.py --json $(OUT)/phase_timers.json
	$(BIN)/python benchmarks/domain_loss.py --json $(OUT)/domain_loss.json
	$(BIN)/python benchmarks/data_order.py --json $(OUT)/data_order.json
	$(BIN)/python benchmarks/loader.py --json $(OUT)/loader.json
	$(BIN)/python benchmarks/tokenize.py --json $(OUT)/tokenize.json
	$(BIN)/python benchmarks/saturation.py --json $(OUT)/saturation.json
	$(BIN)/python benchmarks/controller_world.py --json $(OUT)/controller_world.json
	$(BIN)/python benchmarks/convert.py --json $(OUT)/convert.json
	$(BIN)/python benchmarks/evaluate.py --json $(OUT)/evaluate.json
	$(BIN)/python benchmarks/async_save.py --json $(OUT)/async_save.json
	$(BIN)/python benchmarks/dealt_muon.py --json $(OUT)/dealt_muon.json
	$(BIN)/python benchmarks/snapshots.py --json $(OUT)/snapshots.json
	$(BIN)/python benchmarks/refine_faults.py --json $(OUT)/refine-faults.json
	$(BIN)/python benchmarks/health.py --json $(OUT)/health.json
	$(BIN)/python benchmarks/corruption.py --json $(OUT)/corruption.json
	$(BIN)/python benchmarks/darwin.py --json $(OUT)/darwin.json
	$(BIN)/python benchmarks/simulated_worlds.py --json $(OUT)/simulated_worlds.json
	$(BIN)/python benchmarks/ops_on_off.py --device cpu --json $(OUT)/ops_on_off.json
	$(BIN)/python benchmarks/precision.py --json $(OUT)/precision.json

GPU_TESTS := tests/gpu tests/kernels tests/model/test_unwritten.py tests/optim/test_davinci.py tests/train/test_dali_run.py

gpu-check: setup
	$(PY) -m pytest -m gpu -n 8 -vv -rfEs $(GPU_TESTS)  # says at once what fails, should time run out

gpu-bench-kernels: setup
	@mkdir -p $(OUT)
	$(PY) -m megatron_davinci.cli.main doctor --kernels
	$(PY) benchmarks/kernels.py --json $(OUT)/kernels_gpu.json

gpu-tune: setup
	@mkdir -p $(OUT)
	$(PY) benchmarks/tune_kernels.py --json $(OUT)/kernels_tuned.json
	$(PY) benchmarks/memory_patterns.py --json $(OUT)/memory_patterns.json

gpu-bench-train: setup
	@mkdir -p $(OUT)
	$(PY) benchmarks/train_gpu.py --json $(OUT)/train_gpu.json
	$(PY) benchmarks/loop_overhead.py --device cuda --json $(OUT)/loop_overhead_gpu.json

clean:
	rm -rf build site .pytest_cache .mypy_cache .ruff_cache *.egg-info
