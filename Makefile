# make demo   from an empty checkout to head maps of four tasks on a real model
# make test   ruff, pyright and every test
# make test-fast   the tests that need neither the real model nor minutes
# make figures, table, comparison, suites, notebooks   regenerate the committed results

PYTHON ?= python3
BIN := .venv/bin
SAVED := --out figures --formats html png svg
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-fast check format table figures comparison suites notebooks bench clean

demo: .venv/.installed
	$(BIN)/sitelens run antonym country-capital capitalize choose_first_of_3 --out figures/demo --progress

# The slow tests on small models run side by side; the real model and the notebooks use both cores themselves.
REAL := tests/test_real_model.py tests/test_notebooks.py
test: check test-fast
	$(BIN)/python -m pytest -m slow --numprocesses auto $(addprefix --ignore=,$(REAL))
	$(BIN)/python -m pytest -m slow $(REAL)

# One process per core: the models are so small that a process cannot use two.
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

# Every figure of the paper's analyses, with its data and provenance (about an hour; cached results are reused).
figures: .venv/.installed
	$(BIN)/sitelens figures --out figures --progress

# SITE and nine baselines on eight Function Vectors tasks (two to three hours; if interrupted, rerun to resume).
comparison: .venv/.installed
	$(BIN)/sitelens compare fv/country-capital fv/choose_middle_of_3 fv/antonym fv/alphabetically_first_3 \
	    fv/singular-plural fv/animal_v_object_3 fv/english-french fv/adjective_v_verb_3 \
	    --set LTV.n_steps=100 many-shot.limit=50 $(SAVED)

# Whole benchmarks (samples of those with long prompts), and transfer among all Function Vectors tasks (some
# hours; if interrupted, rerun to resume).
suites: .venv/.installed
	$(BIN)/sitelens suite fv57 $(SAVED)
	$(BIN)/sitelens suite builtin $(SAVED)
	$(BIN)/sitelens suite fv57 --model gemma3-270m --name suite-fv57-gemma3-270m $(SAVED) \
	    --tasks fv/antonym fv/capitalize fv/country-capital fv/english-french fv/person-sport fv/product-company \
	    fv/singular-plural fv/sentiment fv/choose_first_of_3 fv/alphabetically_first_3 fv/animal_v_object_3 \
	    fv/adjective_v_verb_3
	$(BIN)/sitelens suite anli --set SITE.n_prompts=5 $(SAVED)
	$(BIN)/sitelens suite bbh --set SITE.n_prompts=5 $(SAVED) \
	    --tasks bbh/boolean_expressions bbh/date_understanding bbh/disambiguation_qa \
	    bbh/logical_deduction_three_objects bbh/navigate bbh/sports_understanding
	$(BIN)/sitelens suite mmlu-pro --set SITE.n_prompts=5 --n-items 25 $(SAVED) \
	    --tasks mmlu-pro/biology
	$(BIN)/sitelens transfer fv57 --n-items 50 --name transfer-fv57 $(SAVED)

# Every notebook from top to bottom, outputs included, in place.
notebooks: .venv/.installed
	cd notebooks && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 *.ipynb

# The library compared with a straightforward implementation and with the limits of the machine (about an hour).
bench: .venv/.installed
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.curves

# torch first: once it is installed, no other package pulls in another build of it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
