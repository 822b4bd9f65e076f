# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for the GPUs that we support, and says what each takes; no GPU needed.

python python_tests/cuda_compile.py     writes cuda_resources.csv, which test_cuda_compile.py holds
                                        the kernels to; look at the difference before committing it
"""

import csv
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cubin"
TABLE = Path(__file__).with_name("cuda_resources.csv")
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "highway")  # the sources of one cell
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-cubin", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings"]
FLAGS += ["-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
JOBS = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
# Those of a run without --slow. Cells are the same text: the LSTM without clusters and with them,
# and a highway network, which has a walk of its own.
_QUICK_CELLS = {"lstm": ("sm_80", "sm_90a"), "highway": ("sm_90a",)}
QUICK_JOBS = [(s, a) for s, a in JOBS if s.stem not in CELLS or a in _QUICK_CELLS.get(s.stem, ())]
_KERNEL = re.compile(r"Compiling entry function '(\w+)' for")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def tool(name):
    """Path of a tool of the CUDA toolkit: on the PATH, or from the wheels of the extra `cuda`."""
    on_path = shutil.which(name)
    if on_path:
        return on_path
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        for path in Path(place).glob(f"cu*/bin/{name}"):
            return str(path)
    return None


@functools.cache
def version():
    done = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\S+),", done.stdout).group(1)


def readable(kernels):
    """Names of kernels without namespaces and arguments: lstm_cell<float>."""
    done = subprocess.run(["c++filt", *kernels], capture_output=True, text=True, check=True)
    names = []
    for line in done.stdout.splitlines():
        name = line.replace("(anonymous namespace)::", "").removeprefix("void ")
        name = re.sub(r"iss::(_GLOBAL__N_\w+::)?", "", name)
        name = re.sub(r"\((?:iss::)?(\w+)\)(\d+)", r"\1 \2", name)  # (Tier)1: an enum's value
        names.append(name[: matching(name)])
    return names


def matching(name):
    """Where the template arguments end, before those in brackets."""
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return i
    return len(name)


def headers():
    """Those that kernels may include."""
    own = [ROOT / "csrc/types.h", ROOT / "csrc/group_lasso.h"]
    return own + [p for f in ("cells", "cuda", "simt") for p in (ROOT / "csrc" / f).glob("*.h")]


@functools.cache
def compiled(source, architecture):
    """-> (cubin, what the compiler said), from the cache where nothing has changed."""
    state = hashlib.sha256(" ".join([version(), architecture, *FLAGS]).encode())
    for path in [source, *sorted(headers())]:
        state.update(path.read_bytes())
    target = BUILD / f"{source.stem}-{architecture}-{state.hexdigest()[:16]}.cubin"
    log = target.with_suffix(".log")
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{source.stem}-{architecture}-*"):
            old.unlink()
        command = [tool("nvcc"), *FLAGS, f"-arch={architecture}", "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError("\n".join([" ".join(command), *(said or [done.stderr])]))
        log.write_text(done.stdout + done.stderr)
    return target, log.read_text()


def compile_all(jobs=JOBS):
    """Kernels for architectures, two compilers at a time; the first error is raised."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True))


def resources(log):
    """-> {kernel: (registers, bytes of static shared memory, bytes of stack and spills)}."""
    found = {}
    for part in _KERNEL.split(log)[1:]:
        if re.fullmatch(r"\w+", part):
            kernel = part
            continue
        shared = _SHARED.search(part)
        found[kernel] = (
            int(_USED.search(part).group(1)),
            int(shared.group(1)) if shared else 0,
            sum(map(int, _STACK.search(part).groups())),
        )
    return dict(zip(readable(found), found.values(), strict=True)) if found else {}


def table(jobs=JOBS):
    """-> {(architecture, kernel): (registers, shared, spills)}."""
    return {
        (architecture, kernel): numbers
        for (_, architecture), (_, log) in compile_all(jobs).items()
        for kernel, numbers in resources(log).items()
    }


def committed():
    with TABLE.open(newline="") as file:
        return {
            (row["architecture"], row["kernel"]): (int(row["registers"]), int(row["shared_bytes"]))
            for row in csv.DictReader(file)
        }


def main():
    rows = [(*key, *numbers[:2]) for key, numbers in sorted(table().items())]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["architecture", "kernel", "registers", "shared_bytes"])
        writer.writerows(rows)
    print(f"wrote {TABLE}: {len(rows)} kernels, nvcc {version()}")


if __name__ == "__main__":
    main()
