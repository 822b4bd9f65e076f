# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the compiled extension, or the reference in plain torch."""

from __future__ import annotations

import importlib
import platform
import warnings
from pathlib import Path
from typing import Any

import torch  # first: the extension links to its libraries

BACKENDS = ("extension", "reference")

_C: Any = None
_why_not = ""
try:
    _C = importlib.import_module("iss_kernels._C")
except ImportError as error:
    _why_not = str(error)

_backend = "extension" if _C is not None else "reference"
if _C is None:
    warnings.warn(
        f"iss_kernels runs in plain torch, slowly: its extension did not load ({_why_not}). "
        "To build it: pip install --no-build-isolation . in its source directory",
        stacklevel=2,
    )


def is_built() -> bool:
    """Whether the compiled extension is loaded."""
    return _C is not None


def native() -> Any:
    """The compiled module, for what is not an op (prepare, Stream); None where it did not load."""
    return _C


def on_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels run for tensors of this device, when the extension does."""
    return device.type == "cuda"


def backend() -> str:
    """Name of the implementation that runs now: "extension" or "reference"."""
    return _backend


class use_backend:  # noqa: N801  (reads as a function; usable as a context manager like torch.set_grad_enabled)
    """Run everything through "extension" (compiled kernels) or "reference" (plain torch).

    Takes effect at once; as a context manager it restores the former backend on exit. Raises
    ValueError for another name and RuntimeError where the extension is not built.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"use_backend: expected name to be one of {BACKENDS}, got {name!r}")
        if name == "extension" and _C is None:
            raise RuntimeError(f"use_backend: the extension did not load: {_why_not}")
        self._former, _backend = _backend, name

    def __enter__(self) -> None:
        """Nothing more to do: the constructor has switched."""

    def __exit__(self, *_: object) -> None:
        global _backend
        _backend = self._former


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def build_info() -> dict[str, Any]:
    """What was built, what runs, and where: version, backend, torch, CPU, threads, GPU, ISAs."""
    from iss_kernels import __version__

    compiled = _C.build_info() if _C is not None else {"extension": _why_not}
    return {
        "version": __version__,
        "backend": _backend,
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **compiled,
    }


class use_isa:  # noqa: N801
    """Force one instruction set of the CPU kernels ("scalar", "avx2", ...), as tests do.

    A context manager like `use_backend`. The environment variable ISS_KERNELS_ISA does the same
    for a whole process. Raises ValueError for a name that is unknown or that this CPU lacks.
    """

    def __init__(self, name: str) -> None:
        if _C is None:
            raise RuntimeError(f"use_isa: the extension did not load: {_why_not}")
        self._former = _C.set_isa(name)

    def __enter__(self) -> None:
        """Nothing more to do: the constructor has switched."""

    def __exit__(self, *_: object) -> None:
        _C.set_isa(self._former)


def supported_isas() -> list[str]:
    """ISAs that are built and that this CPU can run, best first; empty without the extension."""
    return list(_C.supported_isas()) if _C is not None else []
