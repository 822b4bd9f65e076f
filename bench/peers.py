# SPDX-License-Identifier: Apache-2.0
"""The engines that are compared: each runs a stack of nn.LSTM, nn.GRU or nn.RNN as fast as it can.

An engine's `build` takes the layers, an input x [T, B, I] and the number of threads. It returns a
function without arguments whose result is y [T, B, H]. `build` of a streaming engine returns a
function that runs a single step [B, I], keeps its state and returns y [B, H]. An engine that cannot
run the layers raises Unavailable with the reason.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import iss_kernels

Layer: TypeAlias = nn.LSTM | nn.GRU | nn.RNN
Layers: TypeAlias = Sequence[Layer]
Call: TypeAlias = Callable[[], Any]
Build: TypeAlias = Callable[[Layers, Tensor, int], Call]

MODULES: dict[str, type[Layer]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}  # rows of a weight for each unit


class Unavailable(Exception):
    """An engine cannot take part."""


@dataclass(frozen=True)
class Engine:
    """tolerance: of the largest error against float64; packages: needed beyond torch."""

    build: Build
    weights: str = "float32"
    tolerance: float = 1e-4
    packages: tuple[str, ...] = ()
    ours: bool = False
    slow: bool = False  # left out of large problems

    @property
    def installed(self) -> bool:
        """Whether its packages are there."""
        return all(importlib.util.find_spec(name) is not None for name in self.packages)


# -- torch


class Stack(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, I] -> y: [T, B, H]."""
        for layer in self.layers:
            x = layer(x)[0]
        return x


def torch_layers(layers: Layers, x: Tensor, _: int) -> Call:
    """torch's modules as they come. nn.LSTM is oneDNN's where torch was built with it."""

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)[0]
        return y

    return run


def without_onednn(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call over torch's own LSTM. (nn.GRU and nn.RNN never use oneDNN.)

    The public torch.backends.mkldnn.flags does this too, but takes as long as a small LSTM.
    """
    switch = torch._C._set_mkldnn_enabled

    def run(*args: Any) -> Any:
        switch(False)
        try:
            return call(*args)
        finally:
            switch(True)

    return run


def torch_plain(layers: Layers, x: Tensor, threads: int) -> Call:
    """nn.LSTM without oneDNN, which is the faster one for few rows."""
    return without_onednn(torch_layers(layers, x, threads))


def torch_compiled(layers: Layers, x: Tensor, _: int) -> Call:
    """torch.compile of nn.LSTM, static shapes.

    Without allow_rnn dynamo leaves an nn.LSTM as it is. With allow_rnn and oneDNN, the layer
    becomes one call of oneDNN in the graph: the same kernel with another overhead. Without oneDNN,
    and for nn.GRU and nn.RNN, the steps are unrolled: 30 steps take longer to compile than is
    allowed here, and then run no faster.
    """
    import torch._dynamo

    torch._dynamo.reset()  # or the ninth shape is refused
    with torch._dynamo.config.patch(allow_rnn=True):
        call = functools.partial(torch.compile(Stack(layers), dynamic=False), x)
        start = time.perf_counter()
        try:
            call()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unavailable(f"cannot compile: {error}") from error
    if time.perf_counter() - start > 30:
        raise Unavailable("took more than 30 s to compile")
    return call


def torch_bfloat16(layers: Layers, x: Tensor, threads: int) -> Call:
    """nn.LSTM in bfloat16, weights and activations: oneDNN's, where the CPU has units for it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("oneDNN has no bfloat16 on this CPU")
    stored = [copy.deepcopy(layer).bfloat16() for layer in layers]
    return torch_layers(stored, x.bfloat16(), threads)


def torch_autocast(layers: Layers, x: Tensor, threads: int) -> Call:
    """nn.LSTM in float32 under autocast to bfloat16."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("oneDNN has no bfloat16 on this CPU")
    call = torch_layers(layers, x, threads)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call()  # type: ignore[no-any-return]

    return run


def torch_int8(layers: Layers, x: Tensor, threads: int) -> Call:
    """Dynamic quantisation of nn.LSTM and nn.GRU: int8 weights, 8-bit activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, which has no LSTM
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantized = quantize(Stack(layers), {type(layers[0])}, torch.qint8)
    return torch_layers(list(quantized.layers), x, threads)


def torch_step(layers: Layers, x: Tensor, _: int) -> Call:
    """torch's module with T = 1, the state fed back."""
    (layer,) = layers
    state: Any = None

    def step() -> Tensor:
        nonlocal state
        y, state = layer(x, state)
        return y[0]  # type: ignore[no-any-return]

    return step


def torch_step_plain(layers: Layers, x: Tensor, threads: int) -> Call:
    """The same without oneDNN."""
    return without_onednn(torch_step(layers, x, threads))


# -- ONNX: the graph by hand, which is exact and takes milliseconds


ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
ONNX_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "GRU": {"linear_before_reset": 1},  # r scales W_hn h + b_hn, as in nn.GRU
    "RNN_TANH": {"activations": ["Tanh"]},
    "RNN_RELU": {"activations": ["Relu"]},
}


def onnx_order(layer: Layer, name: str) -> Tensor:
    """A parameter with its gates in ONNX's order.

    LSTM: i, o, f, c where torch has i, f, g, o. GRU: z, r, h where torch has r, z, n.
    """
    order = ONNX_ORDER[layer.mode]
    gates = layer.get_parameter(f"{name}_l0").detach().chunk(len(order))
    return torch.cat([gates[n] for n in order])


def onnx_quantized(w: Tensor) -> tuple[Any, Any, Any]:
    """w [4H, I] as ORT's int8 [1, I, 4H], with scale and zero point.

    7 bits: with 8, the products saturate on a CPU without VNNI, and the results are wrong.
    """
    scale = w.abs().max() / 63
    values = (w / scale).round().to(torch.int8).t()[None].contiguous()
    return values.numpy(), scale[None].numpy(), torch.zeros(1, dtype=torch.int8).numpy()


def onnx_model(layers: Layers, x: Tensor, int8: bool = False, stateful: bool = False) -> bytes:
    """A model x -> y [T, B, H]; stateful (one layer): also the states, each [1, B, H], to the next.

    Their names are h and c (LSTM only), and h_n and c_n. int8 (LSTM only): quantised weights.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants: dict[str, Any] = {} if stateful else {"one": torch.tensor([1]).numpy()}
    mode = layers[0].mode
    states = ["h", "c"] if mode == "LSTM" else ["h"]
    nodes = []
    steps, batch, _ = x.shape
    for n, layer in enumerate(layers):
        weights = {"w": onnx_order(layer, "weight_ih"), "r": onnx_order(layer, "weight_hh")}
        biases = [onnx_order(layer, "bias_ih"), onnx_order(layer, "bias_hh")]
        constants[f"b{n}"] = torch.cat(biases)[None].numpy()
        source = f"y{n - 1}" if n else "x"
        inputs = [
            source,
            f"w{n}",
            f"r{n}",
            f"b{n}",
            "",
            *(states if stateful else [""] * len(states)),
        ]
        if int8:
            inputs += ["", f"w_scale{n}", f"w_zero{n}", f"r_scale{n}", f"r_zero{n}"]
            for name, w in weights.items():
                names = (f"{name}{n}", f"{name}_scale{n}", f"{name}_zero{n}")
                constants |= zip(names, onnx_quantized(w), strict=True)
        else:
            constants |= {f"{name}{n}": w[None].numpy() for name, w in weights.items()}
        outputs = ["", *(f"{name}_n" for name in states)] if stateful else [f"directions{n}"]
        nodes.append(
            helper.make_node(
                "DynamicQuantizeLSTM" if int8 else mode.partition("_")[0], inputs, outputs,
                domain="com.microsoft" if int8 else "", hidden_size=layer.hidden_size,
                **ONNX_ATTRIBUTES.get(mode, {}),
            )
        )  # fmt: skip
        if not stateful:
            nodes.append(helper.make_node("Squeeze", [f"directions{n}", "one"], [f"y{n}"]))

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    width = layers[-1].hidden_size
    state = (1, batch, width)
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("x", *x.shape), *(value(name, *state) for name in states if stateful)],
        [value(f"{name}_n", *state) for name in states]
        if stateful
        else [value(f"y{len(layers) - 1}", steps, batch, width)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions[: 2 if int8 else 1], ir_version=9)
    return model.SerializeToString()  # type: ignore[no-any-return]


def ort_session(model: bytes, threads: int) -> Any:
    """A session in its default form but for the threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ort(layers: Layers, x: Tensor, threads: int, int8: bool = False) -> Call:
    """ONNX Runtime with bound input and output: 12 us for a small LSTM where plain run takes 20."""
    import onnxruntime

    session = ort_session(onnx_model(layers, x, int8), threads)
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        [*x.shape[:2], layers[-1].hidden_size], "float32"
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_ortvalue_output(session.get_outputs()[0].name, y)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return y

    return run


def ort_step(layers: Layers, x: Tensor, threads: int, int8: bool = False) -> Call:
    """One step: bound twice, so that the state written by one call is read by the next."""
    import onnxruntime

    session = ort_session(onnx_model(layers, x, int8, stateful=True), threads)
    zeros = torch.zeros(1, x.size(1), layers[0].hidden_size).numpy()
    names = [given.name for given in session.get_inputs() if given.name != "x"]  # h, and c
    states = [
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(zeros.copy()) for name in names}
        for _ in range(2)
    ]
    bindings = []
    for before, after in (states, states[::-1]):
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        for name in names:
            binding.bind_ortvalue_input(name, before[name])
            binding.bind_ortvalue_output(f"{name}_n", after[name])
        bindings.append((binding, after["h"]))

    def step() -> Any:
        binding, h_n = bindings[0]
        session.run_with_iobinding(binding)
        bindings.reverse()
        return h_n

    return step


# -- OpenVINO


def openvino(layers: Layers, x: Tensor, threads: int, precision: str = "f32") -> Call:
    """OpenVINO, one request used again.

    In float32 also where the CPU has bfloat16, unless that is asked for. Threads are not pinned:
    the calling thread is one of them, and the other engines run on it too.
    """
    import openvino as ov

    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(onnx_model(layers, x)), "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer(share_outputs=True)  # start_async and wait take half as long again
        return request.get_output_tensor().data

    return run


# -- ours


def as_iss(layers: Layers) -> nn.RNNBase:
    """The stack as one ISSLSTM, ISSGRU or ISSRNN."""
    ours: Any = getattr(iss_kernels, f"ISS{type(layers[0]).__name__}")
    module: nn.RNNBase = ours(
        layers[0].input_size, [layer.hidden_size for layer in layers], len(layers)
    )
    state = {
        name.replace("_l0", f"_l{n}"): value
        for n, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


def iss(layers: Layers, x: Tensor, _: int) -> Call:
    """Our module, as a model in training has it."""
    module = as_iss(layers)
    return lambda: module(x)[0]


def prepared(layers: Layers, x: Tensor, _: int, weights: str) -> Call:
    """iss_kernels.prepare."""
    module = iss_kernels.prepare(as_iss(layers), weights)
    return lambda: module(x)[0]


def stream(layers: Layers, x: Tensor, _: int, weights: str) -> Call:
    """iss_kernels.Stream."""
    step = iss_kernels.Stream(iss_kernels.prepare(as_iss(layers), weights), x.size(1))
    return functools.partial(step, x[0].clone())


TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}


def _ours(name: str, build: Callable[..., Call]) -> dict[str, Engine]:
    """One engine per format of weights."""
    return {
        f"{name} {weights}": Engine(
            functools.partial(build, weights=weights), weights, tolerance, ours=True
        )
        for weights, tolerance in TOLERANCES.items()
    }


ORT = ("onnxruntime", "onnx")


@functools.cache
def engines(cell: str) -> dict[str, Engine]:
    """Every engine for calls of a whole sequence: "lstm", "gru" or "rnn"."""
    module = MODULES[cell].__name__
    result = {f"nn.{module}": Engine(torch_layers)}
    if cell == "lstm":
        result |= {
            "nn.LSTM no oneDNN": Engine(torch_plain, slow=True),
            "torch.compile": Engine(torch_compiled, slow=True),
        }
    if cell != "rnn":  # torch quantises no nn.RNN
        result["torch int8"] = Engine(torch_int8, "int8", 0.1, slow=True)
    result["ONNX Runtime"] = Engine(ort, packages=ORT)
    if cell == "lstm":  # ONNX Runtime quantises no GRU and no RNN
        result["ONNX Runtime int8"] = Engine(functools.partial(ort, int8=True), "int8", 0.1, ORT)
    result["OpenVINO"] = Engine(openvino, packages=("openvino", "onnx"))
    if cell == "lstm":  # others have no bfloat16 GRU in oneDNN
        brain = functools.partial(openvino, precision="bf16")
        result |= {
            "nn.LSTM bfloat16": Engine(torch_bfloat16, "bfloat16", 2e-2),
            "nn.LSTM autocast": Engine(torch_autocast, "bfloat16", 2e-2),
            "OpenVINO bfloat16": Engine(brain, "bfloat16", 2e-2, ("openvino", "onnx")),
        }
    return {**result, f"ISS{module}": Engine(iss, ours=True), **_ours("prepared", prepared)}


@functools.cache
def streams(cell: str) -> dict[str, Engine]:
    """Every engine for calls of a single step."""
    result = {f"nn.{MODULES[cell].__name__}": Engine(torch_step)}
    if cell == "lstm":
        result["nn.LSTM no oneDNN"] = Engine(torch_step_plain)
    result["ONNX Runtime"] = Engine(ort_step, packages=ORT)
    if cell == "lstm":
        step = functools.partial(ort_step, int8=True)
        result["ONNX Runtime int8"] = Engine(step, "int8", 0.1, ORT)
    return {**result, **_ours("Stream", stream)}
