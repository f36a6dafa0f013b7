# make demo   from nothing to trained head maps of four tasks on a real model
# make test   ruff, pyright and every test
# make test-fast   the tests that need neither the real model nor minutes
# make figures, make table, make notebooks   what is committed of results, made again

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-fast check format table figures notebooks bench clean

demo: .venv/.installed
	$(BIN)/sitelens run antonym country-capital capitalize choose_first_of_3 --out figures/demo --progress

test: check test-fast
	$(BIN)/python -m pytest -m slow

# One process a core: the models are so small that a process cannot use two.
test-fast: .venv/.installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every built-in task under every condition (about 45 minutes on two cores).
table: .venv/.installed
	$(BIN)/sitelens run $$($(BIN)/sitelens tasks --built-in --names) --n-items 50 --out figures/builtin --progress

# Every figure of the paper's analyses, with its data and origin (about an hour; what is cached is not computed again).
figures: .venv/.installed
	$(BIN)/sitelens figures --out figures --progress

# Every notebook from top to bottom, outputs included, in place.
notebooks: .venv/.installed
	cd notebooks && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 *.ipynb

# The library against the plain way, and against what the machine can do (about an hour).
bench: .venv/.installed
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.curves

# torch first: with it in place, nothing else asks for another build of it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
