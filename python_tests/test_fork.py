# SPDX-License-Identifier: Apache-2.0
"""A process may fork at any moment, as data loaders and servers do: children find no lock held."""

import copy
import os
import signal
import threading
import time
import traceback
from contextlib import contextmanager

import pytest
import torch

from iss_kernels import ISSLSTM, Stream, prepare
from iss_kernels.backend import native

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # What it warns of is what is tested.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

LSTM = ISSLSTM(16, 64)
X = torch.randn(4, 16, 16)
LARGE = torch.randn(30, 40, 16)  # its results are large enough to be recycled


def infer():
    with torch.no_grad():
        LSTM(X)
        LSTM(LARGE)


def train():
    # A model of its own: torch locks the gradient of a parameter, a lock of the kind tested here.
    copy.deepcopy(LSTM)(LARGE)[0].sum().backward()


def prepare_and_run():
    prepare(LSTM.to_torch())(X)


def stream_steps():
    STREAM.reset()
    for x in X:
        STREAM(x)


STREAM = Stream(LSTM.to_torch().eval(), batch_size=16)
CALLS = [infer, train, prepare_and_run, stream_steps]


def run_in_children(count, call):
    """How many of so many children, forked one after the other, end well: all, or some hang."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                call()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    ended, deadline = [], time.monotonic() + 60  # a busy machine is slow
    for child in children:
        ready, status = os.waitpid(child, os.WNOHANG)
        while not ready and time.monotonic() < deadline:
            time.sleep(0.001)
            ready, status = os.waitpid(child, os.WNOHANG)
        if not ready:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        ended.append(status)
    return ended.count(0)


@contextmanager
def in_another_thread(call):
    """Calls it again and again meanwhile."""
    done = threading.Event()

    def loop():
        while not done.is_set():
            call()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_calls_of_other_threads_take_no_cores_in_a_child():
    def infer_alone():
        torch.set_num_threads(1)  # so that no thread is ever late
        infer()

    def see():
        time.sleep(0.05)  # the calls of the last moments still count
        torch.set_num_threads(8)
        assert native().free_threads() == 8

    native().pretend_cores(8)
    try:
        with in_another_thread(infer_alone):
            assert run_in_children(10, see) == 10
    finally:
        native().pretend_cores(0)


@pytest.mark.parametrize("busy", CALLS, ids=lambda f: f.__name__)
def test_children_end_whatever_another_thread_was_doing(busy):
    def everything():
        for call in CALLS:
            call()

    everything()
    with in_another_thread(busy):
        assert run_in_children(25, everything) == 25


def test_a_step_that_was_half_way_is_an_error_until_reset():
    x = torch.randn(1, 16)
    stream = Stream(torch.nn.LSTM(16, 700).eval())
    first = stream(x).clone()

    def go_on():
        try:
            stream(x)
        except RuntimeError as error:
            assert "got one half-way; reset() or a new state begins" in str(error)
        stream.reset()
        assert torch.equal(stream(x), first)

    with in_another_thread(lambda: stream(x)):
        assert run_in_children(10, go_on) == 10
