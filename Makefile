# make demo and make test each do all the set-up they need. make check changes nothing.
.PHONY: help setup demo test check architectures fix test-torch bench docs gpu clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

help: ## what there is to make: this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## an environment in .venv with the exact tools of constraints.txt, and the extension

demo: setup ## train a ResNet on real digits with five update rules, four ways each, and two classes
	$(BIN)/python -m benchmarks.demo

test: setup ## set up, then check: formatting, lint, types and all tests (TEST_OPTIONS=... for pytest, WORKERS=2)
	$(MAKE) --no-print-directory check

# A file's tests stay together: what its fixtures make is made once. Threads that wait leave the core to the other worker.
WORKERS ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(1)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
check: ## the same in an environment that is set up; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(call PYTEST,$(BIN)) $(TEST_OPTIONS)

architectures: setup ## compile GPU kernels for all architectures, and note that they were: after changes to them
	PYTHONPATH=tests:tests/backends:. $(BIN)/python tests/backends/architectures.py

fix: ## format, and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# The tests with another torch, e.g. `make test-torch TORCH=2.14.1 TESTS=tests/step/test_warm.py`: all of them without TESTS.
# In an environment of its own, of up to 6 GB, and on a copy of the tree, whose extension is built for that torch.
TORCH ?= 2.14.1
TESTS ?=
OTHER := .venv-torch-$(TORCH)
OTHER_PIP = $(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt
test-torch: ## the tests with another torch: TORCH=2.14.1, and TESTS=tests/step/test_warm.py for some of them
	@$(MAKE) --no-print-directory VENV=$(OTHER) $(OTHER)/bin/pip
	grep -vE '^(torch|torchvision|triton|cuda-.*|nvidia-.*)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip uninstall -qq --yes fastai timm
	$(OTHER_PIP) setuptools numpy torch==$(TORCH) torchvision
	rm -rf $(OTHER)/tree && mkdir $(OTHER)/tree
	tar -cf - --exclude='./.*' --exclude=./build --exclude='*.so' . | tar -xf - -C $(OTHER)/tree
	$(OTHER_PIP) --no-build-isolation --editable '$(OTHER)/tree[demo,test,dev]'
	$(OTHER_PIP) --no-deps fastai timm
	cd $(OTHER)/tree && $(call PYTEST,../bin) $(TESTS)

bench: setup ## measure everything against torch.optim: about nine minutes
	$(BIN)/python -m benchmarks

docs: setup ## the documents as a site, in build/site; a warning, such as a dead link, is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "Open build/site/index.html"

# In the current Python, whose torch has to be one for CUDA: setup's environment may have another. Nothing is fetched
# if all that is needed is there.
GPU_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation
GPU_NEEDS := matplotlib pytest pytest-timeout
gpu: ## check and measure on a GPU, in the current Python (PYTHON=...), whose torch has to find one
	@$(PYTHON) -c "import torch; torch.cuda.init()" 2>/dev/null || { \
		echo "The torch of $(PYTHON) finds no GPU. Activate an environment whose torch does, or: make gpu PYTHON=..."; exit 1; }
	$(GPU_INSTALL) --no-index --editable '.[cuda,triton]' $(GPU_NEEDS) 2>/dev/null || \
		$(GPU_INSTALL) --editable '.[cuda,triton]' $(GPU_NEEDS)
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

clean: ## remove what was built, and the caches of tools; .venv stays
	rm -rf build dist .venv-torch-*/tree *.egg-info fusedopt/_C.* .pytest_cache .ruff_cache .mypy_cache .hypothesis $(STAMP)

# torch comes before the project: the extension is compiled against it. fastai comes last, and goes first where it is
# from an earlier set-up: its requirements are not all installed, and pip would call that an error in every later call.
# So do torchvision and timm, which asks for it.
TELL := from fusedopt.extension.leaf import extension_status as s; print('extension:', *s())
$(STAMP): constraints.txt pyproject.toml setup.py fusedopt/extension/recipe.py $(wildcard csrc/*) | $(BIN)/pip
	@$(BIN)/python -m pip uninstall -qq --yes fastai timm torchvision
	$(INSTALL) setuptools torch numpy
	$(INSTALL) --no-build-isolation --editable '.[demo,test,dev]'
	$(INSTALL) --no-deps fastai timm torchvision
	@$(BIN)/python -c "$(TELL)"
	@touch $@

# A system Python may come without ensurepip; then its own pip fills the environment.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
