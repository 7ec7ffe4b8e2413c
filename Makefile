# make demo and make test each do all the set-up they need. make check changes nothing.
.PHONY: setup demo test check fix bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# fastai's callbacks are what the tests compare with. Its other requirements (torchvision, spacy) are
# large and not used here, so it is installed without any and these are what it needs to be imported.
FASTAI_NEEDS := cloudpickle fastcore fastdownload fastprogress fasttransform matplotlib pandas pillow \
	plum-dispatch pyyaml requests scikit-learn scipy

setup: $(STAMP)

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest

fix:
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist *.egg-info fusedopt/_C.* .pytest_cache .ruff_cache .mypy_cache .hypothesis $(STAMP)

# torch comes before the project: the extension is compiled against it.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard csrc/*) | $(BIN)/pip
	$(INSTALL) setuptools torch numpy
	$(INSTALL) $(FASTAI_NEEDS)
	$(INSTALL) --no-deps fastai
	$(INSTALL) --no-build-isolation --editable '.[demo,dev]'
	@$(BIN)/python -c "from fusedopt.runtime.leaf import extension_status as s; print('extension:', *s())"
	@touch $@

# A system Python may come without ensurepip; then its own pip fills the environment.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
