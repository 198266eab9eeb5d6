# make demo: install, prepare, train and question a small model, on a bare machine with two cores.
# make chat: open that model in the browser, beside the untrained one (after make demo).
# make test: install what the tests need and run them.

PYTHON ?= python3
BIN = .venv/bin
export TOKENIZERS_PARALLELISM = false

demo: .venv/demo
	$(BIN)/python demo/run.py

chat: .venv/serve
	$(BIN)/python serve.py --init_from=out/capitals --compare=out/capitals-untrained --temperature=0

test: .venv/test
	$(BIN)/python -m pytest -q tests

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/serve: .venv/demo requirements-serve.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	touch $@

.venv/test: .venv/serve requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out

.PHONY: demo chat test clean
