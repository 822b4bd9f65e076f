# SPDX-License-Identifier: Apache-2.0
"""explain_plan: how the kernels run a recurrent layer on some device, and why; no GPU needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from iss_kernels import backend
from iss_kernels.cells import CELLS

# (major, minor), multiprocessors, bytes of shared memory that a block can ask for.
_GPUS = {
    "A100": (8, 0, 108, 163 * 1024),
    "L40S": (8, 9, 142, 99 * 1024),
    "RTX 4090": (8, 9, 128, 99 * 1024),
    "H100": (9, 0, 132, 227 * 1024),
    "H200": (9, 0, 132, 227 * 1024),
    "B200": (10, 0, 148, 227 * 1024),
    "RTX 5090": (12, 0, 170, 99 * 1024),
}


@dataclass(frozen=True)
class Plan:
    """How the steps of one recurrent layer run on a GPU.

    A group of `blocks` thread blocks runs `rows` rows of the batch at a time, for all steps; each
    block owns `units` units and keeps their recurrent weights in `shared_bytes` of shared memory.
    `groups` of them are resident at once. tier: what the blocks of a group exchange h through,
    "block" (one block: its own shared memory), "cluster" (distributed shared memory), "grid" (L2).
    Or nothing is resident: "steps", a GEMM and a pointwise kernel per step, and "one step", a
    single launch for a sequence of one step. why: one sentence.
    """

    tier: str
    units: int
    blocks: int
    rows: int
    groups: int
    threads: int
    shared_bytes: int
    why: str

    def __str__(self) -> str:
        if self.blocks == 0:
            return f"{self.tier}: {self.why}"
        return (
            f"{self.tier}: {self.groups} groups at once, each for {self.rows} rows of the batch, "
            f"{self.threads} threads in a block; {self.why}"
        )


@dataclass(frozen=True)
class CpuPlan:
    """How threads divide a call on the CPU.

    split: what each of `threads` threads takes: "rows" of the batch through all layers and steps,
    "units" of every cell, meeting the others after each step, "directions", or "layers", each
    following the one below from chunk to chunk. isa: the instruction set of the kernels. products:
    what is multiplied, and what it is summed in. why: one sentence. Threads that have no core of
    their own are counted on for less while the call runs.
    """

    split: str
    threads: int
    isa: str
    products: str
    why: str

    def __str__(self) -> str:
        how = f"({self.isa}; products in {self.products})"
        if self.threads == 1:
            return f"one thread {how}: {self.why}"
        return f"{self.threads} threads {how} divide the {self.split}: {self.why}"


def explain_plan(
    hidden_size: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool = False,
    proj_size: int = 0,
    steps: int | None = None,
    tf32: bool | None = None,
    device: str | torch.device | Sequence[int] | None = None,
    cell: str = "lstm",
    input_size: int | None = None,
    num_layers: int | None = None,
    bidirectional: bool | None = None,
    depth: int | None = None,
    threads: int | None = None,
) -> Plan | CpuPlan:
    """The `Plan` of a layer, or on the CPU the `CpuPlan` of a stack; print it.

    cell: "lstm", "gru", "rnn_tanh", "rnn_relu", or on the CPU "rhn" or "rhn_carry" of `depth`
    micro-steps (10 by default). With device="cpu" alone: input_size (hidden_size by default),
    num_layers (1), bidirectional (False), and threads (torch.get_num_threads(), all of them free);
    steps: None stands for 35 there.
    device: a CUDA device of this machine, the name of a GPU ("A100", "L40S", "RTX 4090", "H100",
    "H200", "B200", "RTX 5090"), or (major, minor, multiprocessors, shared memory bytes per block);
    by default the current CUDA device, or an H100 where there is none. How many clusters it holds
    at once is asked of a CUDA device, otherwise estimated. steps: of the sequence; None: many, so
    that it does not matter how long filling shared memory takes. tf32: whether float32 may use it;
    by default as torch.backends.cuda.matmul says. Raises ValueError for other arguments,
    RuntimeError without the extension.
    """
    native = backend.native()
    if native is None:
        raise RuntimeError("explain_plan: expected the compiled extension, got plain torch")
    for name, value, least in (
        ("hidden_size", hidden_size, 1),
        ("batch_size", batch_size, 1),
        ("proj_size", proj_size, 0),
        ("steps", 1 if steps is None else steps, 1),
        ("input_size", 1 if input_size is None else input_size, 1),
        ("num_layers", 1 if num_layers is None else num_layers, 1),
        ("depth", 1 if depth is None else depth, 1),
        ("threads", 1 if threads is None else threads, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(
                f"explain_plan: expected {name} to be an int from {least}, got {value!r}"
            )
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(
            "explain_plan: expected dtype float32, float64, bfloat16 or float16, "
            f"got {str(dtype).removeprefix('torch.')}"
        )
    if cell not in CELLS:
        raise ValueError(
            f"explain_plan: expected cell to be one of {', '.join(CELLS)}, got {cell!r}"
        )
    of = CELLS[cell]
    if proj_size > 0 and not of.projects:
        raise ValueError(f"explain_plan: expected proj_size 0 for {cell}, got {proj_size}")
    if depth is not None and not of.deep:
        raise ValueError(f"explain_plan: expected depth with an rhn, got {depth} for {cell}")
    if str(device) == "cpu":
        if tf32 is not None:
            raise ValueError(f"explain_plan: expected tf32 for a GPU, got {tf32} for the cpu")
        num_layers, depth = num_layers or 1, depth or 10
        outputs = proj_size or hidden_size
        directions = 2 if bidirectional else 1
        inputs = [input_size or hidden_size] + [outputs * directions] * (num_layers - 1)
        sizes = [
            (of.gates, i, hidden_size, outputs, proj_size > 0, depth if of.deep else 1)
            for i in inputs
            for _ in range(directions)
        ]
        found = native.plan_cpu(
            sizes, directions, steps or 35, batch_size, dtype, backward,
            threads or torch.get_num_threads(),
        )  # fmt: skip
        return CpuPlan(**found)
    if of.deep:
        raise ValueError(
            f"explain_plan: expected device to be cpu for {cell}, which takes a GEMM and a kernel "
            f"for each micro-step on every GPU, got {device!r}"
        )
    of_cpu = {"input_size": input_size, "num_layers": num_layers,
              "bidirectional": bidirectional, "threads": threads}  # fmt: skip
    for name, given in of_cpu.items():
        if given is not None:
            raise ValueError(
                f"explain_plan: expected {name} with device='cpu', got {given} for {device!r}"
            )
    if tf32 is None:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    limits = _limits(native, device)
    return Plan(
        **native.plan(
            of.gates, hidden_size, batch_size, dtype, tf32, proj_size > 0, backward, steps, limits
        )
    )


def _limits(native: Any, device: str | torch.device | Sequence[int] | None) -> Any:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "H100"
    if isinstance(device, str) and device in _GPUS:
        return native.DeviceLimits(*_GPUS[device])
    if not isinstance(device, (str, torch.device)):
        values = tuple(device) if isinstance(device, Sequence) else ()
        if len(values) == 4 and all(type(v) is int and v >= 0 for v in values):
            return native.DeviceLimits(*values)
    elif str(device).startswith("cuda") and torch.cuda.is_available():
        if native.build_info()["cuda_built"]:  # what the ops are told
            index = torch.device(device).index
            return native.device_limits(torch.cuda.current_device() if index is None else index)
        found = torch.cuda.get_device_properties(device)
        return native.DeviceLimits(
            found.major,
            found.minor,
            found.multi_processor_count,
            found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        )
    raise ValueError(
        f"explain_plan: expected device to be a CUDA device of this machine, one of "
        f"{', '.join(_GPUS)}, or 4 ints (major, minor, multiprocessors, shared bytes), "
        f"got {device!r}"
    )
