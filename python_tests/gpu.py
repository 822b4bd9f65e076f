# SPDX-License-Identifier: Apache-2.0
"""The GPU of a test: an emulated one, whose tensors are on the CPU (csrc/simt), or a real one.

While an emulated one is in use, the package's own ops, and so all of its Python, run the CUDA
kernels. Either may be taken for a lesser GPU, so that every tier of the planner is had on any.
"""

import functools
import warnings
from contextlib import contextmanager

import simt
import torch

from iss_kernels import backend, explain_plan

H100 = (9, 0, 16, 227 * 1024)  # with few multiprocessors: a launch that fills it is still small


class Gpu:
    """kind: "simt", "check" (emulated, with every access checked) or "cuda"."""

    def __init__(self, kind):
        self.simulator = None
        if kind != "cuda":
            self.simulator = simt.simulator("check" if kind == "check" else "plain")
            self.pretend(None)
        self.device = torch.device("cuda" if self.simulator is None else "cpu")

    def to(self, value):
        """Tensors in dicts, lists and tuples, on the device; batch_sizes stay on the CPU."""
        if isinstance(value, dict):
            return {k: v if k == "batch_sizes" else self.to(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.to, value))
        return value.to(self.device) if torch.is_tensor(value) else value

    def pretend(self, limits):
        """Be another GPU, given as the device of `explain_plan`; None: itself again."""
        if self.simulator is None:
            backend.native().pretend_device(limits)
        else:
            self.simulator.pretend(*(limits or H100))

    @contextmanager
    def in_use(self, monkeypatch):
        """The package's ops are the emulated ones."""
        if self.simulator is None:
            yield self
        else:
            namespace = simt.NAMESPACES["check" if self.simulator.checked else "plain"]
            monkeypatch.setattr(backend, "on_cuda", lambda device: True)
            library = torch.library.Library("iss_kernels", "IMPL")
            ops = getattr(torch.ops, namespace)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of having replaced a kernel
                for name in names_of_ops():
                    op = getattr(ops, name).default
                    library.impl(name, functools.partial(_call, op), "CPU", allow_override=True)
            try:
                yield self
            finally:
                library._destroy()
        self.pretend(None)


def _call(op, *arguments):
    return op(*arguments)


def names_of_ops():
    """Of all ops of the package, from the dispatcher: none can be forgotten."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return sorted(name.split("::")[1] for name in names if name.startswith("iss_kernels::"))


@functools.cache
def limits_for(tier, hidden, batch, dtype, tf32=False, steps=None, cell="lstm"):
    """Limits that make the planner choose this tier, forward and backward; None if there are none.

    Less and less shared memory makes a layer take more and more blocks. "one step" is forward
    alone.
    """
    next_to_none = [(8, 0, 1, 0)]
    less_and_less = ((m, 0, 16, int(227 * 1024 * 0.9**n)) for m in (9, 8) for n in range(60))
    for limits in next_to_none if tier == "steps" else less_and_less:
        plans = [
            explain_plan(
                hidden,
                batch,
                dtype,
                backward=backward,
                steps=steps,
                tf32=tf32,
                device=limits,
                cell=cell,
            )
            for backward in ((False,) if tier == "one step" else (False, True))
        ]
        if all(plan.tier == tier for plan in plans):
            return limits
    return None
