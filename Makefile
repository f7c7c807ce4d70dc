# make demo    install into .venv and run the default experiment
# make test    install and run the tests
# make test-all the long tests too, which repeat a law for another detector, method or moment
# make quick   only the tests that are not marked slow, in under two minutes
# make lint    ruff and pyright
# make docs    the key reference, docs/keys.md, and the pages in site/
# All may be repeated: what is done is skipped. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test test-all quick lint docs clean

install: $(STAMP)

# Where the system lacks the graphics libraries that opencv-python wants, its headless twin serves;
# it may be there already (grad-cam asks for it), but has lost the files that both share.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  $(BIN)/pip uninstall --quiet --yes opencv-python; \
	  $(BIN)/pip install --quiet --force-reinstall --no-deps --constraint constraints.txt \
	    opencv-python-headless; }
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python run.py

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not long'

test-all: $(STAMP)
	$(BIN)/python -m pytest

quick: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' -n logical

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python -m ldt.config.reference docs/keys.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache
