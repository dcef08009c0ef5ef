# Two commands. Each one installs what it needs:
#   make reproduce   train, attack and report the default study (config/quick.yaml), and compare
#                    its results with results/reference/quick
#   make test        run every test and check
# Others: make style (the checks of style, imports and types), make types, make install, make lock,
# make wheels (a folder to install from without a network), make docs (the documentation as a site in
# build/docs), make reference (copies a finished run to results/reference), make clean.
# PYTHON=python3.12 chooses another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := python -m pip --disable-pip-version-check --quiet
EXTRAS := robustbench,onnx,dev
COMMA := ,
INSTALLED := $(VENV)/.installed
KERNELS := $(wildcard robsparse/kernels/*.c robsparse/kernels/*.h) robsparse/kernels/sources.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: reproduce test style types install lock wheels docs reference clean

reproduce: $(INSTALLED)
	snakemake --cores all
	robsparse compare results/quick results/reference/quick

test: $(INSTALLED)
	python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

style: $(INSTALLED)
	pre-commit run --all-files

types: $(INSTALLED)
	pre-commit run --all-files types

install: $(INSTALLED)

docs: $(INSTALLED)
	sphinx-build -q -n -c docs . build/docs
	@echo "the documentation: build/docs/index.html"

# First all libraries but torch, by their hashes. Then torch and torchvision by their versions, which
# have no build label: pip installs a CPU-only build if the package index offers one, and the ordinary
# build otherwise.
$(INSTALLED): pyproject.toml constraints.txt requirements.lock setup.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "robsparse needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) install --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/$(PIP) install --no-build-isolation --constraint constraints.txt \
	  --editable '.[$(EXTRAS)]'
	@touch $@

# Writes the hashes of the versions in constraints.txt, for every Python from 3.11.
lock: $(INSTALLED)
	printf 'torch\ntorchvision\n' | uv pip compile pyproject.toml constraints.txt \
	  $(addprefix --extra ,$(subst $(COMMA), ,$(EXTRAS))) --universal --python-version 3.11 \
	  --generate-hashes --excludes - --no-annotate --quiet \
	  --custom-compile-command 'make lock' --output-file requirements.lock

# Fills the folder wheels/ with every file that `make install` needs on a machine like this one.
# There: PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels make install
wheels: $(INSTALLED)
	$(BIN)/$(PIP) download --no-deps --require-hashes --requirement requirements.lock --dest wheels
	$(BIN)/$(PIP) download --constraint constraints.txt --find-links wheels --dest wheels \
	  torch torchvision wheel

# report.html is left out: it has several megabytes. STUDY=ablation_bcs copies another study. PARTIAL=1 copies the results that exist so far.
# CONFIG=config/photos_more.yaml names the file of the study, if its name is not that of the study.
STUDY ?= quick
CONFIG ?= config/$(STUDY).yaml
FROM = results/$(STUDY)$(if $(PARTIAL),/partial)
reference:
	$(if $(PARTIAL),robsparse collect $(CONFIG) --partial && robsparse figures $(CONFIG) --partial)
	mkdir -p results/reference/$(STUDY)
	cp $(FROM)/report.md results/reference/$(STUDY)/README.md
	cd $(FROM) && cp -r tables plots results.csv layers.csv outcomes.parquet $(CURDIR)/results/reference/$(STUDY)/

clean:
	rm -rf $(VENV) results/quick results/tiny
