# Two commands on a fresh machine: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
DEMO := runs/demo

.PHONY: help setup demo test test-oldest check style types documentation gpu format audit tiny clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: $(STAMP) ## Make .venv and install the package with everything needed to develop it

# The stamp is the last thing written, so an interrupted set-up is taken up again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## Local pairs, region loss, toggled reference on the embedded model; then the comparison
	rm -rf $(DEMO)
	$(BIN)/dpo-video train --pairs local --loss region --reference toggle --out $(DEMO) \
	    --count 16 --steps 40 --set pairs.num_inference_steps=10 --set train.batch_size=2 \
	    --set train.gradient_accumulation_steps=1 --set train.learning_rate=4e-4 \
	    --set train.save_steps=40 --set loss.sft_weight=1000
	$(BIN)/dpo-video evaluate $(DEMO) --num-prompts 12 --set evaluate.num_inference_steps=10

check: setup ## Lint, formatting, types, import layers and documentation
	$(MAKE) --jobs 2 style types documentation

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

documentation: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A file stays on one process, which shares its fixtures. tests/conftest.py puts long files first.
DISTRIBUTED := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check ## All checks and all tests
	$(BIN)/python -m pytest $(DISTRIBUTED) --benchmark-disable --durations 15

# The old versions, and for everything else the pins of constraints.txt.
$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	awk -F== '/^(#|$$)/ { next } NR == FNR { old[$$1]; print; next } !($$1 in old)' \
	    constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt \
	    --editable '.[dev]' ftfy 'setuptools>=77'
	@touch $@

# Old libraries warn of newer ones, so that warnings are no errors here. Left out: what is said of the
# pins, and how far one draw of random weights gets, which other versions draw otherwise.
test-oldest: $(OLDEST)/.installed ## Nearly all tests on the oldest libraries allowed
	$(OLDEST)/bin/python -m pytest -W default $(DISTRIBUTED) --benchmark-disable \
	    --ignore tests/test_supply.py \
	    --deselect tests/test_train.py::test_it_starts_at_zero_margin_and_learns

gpu: ## Tests and measurements that need a CUDA GPU, with the Python on the path (about 8 minutes)
	$(PYTHON) -m benchmarks.gpu

format: setup ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: setup ## Ask a public database for known faults of what is pinned (needs the network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

tiny: setup ## Train the embedded model from scratch (about two hours on 2 cores; restartable)
	$(BIN)/python -m benchmarks.tiny.recipe

clean: ## Delete what set-up made; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
