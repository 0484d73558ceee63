# Every target does the setup that it needs. README.md lists the equivalent commands for systems without make.
PYTHON ?= python3
SETUP = settings.ini setup.py constraints.txt
export PIP_QUIET ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help train test lab docs bench install-dev clean

help:
	@echo "make train        train a small model and leave its report in checkpoints/first/train.ipynb"
	@echo "make test         run the fast notebook cells and tests, which need no GPU"
	@echo "make lab          open the notebooks in JupyterLab"
	@echo "make docs         build the documentation site in _docs/"
	@echo "make bench        run the benchmarks"
	@echo "make install-dev  create .venv with everything needed to work on lmnotes"
	@echo "make clean        remove everything that make created, including .venv, but not data/ and checkpoints/"

train: .venv/.installed
	.venv/bin/papermill nbs/train.ipynb checkpoints/first/train.ipynb

test: .venv/.installed-dev
	.venv/bin/pytest

lab: .venv/.installed-dev
	.venv/bin/jupyter lab nbs

docs: .venv/.installed-dev
	.venv/bin/python docs/build_docs.py

bench: .venv/.installed-dev
	.venv/bin/python -m benchmarks

install-dev: .venv/.installed-dev

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/.hypothesis
	find . \( -path ./.git -o -path ./data -o -path ./checkpoints \) -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.venv/bin/pip:
	@echo "Creating .venv with $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv

.venv/.installed: $(SETUP) | .venv/bin/pip
	@echo "Installing lmnotes (1 to 3 minutes the first time)"
	.venv/bin/pip install -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: $(SETUP) | .venv/bin/pip
	@echo "Installing lmnotes and its tools (2 to 4 minutes the first time)"
	.venv/bin/pip install -c constraints.txt -e '.[dev]'
	@touch .venv/.installed $@
