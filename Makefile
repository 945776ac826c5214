# The interpreter that makes the environment; `gpu` runs with it as it is and installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OUT ?= gpu-out
BENCH_OUT ?= bench-out
PARITY ?= .parity
# What the machine with a GPU has.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_TRITON ?= 3.6.0
GPU_VENV ?= .gpu-venv

BIN = $(VENV)/bin
READY = $(VENV)/ready

.PHONY: demo test lint pytest kernels bench parity vllm gpu gpu-more gpu-cache soak docs dist clean

demo: $(READY)
	$(BIN)/attnshape demo --out demo-out

# Side by side: mypy keeps one core busy for half a minute. Bytecode is written where the machine would rather
# not: every process that a test starts would compile the project anew.
test: $(READY)
	$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(READY)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --benchmark-disable

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel compiled for every target, a quarter of an hour; `python -m benchmarks.kernel_table` alone compiles
# what it does not know, and `make test` reads what it wrote.
kernels: $(READY)
	$(BIN)/python -m benchmarks.kernel_table all

# Every suite on this machine, a GPU if it has one; then what got worse since the committed run of its kind.
bench: $(READY)
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest benchmarks -q --benchmark-quiet --benchmark-json=$(BENCH_OUT)/bench.json
	$(BIN)/python -m benchmarks.report $(BENCH_OUT)/bench.json
	$(BIN)/python -m benchmarks.guard $(BENCH_OUT)/bench.json

# Presets and adapters against the frameworks' real functions, an environment for each under PARITY; ONLY names
# some of them. slime, NeMo-RL and AReaL come from checkouts: SLIME=folder NEMO_RL=folder AREAL=folder.
parity: $(READY)
	PYTHONPATH=.:tests $(BIN)/python -m parity $(ONLY) --environments $(PARITY) \
		$(SLIME:%=--checkout slime=%) $(NEMO_RL:%=--checkout nemo_rl=%) $(AREAL:%=--checkout areal=%)
	PYTHONPATH=.:tests $(BIN)/python -m parity.adapters $(ONLY) --environments $(PARITY) \
		$(SLIME:%=--checkout slime=%)

# The plugin inside vLLM's own engine and server on a CPU, in an environment of its own; CELLS names some, such as
# CELLS='"gemma2" "server"'. A quarter of an hour.
vllm: $(READY)
	PYTHONPATH=.:tests $(BIN)/python -m integrations.vllm $(CELLS) --environments $(PARITY) $(SLIME:%=--slime %)

# On a machine with a GPU whose PYTHON has torch, triton and numpy; pytest and hypothesis for the tests among it.
# Nine minutes at most: what the machine is, every kernel once, budgets, other constants, races, tests. Each line
# of OUT/results.jsonl is written when it is known, and OUT/summary.md after each part: commit both, and
# summary.json, below benchmarks/results/CARD/. ONLY="facts tests=50" for some parts, and so many seconds.
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a GPU'"
	$(PYTHON) -m benchmarks.on_gpu $(OUT) first $(ONLY)

# Afterwards, as far as they are there: suites of forward and memory, ncu, compute-sanitizer, the command, every
# suite, vLLM and OpenRLHF; ONLY="memcheck ncu" for some.
gpu-more:
	$(PYTHON) -m benchmarks.on_gpu $(OUT) more $(ONLY)

# Before, here: what `make gpu` would compile, for a machine with these versions, in .gpu-cache, to be carried
# along. Where the versions or the kernels are others there, `make gpu` says so and compiles.
gpu-cache: $(GPU_VENV)/ready
	PYTHONPATH=.:tests $(GPU_VENV)/bin/python -m benchmarks.on_gpu.ahead build

$(GPU_VENV)/ready:
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet torch==$(GPU_TORCH) triton==$(GPU_TRITON) numpy
	touch $@

# The documentation's site, in site/; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Wheel and source distribution, in dist/.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Drawn cases in great numbers against the float64 reference; goes on where it was stopped.
soak: $(READY)
	cd tests && PYTHONPATH=..:. OMP_NUM_THREADS=1 ../$(BIN)/python -m soak

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-out gpu-out .gpu-cache .gpu-venv bench-out site dist .parity .peers .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
