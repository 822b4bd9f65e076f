# SPDX-License-Identifier: Apache-2.0
"""Builds the one extension, iss_kernels._C: CPU kernels always, CUDA ones where they can be.

ISS_KERNELS_CUDA=0|1 turns CUDA off or demands it; unset, it is built when torch is a CUDA build and
nvcc is found (no GPU is needed to build). ISS_KERNELS_DEBUG=1 builds without optimisation.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "iss_kernels: the extension is built against the torch it will run with, and torch is not "
        "installed here: pip install 'torch>=2.10', then pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
DEBUG = os.environ.get("ISS_KERNELS_DEBUG") == "1"


def cuda_enabled() -> bool:
    choice = os.environ.get("ISS_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"iss_kernels: expected ISS_KERNELS_CUDA to be 0, 1 or unset, got {choice!r}")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "1" and not possible:
        sys.exit("iss_kernels: ISS_KERNELS_CUDA=1 needs a CUDA build of torch and nvcc; not found")
    return choice != "0" and possible


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for glob in patterns for p in ROOT.glob(glob))


class Build(BuildExtension):
    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            sys.exit(
                f"iss_kernels: no C++ compiler: '{compiler}' is not on the PATH; install one "
                "(Debian: apt install g++; macOS: xcode-select --install) or set CXX"
            )
        super().run()


cuda = cuda_enabled()
PLANNER = "csrc/cuda/plan.cpp"
# Never -march or -mavx2: code for one instruction set sits in target regions (csrc/README.md), and
# FMA is used only where it is written (-ffp-contract=off), so every ISA computes what is read.
cxx = ["-std=c++20", "-O0" if DEBUG else "-O3", "-g1", "-ffp-contract=off", "-fvisibility=hidden"]
cxx += ["-falign-loops=64"]  # up to 8 % of a small matmul, where two threads share a core
# at::parallel_for is a plain loop in code that is compiled without OpenMP.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
cxx += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
extension = (CUDAExtension if cuda else CppExtension)(
    name="iss_kernels._C",
    # The planner is always there: it can be asked about any GPU (iss_kernels.explain_plan).
    sources=sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.c*" if cuda else PLANNER),
    include_dirs=[str(ROOT / "csrc")],
    define_macros=[("ISS_WITH_CUDA", "1")] if cuda else [],
    extra_compile_args={"cxx": [*cxx, *openmp], "nvcc": ["-std=c++20", "-O3", "-lineinfo"]},
    extra_link_args=openmp,
)
# Objects of the two kinds of build are kept apart, so that each is compiled once.
options = {"build": {"build_base": "build/cuda"}} if cuda else {}
setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options=options)
