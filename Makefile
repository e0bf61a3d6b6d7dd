# Everything is run through here. Needs Python 3.11 or newer and make; the rest is installed into .venv, and for Torch
# into .venv-torch.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help install demo evidence-small docs test test-quick test-tensorflow test-jax test-torch bench-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

install: .venv/installed  ## create .venv with the tested versions of everything

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}. Try: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[experiments,dev]'
	touch $@

DATASET ?= digits
demo: install  ## what strong augmentation costs pruned networks, and a linked magnitude does not; DATASET=cifar10, DATA_DIR=
	$(BIN)/python -m experiments.demo --dataset=$(DATASET) $(DATA_DIR:%=--data_dir=%) --seeds=0,1,2 --workers=auto \
		--results=demo/$(DATASET).jsonl --out=demo/$(DATASET).png --checkpoints=demo/checkpoints \
		--export=saved_models/demo_$(DATASET)_p90

EVIDENCE := --dataset=cifar10 $(DATA_DIR:%=--data_dir=%) --image_size=16 --train_images=1000 --model=resnet8 --epochs=100 \
	--batch_size=125 --learning_rate=0.05 --schedule=cosine --evaluate_every=10 --sparsities=0,.6,.8,.9,.97
evidence-small: install  ## Figure 1 at the scale of README's figure, one seed; goes on where it was stopped
	$(BIN)/python -m experiments.fig1_magnitude_search $(EVIDENCE) --seeds=$(or $(SEEDS),0) --workers=auto \
		--results=evidence/small_fig1.jsonl --checkpoints=evidence/checkpoints

docs: install  ## build the site, guides and reference, into build/docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

test: test-tensorflow test-jax  ## run the tests on the TensorFlow and the JAX backend

test-quick: install  ## the heart of every module, on TensorFlow, in under a minute
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(PARALLEL) -m quick

test-tensorflow: install
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(PARALLEL)

test-jax: install
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(PARALLEL) tests  # the docstrings run on TensorFlow

test-torch: .venv-torch/installed  ## run the tests on the Torch backend; not a part of `make test`
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest $(PARALLEL)

# With a CPU build of torch, where pip finds one of that version, see CONTRIBUTING.md.
.venv-torch/installed: setup.cfg pyproject.toml constraints.txt constraints-torch.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-torch.txt \
		-e '.[torch,experiments,dev]'
	touch $@

bench-gpu: install  ## on an accelerator: the `gpu` tests and three benchmarks in under ten minutes, as one JSON file
	$(BIN)/python -m benchmarks.gpu

lint: install  ## formatting, lint, types, and which module may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets above made, but for benchmarks' tables
	rm -rf .venv .venv-torch demo saved_models/demo_* evidence build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
