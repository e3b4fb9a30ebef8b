# What one runs here. Needs make and a python3 of 3.11 or newer; `make install` brings the rest into .venv.
PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
MODULE ?= lrules/rules/backman.py
SAMPLE ?= 30
EXTRAS ?= $(shell $(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])')
SDIST_TESTS ?= tests/test_apply.py tests/test_public_names.py tests/rules/test_feedback_alignment.py

VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
NEWEST := .venv-newest
WHEEL := .wheel
PYTEST = python -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help install demo docs bench gpu lint format test test-slow test-floor test-newest wheel-test use-extra release mutate clean

help:
	@echo "make install     create .venv with the package, the experiments and the tools, in the versions of constraints.txt"
	@echo "make demo        compare the learning rules on handwritten digits"
	@echo "make docs        build the documentation into docs/_build/html; warnings are errors"
	@echo "make test        lint, types, and every test that is not slow: what CI runs"
	@echo "make lint        lint and types alone"
	@echo "make format      let ruff format the code, sort imports and mend what it can"
	@echo "make test-slow   the slow tests"
	@echo "make test-floor  the tests, with the oldest versions that are supported, in .venv-floor"
	@echo "make test-newest the tests, with the newest versions of everything, in .venv-newest (PYTHON=python3.13 for the newest JAX)"
	@echo "make wheel-test  build the wheel and the sdist, and use the wheel where nothing else is installed: CI runs this, too"
	@echo "make release     what stands before an upload: the version, the wheel and the sdist, each of EXTRAS; it uploads nothing"
	@echo "make mutate      change operators of MODULE=lrules/..., and show what its tests do not notice"
	@echo "make bench       time and memory of every rule, the time to trace it, and epochs of training (an hour on two cores; BENCH_ARGS=--quick: minutes)"
	@echo "make gpu         all that needs a GPU, with the Python that has JAX for it (GPU_ARGS=--tiny for a CPU)"
	@echo "make clean       remove the environments and caches"

# The stamp is made last, so that an interrupted install is done again.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) -e '.[experiments,tensorboard,dev]'
	touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),-c constraints.txt)

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	$(call install,$(FLOOR),-c constraints-floor.txt)

install: $(VENV)/.installed

demo: install
	$(BIN)/python -m experiments.compare

# A stamp of its own, so that only the first build needs the network. What it imports of the code is already there.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: install
	$(BIN)/python -m experiments.benchmark $(BENCH_ARGS)
	$(BIN)/python -m experiments.tracing $(filter --quick,$(BENCH_ARGS))
	$(BIN)/python -m experiments.epochs $(filter --quick,$(BENCH_ARGS))

# Without the virtual environment: JAX for CUDA is where PYTHON is.
gpu:
	PYTHONPATH=. $(PYTHON) -m experiments.gpu $(GPU_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: install
	$(BIN)/$(PYTEST) -m slow $(PYTEST_ARGS)

# Without the compilation cache: this JAX complains of every entry that it reads.
test-floor: $(FLOOR)/.installed
	JAX_ENABLE_COMPILATION_CACHE=false $(FLOOR)/bin/$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# What `pip install` brings today. Newer versions are looked for each time.
test-newest:
	$(call install,$(NEWEST),--upgrade --upgrade-strategy eager)
	$(NEWEST)/bin/python -m pip list | grep -i -E '^(jax|jaxlib|flax|optax) '
	$(NEWEST)/bin/$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# The wheel is built from the sdist, so both are whole; the script runs where no file of the checkout can be imported.
# Without a network, pip takes packages from a folder: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER make wheel-test.
wheel-test: install
	rm -rf $(WHEEL)
	$(BIN)/python -m build --outdir $(WHEEL) .
	$(BIN)/python -m tests.release contents $(WHEEL)
	$(BIN)/python -m twine check --strict $(WHEEL)/*.whl $(WHEEL)/*.tar.gz
	$(call use_wheel,)
	mkdir $(WHEEL)/sdist
	tar -xzf $(WHEEL)/*.tar.gz -C $(WHEEL)/sdist --strip-components 1
	cd $(WHEEL)/sdist && PYTHONPATH=. $(CURDIR)/$(BIN)/$(PYTEST) -q $(SDIST_TESTS)

# $(1): an extra, or nothing. Each has an environment of its own, so that none gets by with what another brings.
define use_wheel
	rm -rf $(WHEEL)/venv
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"lrules$(addsuffix ],$(addprefix [,$(1))) @ file://$$(ls $(CURDIR)/$(WHEEL)/*.whl)"
	$(WHEEL)/venv/bin/python -m pip check
	$(WHEEL)/venv/bin/python -I tests/wheel.py $(1)
endef

# Nothing is uploaded: that is for a person to do, with what lies in $(WHEEL) then.
release: install
	$(BIN)/python -m tests.release versions
	$(MAKE) wheel-test
	$(foreach extra,$(EXTRAS),$(MAKE) use-extra EXTRA=$(extra) &&) true
	rm -rf $(WHEEL)/venv $(WHEEL)/sdist
	@echo "ready, and not uploaded:" $(WHEEL)/*

use-extra:
	$(call use_wheel,$(EXTRA))

# Changes operators of one file, on a copy, and shows what its tests do not notice: see tests/mutate.py.
mutate: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutation]'
	$(BIN)/python -m tests.mutate $(MODULE) --sample $(SAMPLE)

clean:
	rm -rf $(VENV) $(FLOOR) $(NEWEST) $(WHEEL) docs/_build docs/papers .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find lrules tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
