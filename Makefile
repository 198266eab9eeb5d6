# make demo: install, train a small base on prose, tune it on conversations and ask both, on two cores
# make chat: open the tuned model in the browser, beside its base (after make demo)
# make test: install what the tests need and run them
# make gpu: check that every path is right on your CUDA card, and time it (9 minutes)
# make lint: look for mistakes that a program can find
#
# On Linux, plain torch brings gigabytes of CUDA libraries. For the small CPU build:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM = false

demo: .venv/demo
	$(BIN)/python demo/run.py

chat: .venv/serve
	@test -d out/demo || { echo 'There is no model in out/demo yet. Run: make demo'; exit 2; }
	$(BIN)/python serve.py --init_from=out/demo --compare=out/demo-base --temperature=0 --max_new_tokens=40

test: .venv/test
	$(BIN)/python -m pytest -q tests

gpu: .venv/serve
	$(BIN)/python bench/gpu.py

lint: .venv/test
	$(BIN)/ruff check .

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.txt)
	$(PIP) -r requirements.txt
	touch $@

.venv/serve: .venv/demo requirements-serve.txt
	$(PIP) -r requirements-serve.txt
	touch $@

.venv/test: .venv/serve requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out

.PHONY: demo chat test gpu lint clean
