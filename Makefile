# Each target does everything it needs on a machine with Python 3.10+ and nothing installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMMON := $(abspath $(VENV)/transformers)

.PHONY: demo test test-common lint bench release-check clean

demo: $(INSTALLED)  ## train on the embedded data set
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no examples/train.py

test: $(INSTALLED)  ## run the test suite, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-common: $(COMMON)/tests/__init__.py  ## run transformers' own common tests on our classes
	TRANSFORMERS_SOURCE=$(COMMON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/common \
		tests/model/test_pretrained_mmclf.py --override-ini addopts= --numprocesses auto

# The common tests are in the source archive of transformers only, which is that of the installed version.
$(COMMON)/tests/__init__.py: $(INSTALLED)
	$(BIN)/python -m pip install --editable '.[dev,common]'
	rm -rf $(COMMON)
	mkdir -p $(COMMON)
	$(BIN)/python -m pip download --no-deps --no-binary :all: --dest $(COMMON) \
		transformers==$$($(BIN)/python -c 'import transformers; print(transformers.__version__)')
	tar --extract --gzip --strip-components 1 --directory $(COMMON) --file $(COMMON)/transformers-*.tar.gz
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(INSTALLED)  ## image-only, text-only and fused on the embedded data set
	$(BIN)/python benchmarks/modalities.py

release-check: $(INSTALLED)  ## build, install the wheel alone in a fresh environment, train, evaluate and predict there
	rm -rf build dist $(VENV)/release
	$(BIN)/python -m pip install build
	$(BIN)/python -m build
	$(PYTHON) -m venv $(VENV)/release
	$(VENV)/release/bin/python -m pip install dist/*.whl
	cd $(VENV)/release && bin/hf-mmclf train --preset demo-text --demo_rows 300 --num_train_epochs 1 --output_dir model
	cd $(VENV)/release && bin/hf-mmclf evaluate model --demo_rows 300 && bin/hf-mmclf predict model --texts "a red ball"

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
