# SPDX-License-Identifier: Apache-2.0
"""Builds the one extension, iss_kernels._C: CPU kernels always, CUDA ones where they can be.

ISS_KERNELS_CUDA=0|1 turns CUDA off or demands it; unset, it is built when torch is a CUDA build and
nvcc is found (no GPU is needed to build). TORCH_CUDA_ARCH_LIST chooses the GPUs to build for;
unset, they are those of this machine, or CUDA_ARCHS where it has none. ISS_KERNELS_DEBUG=1 builds
without optimisation.
"""

import os
import re
import shutil
import subprocess
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


# The GPU generations that the kernels have code paths for; PTX serves later ones.
CUDA_ARCHS, CUDA_ARCHS_NEED = "8.0;9.0a;10.0a;12.0+PTX", (12, 8)


def nvcc_version() -> tuple[int, ...] | None:
    """(13, 0) for nvcc 13.0; None where torch would find none."""
    if CUDA_HOME is None:
        return None
    try:
        command = [Path(CUDA_HOME, "bin", "nvcc"), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", said)
    return release and tuple(map(int, release.groups()))


def cuda_enabled() -> bool:
    """Whether to build the CUDA kernels; stops with one sentence where that must fail."""
    choice = os.environ.get("ISS_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"iss_kernels: expected ISS_KERNELS_CUDA to be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return False
    nvcc = nvcc_version()
    if torch.version.cuda is None or nvcc is None:
        if choice == "1":
            sys.exit(
                "iss_kernels: ISS_KERNELS_CUDA=1 needs a CUDA build of torch and nvcc; not found"
            )
        return False
    version = ".".join(map(str, nvcc))
    if str(nvcc[0]) != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"iss_kernels: expected nvcc of torch's CUDA {torch.version.cuda}, got {version} in "
            f"{CUDA_HOME}: set CUDA_HOME to a toolkit of that version, or ISS_KERNELS_CUDA=0 to "
            "build without CUDA kernels"
        )
    # Without a list torch builds for the GPUs it sees, and fails where it sees none.
    by_torch = os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "native")
    if by_torch and torch.cuda.device_count() == 0:
        if nvcc < CUDA_ARCHS_NEED:
            sys.exit(
                f"iss_kernels: expected nvcc 12.8 or newer to build for {CUDA_ARCHS}, got "
                f"{version}: set TORCH_CUDA_ARCH_LIST to the GPUs wanted, such as '8.0;9.0a'"
            )
        os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHS
    return True


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
        # What torch the extension is for: iss_kernels/backend.py compares it with the one it meets.
        record = Path(self.build_lib, "iss_kernels", "_C.torch_version")
        version = f"{torch.__version__}\n"
        if not record.exists() or record.read_text() != version:
            self.force = True
        super().run()
        for path in {record, Path(self.get_ext_fullpath(extension.name)).with_name(record.name)}:
            path.write_text(version)


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
    sources=sources("csrc/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.c*" if cuda else PLANNER),
    depends=sources("csrc/**/*.h"),
    include_dirs=[str(ROOT / "csrc")],
    define_macros=[("ISS_WITH_CUDA", "1")] if cuda else [],
    extra_compile_args={"cxx": [*cxx, *openmp], "nvcc": ["-std=c++20", "-O3", "-lineinfo"]},
    extra_link_args=openmp,
)
# Objects of the two kinds of build are kept apart, so that each is compiled once.
options = {"build": {"build_base": "build/cuda"}} if cuda else {}
setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options=options)
