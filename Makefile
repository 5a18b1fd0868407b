# One environment, one command each. `make demo` needs only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tests run in a process for each core; threads of theirs that wait for each other would take the cores
ALONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-llm test test-all check bench docs clean

demo: $(VENV)/core
	@$(BIN)/python recipes/demo.py

demo-llm: $(VENV)/core
	@$(BIN)/python recipes/demo_llm.py

test: $(VENV)/dev check
	@$(ALONE) $(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal

test-all: $(VENV)/dev check
	@$(ALONE) $(BIN)/python -m pytest -q -n auto --dist worksteal

check: $(VENV)/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy

bench: $(VENV)/dev
	@$(PIP) -e '.[bench]'
	@$(BIN)/python benchmarks/cnn.py && $(BIN)/python benchmarks/table.py && $(BIN)/python benchmarks/decoder.py && $(BIN)/python benchmarks/lora.py && $(BIN)/python benchmarks/overhead.py && $(BIN)/python benchmarks/startup.py

docs: $(VENV)/core
	@$(BIN)/python docs/generate.py

$(VENV)/core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large; about a minute)"
	@$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/core
	@$(PIP) -e '.[dev,report]'
	@touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
