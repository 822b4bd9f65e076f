# Every target sets up what it needs in one shared .venv; all it asks of the machine is Python 3.10+
# and a C++ compiler. `make demo ARGS="--quick"` passes arguments on.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
BIN    := .venv/bin

# pip's own build isolation would download torch again: the build requirements are installed here.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

# The CUDA build has an environment of its own, with torch's CUDA build (5.5 GB). It asks for nvcc,
# not for a GPU. The package is installed there, not used in place, where the _C of .venv is.
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCHS ?= $(shell sed -n 's/^CUDA_ARCHS[^"]*"\([^"]*\)".*/\1/p' setup.py)
CUDA_BIN   := .venv-cuda/bin
CUDA_PIP   := $(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check
CUDA_SOURCES := $(SOURCES) $(shell find csrc iss_kernels -name '*.cu' -o -name '*.py')

DIST := build/dist
define DIST_CHECK
import torch, iss_kernels as iss
assert "build/dist/site" in iss.__file__ and "build/dist/site" in iss.backend.native().__file__
lstm = torch.nn.LSTM(8, 16)
x = torch.randn(5, 2, 8)
torch.testing.assert_close(iss.ISSLSTM.from_torch(lstm)(x)[0], lstm(x)[0])
print("works from its wheel:", iss.__version__, "for torch", iss.build_info()["torch_at_build"])
endef
export DIST_CHECK

.PHONY: build demo test test-models bench dist lint format clean build-cuda test-gpu bench-gpu
build: .venv/built
demo: .venv/demo
	$(BIN)/python -m iss_kernels demo $(ARGS)
test: .venv/test
	$(BIN)/python -m pytest $(ARGS)
# Models that others published, with their weights; without what the packages read audio files with.
# And the training loops of Lightning and Accelerate, and TorchRL's modules.
test-models: .venv/test
	$(PIP) --no-deps silero-vad==6.2.3 uzmorph-nn==0.1.0 g2p-fa==1.1.0 Resemblyzer==0.1.4
	$(PIP) pytorch-lightning==2.6.6 accelerate==1.15.0 torchrl==0.14.1
	$(BIN)/python -m pytest python_tests/test_models.py python_tests/test_frameworks.py -rs $(ARGS)
bench: .venv/bench
	$(BIN)/python -m iss_kernels bench $(ARGS)
# The sdist, and the wheel that a user's pip makes of it, tried where no source is near.
dist: .venv/built
	rm -rf $(DIST)
	$(BIN)/python setup.py --quiet sdist --dist-dir $(DIST)
	$(BIN)/python -m pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir $(DIST) $(DIST)/*.tar.gz
	$(PIP) --no-index --no-deps --target $(DIST)/site $(DIST)/*.whl
	cd $(DIST) && PYTHONPATH=site ISS_KERNELS_REQUIRE=1 $(abspath $(BIN))/python -c "$$DIST_CHECK"
build-cuda: .venv-cuda/built
	cd .venv-cuda && bin/python -c 'import iss_kernels as iss; print(*iss.build_info().items(), sep="\n")'
test-gpu: .venv-cuda/built
	$(CUDA_PIP) expecttest hypothesis 'pytest>=8'
	$(CUDA_BIN)/pytest python_tests/test_cuda_*.py -m gpu -rs $(ARGS)
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck synccheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(CUDA_BIN)/pytest python_tests/test_cuda_*.py -m gpu -k sanitizer || exit 1; \
	  done; \
	else echo "compute-sanitizer is not on the PATH: left out"; fi
bench-gpu: .venv-cuda/built
	$(CUDA_PIP) 'matplotlib>=3.8'
	$(CUDA_BIN)/python bench/bench_cuda.py $(ARGS)
lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc python_tests -name "*.cpp" -o -name "*.cu" -o -name "*.h" | xargs $(BIN)/clang-format --dry-run --Werror
format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc python_tests -name "*.cpp" -o -name "*.cu" -o -name "*.h" | xargs $(BIN)/clang-format -i
clean:
	rm -rf .venv .venv-cuda build *.egg-info iss_kernels/_C.*

.venv/torch:
	@command -v $(PYTHON) >/dev/null || { echo "iss_kernels: no $(PYTHON) on the PATH; install Python 3.10 or newer" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)' 'numpy>=1.26' 'setuptools>=77' ninja
	@touch $@
.venv/built: .venv/torch $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "iss_kernels: no C++ compiler ($${CXX:-c++}) on the PATH; install one (Debian: apt install g++) or set CXX" >&2; exit 1; }
	$(PIP) --no-build-isolation --editable .
	@touch $@
# An extra of pyproject.toml, from what the installed package says of it: to install the package with
# an extra would compile it again.
.venv/demo .venv/test .venv/bench .venv/dev .venv/cuda .venv/examples: .venv/built
	$(BIN)/python -c 'from importlib.metadata import requires; \
	  print(*(r.split(";")[0] for r in requires("iss_kernels") if "$(@F)" in r.split("extra ==")[-1]), sep="\n")' > $@.txt
	$(PIP) -r $@.txt
	@touch $@
.venv-cuda/built: $(CUDA_SOURCES)
	@command -v nvcc >/dev/null || { echo "iss_kernels: no nvcc on the PATH; install the CUDA toolkit of torch's version" >&2; exit 1; }
	@[ -x $(CUDA_BIN)/python ] || $(PYTHON) -m venv .venv-cuda
	$(CUDA_PIP) '$(CUDA_TORCH)' 'numpy>=1.26' 'safetensors>=0.7' 'setuptools>=77' ninja
	@# What is on the PATH may be a link or a script: nvcc itself knows where its toolkit is.
	CUDA_HOME=$${CUDA_HOME:-$$(echo | nvcc --dryrun -x cu - -c -o /dev/null 2>&1 | sed -n 's/.* TOP=//p')} \
	  ISS_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" $(CUDA_PIP) --no-build-isolation --no-deps .
	@touch $@
