# make demo: install, prepare, train and question a small model, on a bare machine with two cores.
# make test: install what the tests need and run them.

PYTHON ?= python3
BIN = .venv/bin
export TOKENIZERS_PARALLELISM = false

demo: .venv/demo
	$(BIN)/python data/capitals/demo.py

test: .venv/test
	$(BIN)/python -m pytest -q tests

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: .venv/demo requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out

.PHONY: demo test clean
