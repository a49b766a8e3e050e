# make demo    the whole road in minutes on a CPU: tokenizer, data, pretraining, fine-tuning, exam, chat
# make demo-lora    the same, and the fine-tuning twice more, as LoRA and as QLoRA
# make test    the test suite                    make test-fast   without the slow part
# make bench   speed and memory, beside transformers
# make lint    ruff                              make clean       remove what these made (not your data/ or other runs)
#
# Each makes .venv and installs what it needs the first time. PYTHON=python3.11 chooses another interpreter;
# PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares the CUDA packages on a machine without GPU.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help demo demo-lora test test-fast bench lint clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

demo: $(VENV)/.run-ready
	@$(PY) demo.py

demo-lora: $(VENV)/.run-ready
	@$(PY) demo.py --lora

test: $(VENV)/.dev-ready
	@echo "running all tests (a few minutes on two cores)"
	@$(PY) -m pytest -q -n auto

test-fast: $(VENV)/.dev-ready
	@$(PY) -m pytest -q -n auto -m "not slow"

bench: $(VENV)/.dev-ready
	@echo "training speed and memory at the 92m preset, ours and transformers' in turn (several minutes on a CPU)"
	@$(PY) bench.py train --model 92m --against transformers

lint: $(VENV)/.dev-ready
	@$(PY) -m ruff check .

clean:
	rm -rf $(VENV) out/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run-ready: requirements.txt | $(PY)
	@echo "installing requirements.txt into $(VENV) (once; torch is large)"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.dev-ready: requirements-dev.txt $(VENV)/.run-ready
	@echo "installing requirements-dev.txt into $(VENV) (once)"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@
