# make demo and make test each do all the set-up they need. make check changes nothing.
.PHONY: setup demo test check fix bench gpu clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

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

# In the current Python, whose torch has to be one for CUDA: setup's environment may have another. Nothing is fetched
# if all that is needed is there.
GPU_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation
gpu:
	@$(PYTHON) -c "import torch; torch.cuda.init()" 2>/dev/null || { \
		echo "The torch of $(PYTHON) finds no GPU. Activate an environment whose torch does, or: make gpu PYTHON=..."; exit 1; }
	$(GPU_INSTALL) --no-index --editable '.[cuda,triton]' matplotlib 2>/dev/null || \
		$(GPU_INSTALL) --editable '.[cuda,triton]' matplotlib
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

clean:
	rm -rf build dist *.egg-info fusedopt/_C.* .pytest_cache .ruff_cache .mypy_cache .hypothesis $(STAMP)

# torch comes before the project: the extension is compiled against it.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard csrc/*) | $(BIN)/pip
	$(INSTALL) setuptools torch numpy
	$(INSTALL) --no-deps fastai torchvision
	$(INSTALL) --no-build-isolation --editable '.[demo,test,dev]'
	@$(BIN)/python -c "from fusedopt.runtime.leaf import extension_status as s; print('extension:', *s())"
	@touch $@

# A system Python may come without ensurepip; then its own pip fills the environment.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
