# SPDX-License-Identifier: Apache-2.0
"""Packed weights are kept between calls, and never outlive the values they were packed from."""

import copy
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from iss_kernels import ISSGRU, ISSLSTM, ISSRNN, use_backend

X = torch.randn(5, 2, 3, dtype=torch.float64)


def change_in_place(lstm):
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(1.5)


def change_through_data(lstm):
    lstm.weight_hh_l0.data[0, 0] += 1.0  # torch does not count this as a new version


def change_through_numpy(lstm):
    lstm.weight_hh_l0.detach().numpy()[-1, -1] *= -1


def change_signs_of_a_column(lstm):
    # Only top bits change, an even number of times: what a weaker fingerprint would not notice.
    lstm.weight_hh_l0.data[:, 1] *= -1


def swap_rows(lstm):
    lstm.weight_hh_l0.data.copy_(lstm.weight_hh_l0.data.flip(0))


def assign_data(lstm):
    lstm.weight_hh_l0.data = torch.randn_like(lstm.weight_hh_l0)


def assign_parameter(lstm):
    lstm.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(lstm.weight_hh_l0))


def load_state_dict(lstm):
    lstm.load_state_dict(ISSLSTM(3, 4, proj_size=2).to(lstm.weight_hh_l0.dtype).state_dict())


def load_by_assignment(lstm):
    other = ISSLSTM(3, 4, proj_size=2).to(lstm.weight_hh_l0.dtype)
    lstm.load_state_dict(other.state_dict(), assign=True)


def optimizer_step(lstm):
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.5)
    lstm(X.to(lstm.weight_hh_l0.dtype))[0].sum().backward()
    optimizer.step()


def change_the_projection(lstm):
    lstm.weight_hr_l0.data.neg_()


def to_and_back(lstm):
    other = torch.float32 if lstm.weight_hh_l0.dtype == torch.float64 else torch.float64
    lstm.to(other)
    change_through_numpy(lstm)


CHANGES = [
    change_in_place, change_through_data, change_through_numpy, change_signs_of_a_column, swap_rows,
    assign_data, assign_parameter, load_state_dict, load_by_assignment, optimizer_step,
    change_the_projection, to_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_never_run_from_its_old_pack(isa, dtype, change):
    lstm = ISSLSTM(3, 4, proj_size=2, dtype=dtype)
    with torch.no_grad():
        before = lstm(X.to(dtype))[0]
        assert torch.equal(lstm(X.to(dtype))[0], before)
    change(lstm)
    x = X.to(lstm.weight_hh_l0.dtype)
    with torch.no_grad():
        after, fresh = lstm(x)[0], copy.deepcopy(lstm)(x)[0]
        with use_backend("reference"):
            expected = lstm(x)[0]
    assert torch.equal(after, fresh)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, before.to(after.dtype))


def test_models_that_come_and_go_do_not_share_packs():
    """A new weight may get the address of one that is gone."""
    for seed in range(50):
        torch.manual_seed(seed)
        lstm = ISSLSTM(3, 4, dtype=torch.float64)
        with torch.no_grad():
            y = lstm(X)[0]
            with use_backend("reference"):
                np.testing.assert_allclose(y, lstm(X)[0], rtol=1e-12, atol=1e-12)


def bytes_left(action):
    """What the tensors take that `action` made and left."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = action()
    return sum(event.self_cpu_memory_usage for event in profiled.events()), result


def called():
    lstm = ISSLSTM(200, 200)
    with torch.no_grad():
        lstm(torch.randn(1, 1, 200))
    return lstm


def test_panels_go_with_their_weight():
    left, lstm = bytes_left(called)
    parameters = sum(p.nbytes for p in lstm.parameters())
    products = lstm.weight_ih_l0.nbytes + lstm.weight_hh_l0.nbytes
    assert parameters + products <= left < 1.2 * (parameters + products)

    def call_and_delete():
        called()

    assert bytes_left(call_and_delete)[0] == 0


def test_an_alias_does_not_keep_the_panels():
    left, state = bytes_left(lambda: called().state_dict())
    assert left == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.float64)])
def test_weights_may_be_swapped(monkeypatch, change):
    """torch.utils.swap_tensors refuses a tensor that anything holds a weak reference to."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    lstm = ISSLSTM(3, 4)
    with torch.no_grad():
        lstm(X.float())
        change(lstm)
        y = lstm(X)[0]
        with use_backend("reference"):
            torch.testing.assert_close(y, lstm(X)[0])


def test_a_swapped_weight_brings_its_own_panels():
    lstm, other = ISSLSTM(3, 4, dtype=torch.float64), ISSLSTM(3, 4, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = lstm(X)[0], other(X)[0]
        for a, b in zip(lstm.parameters(), other.parameters(), strict=True):
            torch.utils.swap_tensors(a, b)
        assert torch.equal(lstm(X)[0], theirs)
        assert torch.equal(other(X)[0], ours)


def test_a_called_model_is_copied_and_saved_as_before():
    lstm = ISSLSTM(3, 4, dtype=torch.float64)
    with torch.no_grad():
        y = lstm(X)[0]
        file = io.BytesIO()
        torch.save(lstm, file)
        file.seek(0)
        for other in (copy.deepcopy(lstm), torch.load(file, weights_only=False)):
            assert torch.equal(other(X)[0], y)


def test_a_sign_and_an_exponent_do_not_undo_each_other():
    """-1 for 1 at an odd place, 0 for 2 at an even one eight words on: of one fingerprint once."""
    module, torchs = ISSRNN(24, 24, bias=False), nn.RNN(24, 24, bias=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-1, 3, parameter.shape))
        module.weight_hh_l0[0, 1], module.weight_hh_l0[0, 18] = 1, 0
        x = torch.randn(3, 2, 24) * 0.01
        module(x)
        module.weight_hh_l0[0, 1], module.weight_hh_l0[0, 18] = -1, 2
        torchs.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), torchs(x))


def test_panels_are_of_the_values_that_their_fingerprint_says():
    """A weight that another thread writes while it is packed, and then writes back."""
    module, a = ISSGRU(64, 256), torch.randn(768, 256) * 0.1
    b, x = -a, torch.randn(2, 6, 64)
    weight = module.weight_hh_l0.detach()
    done = threading.Event()

    def write():
        while not done.is_set():
            weight.copy_(b)
            weight.copy_(a)

    with torch.no_grad():
        for _ in range(20):
            done.clear()
            writer = threading.Thread(target=write)
            writer.start()
            for _ in range(20):
                module(x)
            done.set()
            writer.join()
            expected = ISSGRU(64, 256)
            expected.load_state_dict(module.state_dict())
            torch.testing.assert_close(module(x), expected(x))
