# Every target sets up what it needs in one shared .venv; all it asks of the machine is Python 3.10+
# and a C++ compiler. `make demo ARGS="--quick"` passes arguments on.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
BIN    := .venv/bin

# pip's own build isolation would download torch again: the build requirements are installed here.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: build demo test bench lint format clean
build: .venv/built
demo: .venv/demo
	$(BIN)/python -m iss_kernels demo $(ARGS)
test: .venv/test
	$(BIN)/python -m pytest $(ARGS)
bench: .venv/bench
	$(BIN)/python -m iss_kernels bench $(ARGS)
lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc python_tests -name "*.cpp" -o -name "*.h" | xargs $(BIN)/clang-format --dry-run --Werror
format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc python_tests -name "*.cpp" -o -name "*.h" | xargs $(BIN)/clang-format -i
clean:
	rm -rf .venv build *.egg-info iss_kernels/_C*.so

.venv/torch:
	@command -v $(PYTHON) >/dev/null || { echo "iss_kernels: no $(PYTHON) on the PATH; install Python 3.10 or newer" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)' 'numpy>=1.26' 'setuptools>=77' ninja
	@touch $@
.venv/built: .venv/torch $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "iss_kernels: no C++ compiler ($${CXX:-c++}) on the PATH; install one (Debian: apt install g++) or set CXX" >&2; exit 1; }
	$(PIP) --no-build-isolation --editable .
	@touch $@
# An extra of pyproject.toml; what is built already is not compiled again.
.venv/demo .venv/test .venv/bench .venv/dev: .venv/built
	$(PIP) --no-build-isolation --editable '.[$(@F)]'
	@touch $@
