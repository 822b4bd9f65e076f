# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the compiled extension, or the reference in plain torch.

Where the extension does not load, a warning says why and the reference runs; with
ISS_KERNELS_REQUIRE=1 in the environment that is an ImportError.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch  # first: the extension links to its libraries

from iss_kernels.cores import quota

BACKENDS = ("extension", "reference")

# Written by setup.py beside the extension: a file, because an extension built for another torch
# may not load and so cannot say it.
_RECORD = Path(__file__).with_name("_C.torch_version")


def _torch_at_build() -> str:
    """The version of torch that the extension was built for, "unknown" without a record."""
    return _RECORD.read_text().strip() if _RECORD.exists() else "unknown"


def _minor(version: str) -> list[str]:
    """["2", "13"] for "2.13.0+cpu"; torch's C++ interface may change with either number."""
    return version.split(".")[:2]


def _load() -> tuple[Any, str]:
    """The compiled module and "", or None and why it cannot be used."""
    built, here = _torch_at_build(), str(torch.__version__)
    versions = "" if built in ("unknown", here) else f"it was built for torch {built}, not {here}"
    if versions and _minor(built) != _minor(here):
        return None, versions  # it might load, and then misread torch's objects
    try:
        return importlib.import_module("iss_kernels._C"), ""
    except ImportError as error:
        if "ISS_KERNELS_ISA" in str(error):
            raise  # it did load; what the environment asks for is not there
        return None, f"{error}; {versions}" if versions else str(error)


def _required() -> bool:
    """Whether the environment asks for an error where the extension does not load."""
    choice = os.environ.get("ISS_KERNELS_REQUIRE", "")
    if choice not in ("", "0", "1"):
        raise ImportError(f"ISS_KERNELS_REQUIRE: expected 0, 1 or unset, got {choice!r}")
    return choice == "1"


_C, _why_not = _load()
_backend = "extension" if _C is not None else "reference"
_remedy = "to build it: pip install --no-build-isolation . in its source directory"
if _required() and _C is None:
    raise ImportError(f"iss_kernels: the extension did not load ({_why_not}); {_remedy}")
if _C is None:
    warnings.warn(
        "iss_kernels runs in plain torch, slowly: its extension did not load "
        f"({_why_not}); {_remedy}",
        stacklevel=2,
    )
if _C is not None and (_quota := quota()) < float("inf"):
    # Rounded down: threads that use up a quota early stand still for the rest of its period.
    _C.limit_cores(max(1, int(_quota)))


# What runs now, where torch.compile can read it.
_isa: str = _C.isa() if _C is not None else ""


def is_built() -> bool:
    """Whether the compiled extension is loaded."""
    return _C is not None


def native() -> Any:
    """The compiled module, for what is not an op (prepare, Stream); None where it did not load."""
    return _C


def nobody_watches() -> bool:
    """Whether no transform (compile, trace, vmap, a mode) follows what reads a tensor's values."""
    if torch.compiler.is_compiling() or _C is None:
        return False
    return bool(_C.nobody_watches())


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 on the CPU take instructions of their own: the faster way."""
    return _backend == "extension" and _isa in (
        "amx", "avx512_bf16", "neon_bf16", "scalar_bf16",
    )  # fmt: skip


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """As torch.autocast(enabled=False), which "meta" has not."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def on_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels run for tensors of this device, when the extension does."""
    return device.type == "cuda"


def backend() -> str:
    """Name of the implementation that runs now: "extension" or "reference"."""
    return _backend


class use_backend:  # noqa: N801  (reads as a function; usable as a context manager like torch.set_grad_enabled)
    """Run everything through "extension" (compiled kernels) or "reference" (plain torch).

    Takes effect at once, for all threads of the process; as a context manager it restores the
    former backend on exit. Raises ValueError for another name and RuntimeError where the extension
    is not built.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"use_backend: expected name to be one of {BACKENDS}, got {name!r}")
        if name == "extension" and _C is None:
            raise RuntimeError(f"use_backend: the extension did not load: {_why_not}")
        self._name, self._formers = name, list[str]()
        self._before: str | None = _backend  # of the constructor, for the first entry
        _backend = name

    def __enter__(self) -> None:
        """The constructor has switched; who enters it again switches again."""
        global _backend
        self._formers.append(self._before or _backend)
        self._before, _backend = None, self._name

    def __exit__(self, *_: object) -> None:
        global _backend
        _backend = self._formers.pop()


# By cpu family and model: a virtual machine's processor is often named "AMD EPYC" alone.
_GENERATIONS = {("25", "17"): "Zen 4", ("26", "2"): "Zen 5", ("6", "143"): "Sapphire Rapids"}


def _cpu_name() -> str:
    """As the system names it, and the generation where it is known."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        name = fields["model name"]
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
    generation = _GENERATIONS.get((fields.get("cpu family", ""), fields.get("model", "")))
    return f"{name} ({generation})" if generation else name


def build_info() -> dict[str, Any]:
    """What was built, what runs, and where: version, backend, torch, CPU, threads, GPU, ISAs."""
    from iss_kernels import __version__

    compiled = _C.build_info() if _C is not None else {"extension": _why_not}
    return {
        "version": __version__,
        "backend": _backend,
        "torch": torch.__version__,
        "torch_at_build": _torch_at_build(),
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
        global _isa
        self._former, _isa = _C.set_isa(name), name

    def __enter__(self) -> None:
        """Nothing more to do: the constructor has switched."""

    def __exit__(self, *_: object) -> None:
        global _isa
        _C.set_isa(self._former)
        _isa = self._former


def supported_isas() -> list[str]:
    """ISAs that are built and that this CPU can run, best first; empty without the extension."""
    return list(_C.supported_isas()) if _C is not None else []


def exporting() -> bool:
    """Whether torch.export or torch.jit.trace follows the call, so that values are not known."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def exporting_onnx() -> bool:
    """Whether torch.onnx.export follows the call, by either of its two ways."""
    return exporting() and torch.onnx.is_in_onnx_export()


def refuse_script(module: torch.nn.Module) -> NoReturn:
    """What torch.jit.script gets where it asks a module for one that it can compile."""
    raise RuntimeError(
        f"torch.jit.script: expected modules that it can compile, got {type(module).__name__}; "
        "torch.jit.trace takes it, and to_torch() gives torch's module where there is one"
    )
