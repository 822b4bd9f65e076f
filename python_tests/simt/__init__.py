# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA kernels for the CPU (csrc/simt) and runs them in any order, checked or not.

`simulator("plain")` and `simulator("check")` are the package's own kernels with their host files:
torch.ops.iss_kernels_simt and torch.ops.iss_kernels_simt_check. Built once into build/simt, again
when something that they are made of has changed.
"""

import ctypes
import fcntl
import functools
import hashlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "simt"
SIMULATOR = sorted((ROOT / "csrc/simt").glob("*.cpp"))
NAMESPACES = {"plain": "iss_kernels_simt", "check": "iss_kernels_simt_check"}
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-DSIMT_HOST"]
FLAGS += ["-Wno-missing-field-initializers"]  # where names say which fields are meant
FLAGS += [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
# The checker answers the calls that this makes the compiler insert; kernels alone get them.
CHECKED = ["-fsanitize=thread,alignment", "-fsanitize-coverage=trace-pc"]
# (policy, seed) of runs that differ in order: what hides a bug in one shows it in another.
ORDERS = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2)]


class Simulator:
    """One shared library with kernels in it."""

    def __init__(self, path, checked):
        torch.ops.load_library(path)
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.simt_last_error.restype = ctypes.c_char_p
        self.library.simt_calls.restype = ctypes.c_char_p
        self.library.simt_configure.argtypes = [
            *(ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_uint)
        ]
        self.library.simt_pretend.argtypes = [*[ctypes.c_int] * 3, ctypes.c_int64, ctypes.c_int]
        self.checked = checked
        self.configure()

    def configure(self, policy="fifo", seed=0, preempt=0, window=4):
        """The order of threads: fifo, lifo or random with a seed; how many blocks of a plain launch
        are there at once; how often (one in `preempt`) a thread gives way at a checked access."""
        number = ("fifo", "lifo", "random").index(policy)
        self.library.simt_configure(number, seed, self.checked, preempt, window)

    def pretend(self, major=9, minor=0, multiprocessors=8, shared_bytes=227 * 1024, left=None):
        """The GPU that host files and launches are told of; a device with an index of its own.

        left: of its multiprocessors, those that the CUDA runtime counts by now, where host files
        still believe in all: the device was partitioned in between.
        """
        left = multiprocessors if left is None else left
        self.library.simt_pretend(major, minor, multiprocessors, shared_bytes, left)

    @property
    def last_error(self):
        """Why this OS thread's last launch failed, or an empty string."""
        return self.library.simt_last_error().decode()

    @contextmanager
    def capturing(self):
        """Host files are told that a CUDA graph is being captured; kernels run nevertheless."""
        self.library.simt_capture(1)
        try:
            yield
        finally:
            self.library.simt_capture(0)

    @property
    def limits_set(self):
        """How often a limit of a kernel was set so far."""
        return self.library.simt_limits_set()

    @property
    def pending_error(self):
        """What this OS thread's next cudaGetLastError would return."""
        return self.library.simt_pending_error()

    @contextmanager
    def guarded_tensors(self):
        """New tensors lie between guards and are NaN until written, and the checker knows them.

        A checked kernel may touch no others.
        """
        self.library.simt_guard_tensors(1)
        try:
            yield
        finally:
            self.library.simt_guard_tensors(0)

    @contextmanager
    def recorded_calls(self):
        """Collects the synchronisation that launches call: {place: offsets in the library}.

        A place is "__syncwarp sample.h:3 called at sample.cu:12"; every template instance of the
        kernel has an offset of its own.
        """
        places = {}
        self.library.simt_record_calls(1)
        try:
            yield places
        finally:
            lines = self.library.simt_calls().decode().splitlines()
            self.library.simt_record_calls(0)
            calls = [line.split() for line in lines]
            sources = self.source_lines([int(offset, 16) for _, offset in calls])
            for (name, offset), source in zip(calls, sources, strict=True):
                places.setdefault(f"{name} {source}", []).append(int(offset, 16))

    def source_lines(self, offsets):
        """Where each of these addresses is called, with the functions that are inlined there."""
        addresses = [hex(offset - 1) for offset in offsets]  # the call, not what follows it
        command = ["addr2line", "-a", "-s", "-i", "-e", self.path, *addresses]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        chains = re.split(r"^0x[0-9a-f]+\n", text, flags=re.M)[1:]
        lines = [[line.split(" ")[0] for line in chain.splitlines()] for chain in chains]
        return [" called at ".join(x for x in ls if not x.startswith("host.h:")) for ls in lines]

    @contextmanager
    def left_out(self, offsets):
        """Runs kernels as if the last recorded calls at these offsets were not in the source."""
        array = (ctypes.c_uint64 * len(offsets))(*offsets)
        self.library.simt_leave_out(array, ctypes.c_size_t(len(offsets)))
        try:
            yield
        finally:
            self.library.simt_leave_out(None, ctypes.c_size_t(0))


def is_current(target, key, depends):
    """Whether target was made by the command `key` from files with today's contents."""
    record = target.with_suffix(".made_by")
    if not (target.exists() and record.exists()):
        return False
    names = depends(target)
    return names is not None and record.read_text() == digest(key, names)


def digest(key, names):
    state = hashlib.sha256(key.encode())
    for name in sorted(names):
        path = Path(name)
        state.update(path.read_bytes() if path.exists() else b"gone")
    return state.hexdigest()


def headers(object_file):
    """The files of this repository that an object was made of, as the compiler wrote them down."""
    listed = object_file.with_suffix(".d")
    if not listed.exists():
        return None
    names = listed.read_text().replace("\\\n", " ").split()[1:]
    return [name for name in names if name.startswith(str(ROOT)) and ".venv" not in name]


def compile_object(source, target, flags):
    command = ["g++", *FLAGS, *flags, "-MMD", "-x", "c++", "-c", str(source), "-o", str(target)]
    key = " ".join([*command, torch.__version__])
    if not is_current(target, key, headers):
        run(command)
        target.with_suffix(".made_by").write_text(digest(key, headers(target)))


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:  # a warning is an error
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(name, kernels, host_files=(), checked=False, flags=()):
    """-> the path of a library made of kernels (.cu), host files (.cpp) and the simulator."""
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs = [(source, [*flags, *(CHECKED if checked else [])]) for source in kernels]
    jobs += [(source, [*flags]) for source in host_files]
    jobs += [(source, ["-O2", *flags]) for source in SIMULATOR]
    objects = [BUILD / f"{name}-{Path(source).stem}.o" for source, _ in jobs]
    library, torch_libraries = BUILD / f"{name}.so", Path(torch.__file__).parent / "lib"
    # Kernels come first: of an inline function the linker takes the first copy, the checked one.
    command = ["g++", "-shared", "-o", str(library), *map(str, objects), f"-L{torch_libraries}"]
    command += ["-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    with open(BUILD / f"{name}.lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of test runs at the same time, one builds
        list(pool.map(lambda job, to: compile_object(job[0], to, job[1]), jobs, objects))
        if not is_current(library, " ".join(command), lambda _: objects):
            run(command)
            library.with_suffix(".made_by").write_text(digest(" ".join(command), objects))
    return library


@functools.cache
def simulator(variant):
    """-> Simulator of the package's kernels, "plain" or "check"."""
    shared = [ROOT / f"csrc/{name}.cpp" for name in ("library", "memory", "locks")]
    host_files = [*shared, *sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    checked = variant == "check"
    flags = [f"-DISS_NAMESPACE={NAMESPACES[variant]}"]
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    return Simulator(build(variant, kernels, host_files, checked, flags), checked)
