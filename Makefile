# make run: the main job on the embedded model. make test: the tests. make check: everything.
# make docs: the pages of docs/ and a reference of the code, in site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2

.PHONY: run test test-slurm check format lint types reference docs clean

$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	touch $@

run: $(VENV)/installed
	$(BIN)/mi-run $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Against a real SLURM of this one machine; installs its daemons where they are missing (Debian).
test-slurm: $(VENV)/installed
	command -v slurmctld slurmd munged sbatch >/dev/null || { apt-get update -qq && \
		apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest -m slow tests/sweeps/test_launchers.py $(ARGS)

check: lint types test

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

# The page of every key, from the dataclasses and conf/; a test says when it is to be made again.
reference: $(VENV)/installed
	$(BIN)/python -m mi_experiments.config.reference > docs/configuration.md

# Without a network, and every warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
