# SPDX-License-Identifier: Apache-2.0
"""PreparedLinear: an nn.Linear for inference, whose weight is packed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iss_kernels import backend
from iss_kernels.stored import NO_GRADIENT, Snapshot, dtype_name

_OWN = vars(nn.Linear(1, 1, device="meta")).keys()  # attributes


def is_plain_linear(module: Any) -> bool:
    """Whether a module is an nn.Linear that computes what its class does, from real weights."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    rows, columns = module.out_features, module.in_features
    return (
        set(module._parameters) == {"weight", "bias"}
        and not (module._buffers or module._modules)
        and type(weight) is nn.Parameter
        and type(bias) in (nn.Parameter, type(None))
        and weight.shape == (rows, columns)
        and weight.numel() > 0
        and (bias is None or bias.shape == (rows,))
        and all(t is None or t.layout == torch.strided for t in (weight, bias))
        and all(t is None or t.is_floating_point() for t in (weight, bias))
        and not any(
            hasattr(PreparedLinear, name) or name in Snapshot.__annotations__
            for name in vars(module).keys() - _OWN
        )
    )


class PreparedLinear(Snapshot):
    """An nn.Linear for inference alone; `prepare` makes one.

    Input [..., in_features] -> output [..., out_features]. Weights are held as `Snapshot` says, and
    `weight` gives the values that they stand for, in the model's dtype. Sums and output are
    float32; an input of another floating dtype is converted, as is what comes back; autocast
    changes nothing. Rows of the input are rounded to bfloat16 where the CPU multiplies that. With
    int8 they are quantised, each to the range of its largest element: to 8 bits (7 on AVX2), or to
    two such terms where the elements differ widely in size. On a CUDA device the input has the 16
    bits of the weight, and int8 is widened to float32, once.

    Raises RuntimeError where a gradient is asked for, and what nn.Linear raises.
    """

    def __init__(self, module: nn.Linear, weights: str) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.register_buffer("bias", None)
        self._take(module, [n for n, p in module._parameters.items() if p is not None], weights)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features] in the model's dtype."""
        return self._weight("weight", self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear.forward."""
        if self._native is not None and not torch.compiler.is_compiling():
            y = self._run(input)
            if y is not None:
                return y
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError(NO_GRADIENT.format("PreparedLinear"))
        if not input.is_floating_point():
            raise RuntimeError(
                f"PreparedLinear: expected an input of a floating dtype, got {dtype_name(input)}"
            )
        x = input.float()
        if self.native() is not None and not backend.exporting_onnx():
            y = self._run(x)
            if y is not None:
                return y.to(input.dtype)
        dtype = self._dtype_on(x.device)
        bias = self._buffer("bias") if "bias" in self._expected else None
        with backend.no_autocast(x.device):
            bias = None if bias is None else bias.to(dtype)
            y = F.linear(x.to(dtype), self._weight("weight", dtype), bias)
        return y.to(input.dtype)

    def _run(self, x: Tensor) -> Tensor | None:
        """By the packed weight; None for an input that torch is to take."""
        if backend.backend() != "extension":
            return None
        return self._native.run(x, self._buffers)  # type: ignore[no-any-return]

    def _compiled(self, value: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
        return backend.native().Linear(
            value["weight"], value.get("weight_scale"), value.get("bias"), buffers
        )

    def extra_repr(self) -> str:
        """torch's line, and the format."""
        bias = "bias" in self._expected
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            + super().extra_repr()
        )
