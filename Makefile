# make demo   train three recipes on real aerial images and read the report
# make test   the gate: notebooks clean, export changes nothing, all notebooks run, pytest
# make docs   the book as a website (needs quarto)
#
# A ready interpreter instead of .venv:   make test PYTHON=/path/to/python
# Another Python or package index:        make .venv BASE_PYTHON=python3.12 PIP_INSTALL="install --index-url URL"
BASE_PYTHON ?= python3
PIP_INSTALL ?= install
VENV ?= .venv

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

.PHONY: .venv demo test docs clean
.venv: $(VENV)/.installed

# one pip call, pinned; again only when what it reads has changed
$(VENV)/.installed: constraints.txt settings.ini setup.py pyproject.toml
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(PYTHON) tools/demo.py

test: $(READY)
	$(PYTHON) tools/gate.py

docs: $(READY)
	$(dir $(PYTHON))nbdev_docs

clean:
	rm -rf $(VENV) build dist *.egg-info
