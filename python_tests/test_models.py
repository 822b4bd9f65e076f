# SPDX-License-Identifier: Apache-2.0
"""Models that others made and trained, through everything: make test-models.

Four packages bring their weights along: silero-vad, uzmorph-nn, g2p-fa and Resemblyzer. A test
whose package is missing is skipped. The packages are installed without what they depend on, which
here is the code that reads audio files: nothing of that runs, so empty modules stand in for it.
"""

import importlib.resources
import random
import sys
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import iss_kernels as iss


class Silero(nn.Module):
    """silero-vad at 16 kHz: 64 samples of context and 512 new ones [B, 576] -> speech [B, 1].

    The package ships its model as TorchScript, whose modules cannot be replaced; these are the same
    layers, with the same weights. state: h and c, [2, B, 128].
    """

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Conv1d(1, 258, 256, 128, bias=False)
        widths = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.encoder = nn.ModuleList([nn.Conv1d(i, o, 3, stride, 1) for i, o, stride in widths])
        self.rnn = nn.LSTMCell(128, 128)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.ReLU(), nn.Conv1d(128, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.basis(F.pad(x, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for layer in self.encoder:
            x = layer(x).relu()
        h, c = self.rnn(x.squeeze(-1), (state[0], state[1]))
        y = self.head(h.unsqueeze(-1))
        return y.squeeze(1).mean(1, keepdim=True), torch.stack([h, c])


@dataclass
class Case:
    """A model with its trained weights, a fresh one of its class, and what it is called with.

    longer: the same with other sizes of batch and time. used: what a user of the package would
    call, an answer that must not change with the modules inside.
    """

    model: nn.Module
    fresh: nn.Module
    inputs: tuple[Any, ...]
    longer: tuple[Any, ...]
    used: Any = None


def with_stand_ins(package: str, stand_ins: dict[str, dict[str, Any]]) -> Any:
    """The package, imported where modules with these names and contents are there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in stand_ins.items():
            module = ModuleType(name)
            vars(module).update(contents)
            patch.setitem(sys.modules, name, module)
        return pytest.importorskip(package)


def silero_vad() -> Case:
    package = pytest.importorskip("silero_vad")
    scripted = package.load_silero_vad()
    weights = scripted._model.state_dict()
    renamed = {
        "stft.forward_basis_buffer": "basis.weight",
        **{
            f"encoder.{i}.reparam_conv.{kind}": f"encoder.{i}.{kind}"
            for i in range(4)
            for kind in ("weight", "bias")
        },
        "decoder.decoder.2.weight": "head.2.weight",
        "decoder.decoder.2.bias": "head.2.bias",
    }
    model = Silero()
    model.load_state_dict(
        {renamed.get(name, name.removeprefix("decoder.")): w for name, w in weights.items()}
    )

    def used(model: nn.Module) -> Tensor:
        """Probabilities of speech in a second of noise."""
        sound, state, answers = torch.randn(1, 64 + 31 * 512) * 0.05, torch.zeros(2, 1, 128), []
        for start in range(0, 31 * 512, 512):
            answer, state = model(sound[:, start : start + 576], state)
            answers.append(answer)
        return torch.cat(answers)

    # The package's own model keeps its context and state inside; without context it begins at 0.
    torch.manual_seed(0)
    state, context = torch.zeros(2, 1, 128), torch.zeros(1, 64)
    for chunk in torch.randn(9, 1, 512) * 0.05:
        answer, state = model.eval()(torch.cat([context, chunk], 1), state)
        torch.testing.assert_close(answer, scripted(chunk, 16000), rtol=0, atol=1e-6)
        context = chunk[:, -64:]

    inputs = torch.randn(2, 576) * 0.05, torch.randn(2, 2, 128).tanh()
    longer = torch.randn(3, 576) * 0.05, torch.randn(2, 3, 128).tanh()
    return Case(model, Silero(), inputs, longer, used)


def uzmorph_nn() -> Case:
    def resource_filename(package: str, name: str) -> str:
        return str(importlib.resources.files(package) / name)

    stand_ins = {"pkg_resources": {"resource_filename": resource_filename}}
    package = with_stand_ins("uzmorph_nn", stand_ins)
    tagger = package.uzmorph_nn()
    sizes = len(tagger.char_to_idx), len(tagger.tag_to_idx)

    def used(model: nn.Module) -> str:
        tagger.model = model
        return str(tagger.analyze("kitoblarimizdan"))

    def words(*shape: int) -> tuple[Tensor]:
        return (torch.randint(0, sizes[0], shape),)

    return Case(tagger.model, package.MorphBiLSTM(*sizes), words(2, 12), words(3, 17), used)


def g2p_fa() -> Case:
    package = pytest.importorskip("g2p_fa")
    speller, fresh = package.G2P_Fa(), package.G2P_Fa(checkpoint=None)

    def used(model: nn.Module) -> str:
        speller.model = model
        return speller("سلام")

    def pair(source: int, target: int, batch: int) -> tuple[Any, ...]:
        """Letters, phonemes and a ratio of teacher forcing of 1: answers without an argmax."""
        letters = torch.randint(3, 41, (source, batch))
        return letters, torch.randint(3, 33, (target, batch)), 1.0

    return Case(speller.model, fresh.model, pair(9, 7, 2), pair(11, 8, 3), used)


def resemblyzer() -> Case:
    names = "webrtcvad", "librosa", "scipy", "scipy.ndimage", "scipy.ndimage.morphology"
    package = with_stand_ins("resemblyzer", {name: {"binary_dilation": None} for name in names})
    model, fresh = (package.VoiceEncoder("cpu", verbose=False) for _ in range(2))
    for parameter in fresh.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)

    def spectra(batch: int, frames: int) -> tuple[Tensor]:
        return (torch.rand(batch, frames, 40) * 0.01,)

    def used(model: nn.Module) -> Tensor:
        """The voice of a spectrum that does not change."""
        return model(torch.arange(40.0).expand(1, 160, 40) / 4000)

    return Case(model, fresh, spectra(2, 20), spectra(3, 31), used)


@pytest.fixture(params=[silero_vad, uzmorph_nn, g2p_fa, resemblyzer], ids=lambda f: f.__name__)
def case(request):
    case = request.param()
    case.model.eval().requires_grad_(False)
    return case


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    random.seed(0)
    with torch.no_grad():
        return model(*inputs)


def assert_same(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def shrunken(case: Case) -> tuple[nn.Module, nn.Module, Any]:
    """The model with about a third of its units zero, the small one, and its report."""
    big = deepcopy(case.model).eval()
    groups = iss.find_groups(big, case.inputs)
    generator = torch.Generator().manual_seed(0)
    whole = groups.kept_whole
    masks = {
        f.name: torch.rand(f.size, generator=generator) < (0 if f.name in whole else 1 / 3)
        for f in groups.families
    }
    groups.zero_units_(masks)
    small, report = iss.shrink(big, groups)
    assert {name: len(kept) for name, kept in report.kept.items()} == {
        name: int((~mask).sum()) for name, mask in masks.items()
    }
    return big, small, report


def answers(case: Case, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What the model returns, without the states, which are as small as their layers."""
    result = run(model, inputs)
    return result[0] if isinstance(case.model, Silero) else result


def test_our_kernels_give_the_answers(case):
    fast = iss.accelerate(deepcopy(case.model))
    assert not any(type(m) in (nn.LSTM, nn.LSTMCell) for m in fast.modules())
    for inputs in (case.inputs, case.longer):
        assert_same(run(fast, inputs), run(case.model, inputs))


def test_the_package_works_with_our_modules_inside(case):
    torch.manual_seed(1)
    expected = case.used(case.model)
    torch.manual_seed(1)
    got = case.used(iss.accelerate(deepcopy(case.model)))
    assert_same(got, expected) if isinstance(expected, Tensor) else None
    assert isinstance(expected, Tensor) or got == expected


def test_a_shrunken_model_gives_the_answers(case):
    big, small, _ = shrunken(case)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in big.parameters())
    for inputs in (case.inputs, case.longer):
        assert_same(answers(case, small, inputs), answers(case, big, inputs))
    fast = iss.accelerate(deepcopy(small))
    fast = fast if isinstance(fast, Silero) else iss.prepare(fast)  # a cell is not packed
    assert_same(answers(case, fast, case.longer), answers(case, big, case.longer))


def test_no_layer_is_whole_where_units_may_leave(case):
    """Every unit of these models can leave, each layer by its own size."""
    groups = iss.find_groups(deepcopy(case.model), case.inputs)
    layers = [m for m in case.model.modules() if isinstance(m, (nn.LSTM, nn.LSTMCell))]
    units = sum(
        m.hidden_size * getattr(m, "num_layers", 1) * (1 + getattr(m, "bidirectional", False))
        for m in layers
    )
    if case.model.__class__.__name__ == "Seq2Seq":  # the decoder goes on with the encoder's units
        units //= 2
    assert groups.units == units and not groups.kept_whole and not groups.tied


def test_a_small_model_comes_back_from_a_file(case, tmp_path):
    _, small, _ = shrunken(case)
    iss.save(small, tmp_path / "small.safetensors")
    loaded = iss.load(tmp_path / "small.safetensors", case.fresh).eval()
    assert_same(run(loaded, case.longer), run(small, case.longer), 0)


@pytest.mark.filterwarnings("ignore:export_onnx. the file takes inputs of the example's size")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_onnx_gives_the_answers(case, tmp_path, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    _, small, _ = shrunken(case)
    path = tmp_path / "small.onnx"
    # Silero's chunks have one length: of another, its frames would be more than one.
    batch = {"x": {0: "batch"}, "state": {1: "batch"}} if isinstance(small, Silero) else None
    iss.export_onnx(small, case.inputs, path, dynamo=dynamo, dynamic=batch)
    session = runtime.InferenceSession(path)
    for inputs in (case.inputs, case.longer):
        tensors = [value.numpy() for value in inputs if isinstance(value, Tensor)]
        if case.model.__class__.__name__ == "Seq2Seq":  # its loop has the length of the example
            tensors[1] = tensors[1][: len(case.inputs[1])]
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, dict(zip(names, tensors, strict=True)))
        expected = run(small, tuple(map(torch.from_numpy, tensors)) + inputs[len(tensors) :])
        assert_same([torch.from_numpy(value) for value in got], tree_leaves(expected))


def test_a_stream_of_silero_vad():
    case = silero_vad()
    _, small, _ = shrunken(case)
    sounds, state = torch.randn(7, 2, 576) * 0.05, torch.zeros(2, 2, small.rnn.hidden_size)
    step = iss.Stream(small, 2, (sounds[0], state))
    for sound in sounds:
        expected, state = run(small, (sound, state))
        assert_same(step(sound)[0], expected)


def test_a_stream_of_the_decoder_of_g2p_fa():
    case = g2p_fa()
    _, small, _ = shrunken(case)
    hidden, cell = run(small.encoder, (case.inputs[0],))
    words = torch.randint(3, 33, (6, 2))
    step = iss.Stream(small.decoder, 2, (words[0], hidden, cell))
    for word in words:
        expected, hidden, cell = run(small.decoder, (word, hidden, cell))
        assert_same(step(word)[0], expected)


def test_a_stream_of_resemblyzer_knows_the_voice_so_far():
    case = resemblyzer()
    _, small, _ = shrunken(case)
    (spectra,) = case.longer
    step = iss.Stream(small, 3, spectra[:, :5])
    for t in range(spectra.size(1)):
        assert_same(step(spectra[:, t]), run(small, (spectra[:, : t + 1],)))


def test_a_stream_of_uzmorph_would_have_to_know_the_end():
    case = uzmorph_nn()
    with pytest.raises(ValueError, match="one direction"):
        iss.Stream(case.model, 2, case.inputs[0])
