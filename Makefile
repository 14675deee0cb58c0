# `make help` lists the targets. Python does the work: .ci/install.py makes the environment, once per change of its inputs.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

# `make test VENV=` uses $(PYTHON) as it is and installs nothing: for a machine whose Python already has torch.
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)/kernels:$(CURDIR)
INSTALL = @:
else
PY := $(VENV)/bin/python
INSTALL = @command -v $(PYTHON) >/dev/null || { \
	echo "install: no $(PYTHON) here; Python >= 3.10 is needed"; \
	echo "  -> sudo apt install python3 python3-venv"; exit 1; }; \
	$(PYTHON) .ci/install.py --venv $(VENV)
endif

# The native library: compiles what has changed, and says what it builds and why. Where there is no compiler it says so,
# and everything runs without it.
BUILD = $(PY) csrc/build.py

# One thread per test process: the processes share the cores. Without pytest-xdist the tests run one after another.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest \
	$$($(PY) -c "import xdist" 2>/dev/null && echo "-n $(JOBS) --dist worksteal")
# In such a process only tests of Triton kernels run, on CPU tensors (tests/conftest.py).
INTERPRETING = TRITON_INTERPRET=1 $(PYTEST)
# Where `make test-full` finds another version of Triton than the installed one.
NEWEST = $(abspath $(VENV))/newest-triton
# Another version of PyTorch, and the tests of the native library, which is one file for all versions.
OLDEST = $(abspath $(VENV))/oldest-torch
NATIVE_TESTS = $(wildcard tests/test_native.py tests/test_cpu_attention.py tests/test_cpu_tubelet.py)
IS_LOADED = "import torch; from vivit_kernels import _native; assert _native.AVAILABLE, _native.WHY; \
	print('native tests with torch', torch.__version__)"
SANITIZED = build/native/sanitized
# pytest answers 5 when it finds no test of the kind asked for; that is not a failure
NONE_IS_FINE = || [ $$? -eq 5 ]
# Kernels as the host simulator compiles them, but for those of float16, which are of the same text as bfloat16's. Left
# out: linkage, as a kernel's header is all of its source; products of two 32-bit numbers as offsets, which are in bounds
# and cheap.
CUDA_SOURCES = $(filter-out %_f16.cu,$(sort $(wildcard csrc/cuda/*.cu)))
TIDY_OFF = --checks=-misc-use-internal-linkage,-bugprone-implicit-widening-of-multiplication-result
CPP = $(shell git ls-files '*.cu' '*.cuh' '*.cpp' '*.h')

.PHONY: help venv build demo test test-full test-kernels test-newest-triton test-oldest-torch sanitize test-gpu bench \
	hub cuda-gate check clean for-build for-demo for-test for-check

help:
	@echo "make demo       create $(VENV), install, run the main job on real video, print where the results are"
	@echo "make test       create $(VENV) if needed, install, run the tests (a quarter of an hour on 2 cores)"
	@echo "make test-full  every test but interpreted grids and GPU tests, and ratios of times (most of an hour on 2 cores)"
	@echo "make test-kernels every interpreted test of Triton kernels (20 minutes), and with the newest Triton"
	@echo "make test-gpu   the tests that need an NVIDIA GPU"
	@echo "make build      the native library (csrc/), again only what has changed"
	@echo "make hub        build/hub: the package as Hugging Face's kernels load it (docs/building.md)"
	@echo "make sanitize   the native library's tests with ASan and UBSan"
	@echo "make cuda-gate  what the library's CUDA kernels were compiled to: registers, opcodes; no GPU is needed"
	@echo "make bench      the operations beside what others run, in two minutes (more: python -m bench --help)"
	@echo "make check      ruff, pyright, clang-format, clang-tidy"
	@echo "make venv       only create $(VENV) and install what all of these need"
	@echo "make clean      remove build products and caches; $(VENV) and runs/ stay"
	@echo
	@echo "PYTHON=python3.12   the Python to create $(VENV) with (now: $(PYTHON))"
	@echo "VENV=               use \$$(PYTHON) itself, install nothing: it already has torch and the test tools"
	@echo "JOBS=2              test processes"
	@echo "VIVIT_CUDA=0|1      install for a machine without / with an NVIDIA GPU, whatever is found here"
	@echo "VIVIT_KERNELS_BUILD=auto|cuda|cpu|none  the native library (docs/building.md)"
	@echo "VIVIT_TORCH_INDEX=  another index of CPU builds of torch"

venv: for-check

for-build for-demo for-test for-check:
	$(INSTALL) $(@:for-%=%)

build: for-build
	@$(BUILD)

hub: for-build
	@$(BUILD)
	@$(PY) .ci/hub.py

demo: for-demo
	@$(BUILD)
	$(PY) -m vivit demo

test: for-test
	@$(BUILD)
	$(PYTEST) $(NONE_IS_FINE)
	$(INTERPRETING) $(NONE_IS_FINE)

test-full: for-test
	@$(BUILD)
	$(PYTEST) -m "not gpu" $(NONE_IS_FINE)
	OMP_NUM_THREADS=1 $(PY) -m pytest bench -q -k test_ratio
	@$(MAKE) --no-print-directory test-oldest-torch

# The library as it is built for the installed PyTorch, loaded and tested under the oldest one that it is for, and the
# override of PyTorch's attention, which hangs on its internals.
test-oldest-torch: for-test
	@$(BUILD)
	@if ! $(PY) -c $(IS_LOADED); then \
		echo "LEFT OUT: the tests of the native library under the oldest PyTorch: there is no library, see above"; \
	elif [ -n "$(strip $(VENV))" ] && $(PYTHON) .ci/install.py oldest-torch --venv $(VENV); then \
		export PYTHONPATH=$(OLDEST)$(if $(PYTHONPATH),:$(PYTHONPATH)); \
		$(PY) -c $(IS_LOADED) && \
		$(PYTEST) $(NATIVE_TESTS) tests/test_sdpa_override.py; \
	else \
		echo "LEFT OUT: the tests of the native library under the oldest PyTorch, which is not here"; \
	fi

# Leaks are not looked for: PyTorch and Python keep what they have until the process ends.
sanitize: for-test
	@$(BUILD) --sanitize
	@rm -f $(SANITIZED)/finding.*; \
	export VIVIT_KERNELS_LIBRARY=$(CURDIR)/$(SANITIZED)/_C.so; \
	export ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/$(SANITIZED)/finding; \
	export UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(SANITIZED)/finding; \
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	$(PY) -c $(IS_LOADED) && $(PYTEST) $(NATIVE_TESTS); failed=$$?; unset LD_PRELOAD; \
	for finding in $(SANITIZED)/finding.*; do [ ! -f $$finding ] || { failed=1; head -n 12 $$finding; }; done; \
	exit $$failed

# Every interpreted test of Triton kernels (20 minutes or more: a case takes seconds), and those of `make test` once
# more with the newest Triton.
test-kernels: for-test
	$(INTERPRETING) -m "not gpu" $(NONE_IS_FINE)
	@if [ -n "$(strip $(VENV))" ] && $(PYTHON) .ci/install.py newest-triton --venv $(VENV); then \
		$(MAKE) --no-print-directory test-newest-triton; \
	else \
		echo "LEFT OUT: the tests of Triton kernels with the newest Triton, which is not here"; \
	fi

# Of Triton kernels what `make test` interprets, and all that `make test-full` compiles.
test-newest-triton: export PYTHONPATH := $(NEWEST)$(if $(PYTHONPATH),:$(PYTHONPATH))
test-newest-triton:
	@$(PY) -c "import triton; print('Triton', triton.__version__, 'from', triton.__file__)"
	$(INTERPRETING) $(NONE_IS_FINE)
	$(PYTEST) -m "not gpu" tests/test_triton_gate.py $(NONE_IS_FINE)

bench: for-test
	@$(BUILD)
	$(PY) -m bench --quick

# tests/test_cuda_gate.py judges the same in `make test-full`, without the table.
cuda-gate: for-test
	@$(BUILD)
	$(PY) -m bench cuda_gate

test-gpu: for-test
	@$(BUILD)
	$(PY) -m pytest -m gpu $(NONE_IS_FINE)

check: for-check
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"
	$(if $(CPP),$(if $(VENV),$(VENV)/bin/)clang-format --dry-run -Werror $(CPP))
	$(BUILD) --tidy
	$(if $(CPP),$(if $(VENV),$(VENV)/bin/)clang-tidy --quiet $(TIDY_OFF) $(CUDA_SOURCES) -- -x c++ -std=c++17 -Wall -Wextra \
		-Wno-unknown-pragmas -DVIVIT_SIM -Itests -Icsrc -Icsrc/cuda)

clean:
	rm -rf build dist kernels/vivit_kernels/_C.* *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache .benchmarks
	find kernels vivit bench tests .ci -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
