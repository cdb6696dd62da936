# Everything runs in .venv, made on first use. `make test` on a fresh machine installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup check format test test-slow test-all test-gpu bench bench-serve bench-gpu bench-table demo serve base-model clean
.DEFAULT_GOAL := test

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: setup
	$(BIN)/ruff check server kernels scheduler benchmarks tests
	$(BIN)/ruff format --check server kernels scheduler benchmarks tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix server kernels scheduler benchmarks tests
	$(BIN)/ruff format server kernels scheduler benchmarks tests

test: setup
	$(BIN)/pytest --timeout 300 -m "not slow and not gpu"

test-slow: setup
	$(BIN)/pytest --timeout 600 -m "slow and not gpu"

test-all: test test-slow

# For a machine with a GPU that has torch, triton, safetensors, tokenizers, transformers, peft and pytest, and
# neither Weft's web stack nor a virtual environment: engine, kernels and training only.
test-gpu:
	PYTHONPATH=server:kernels:scheduler $(PYTHON) -m pytest -m gpu \
		tests/kernels tests/server/adapters tests/server/engine tests/server/model tests/server/quant

# What this CPU gives, beside transformers + PEFT: docs/benchmarks.md. Results go to benchmarks/results.
BENCH_PARTS ?= kernels engine adapters
BENCH_MODEL ?= bench-200m

bench: setup
	set -e; for part in $(BENCH_PARTS); do $(BIN)/weft bench $$part --device cpu --model $(BENCH_MODEL) $(FLAGS); done
	$(MAKE) bench-table

# An open-loop load over HTTP on the bundled model, without finetune jobs and with two: about four minutes.
bench-serve: setup
	$(BIN)/weft bench serve --name serve-demo-cpu --rate 2 --length-scale 0.3 --duration 60 \
		--jobs 2 --tpot-slo-ms 40 $(FLAGS)
	$(MAKE) bench-table

# One part on a machine with a GPU, at most eight minutes: PART=kernels|decode|prefill|train|adapters|coserve. Needs what
# `test-gpu` needs; peers that are not installed are reported as not measured.
bench-gpu:
	@test -n "$(PART)" || { echo "usage: make bench-gpu PART=kernels|decode|prefill|train|adapters|coserve"; exit 2; }
	PYTHONPATH=server:kernels:scheduler timeout 480 \
		$(PYTHON) -m weft_server.bench $(PART) --device cuda --model llama-3.1-8b $(FLAGS)

# The tables of README.md and benchmarks/results/README.md, from the reports in benchmarks/results.
bench-table:
	$(PYTHON) benchmarks/readme_table.py

demo: setup
	$(BIN)/weft demo --exit

serve: setup
	$(BIN)/weft serve demo

# Trains the bundled base model again (at most an hour on two cores); the result is what the wheel ships.
base-model: setup
	$(BIN)/python -m weft_server.demo.train_base --out server/weft_server/demo/base_model

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
