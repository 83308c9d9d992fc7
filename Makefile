# Two commands do everything on a fresh machine with Python 3.11 or later: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test test-core slow lint bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test-all]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/train_latent_diffusion.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Oracles and what else is exact sees programs as users run them; the others are compiled without
# optimizations.
test: lint
	$(BIN)/python -m pytest -n 2
	HINA_OPTIMIZED=1 $(BIN)/python -m pytest -n 2 -m 'exact and not slow' tests

# The core alone, in an environment without torch and flax.
test-core:
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	.venv-core/bin/python -m pytest -n 2
	HINA_OPTIMIZED=1 .venv-core/bin/python -m pytest -n 2 -m 'exact and not slow' tests

slow: $(VENV)/.installed
	HINA_OPTIMIZED=1 $(BIN)/python -m pytest -n 2 -m slow

bench: $(VENV)/.installed
	for tree in lora420 lora_sdxl dense17m; do \
		$(BIN)/python benchmarks/speed.py --tree $$tree \
			--output benchmarks/results/speed_$$tree.json || exit 1; done
	for tree in lora420 lora_sdxl; do \
		$(BIN)/python benchmarks/bridge.py --tree $$tree \
			--output benchmarks/results/bridge_$$tree.json || exit 1; done
	$(BIN)/python benchmarks/growth.py --output benchmarks/results/growth.json \
		--plot benchmarks/results/growth.png

clean:
	rm -rf $(VENV) .venv-core build *.egg-info demo_output bridge_output distributed_output
