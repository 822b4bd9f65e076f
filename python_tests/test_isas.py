# SPDX-License-Identifier: Apache-2.0
"""The kernels by themselves, without torch: built here, and for aarch64 under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

from iss_kernels.backend import supported_isas

ROOT = Path(__file__).parents[1]
SIMDE = Path(__file__).parent / "simde_avx512.h"
SOURCES = [
    *sorted((ROOT / "csrc/cpu/kernels").glob("isa_*.cpp")),
    ROOT / "csrc/cpu/kernels/dispatch.cpp",
]
# -O1: the tiles are the same as at -O3, and it compiles in a few seconds.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-I", str(ROOT / "csrc")]


def build_and_run(compiler, runner, directory, sources=SOURCES, flags=()):
    program = directory / "kernels_test"
    files = [*sources, Path(__file__).parent / "kernels_test.cpp"]
    subprocess.run([compiler, *FLAGS, *flags, *map(str, files), "-o", str(program)], check=True)
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_every_isa_of_this_machine(tmp_path):
    lines = build_and_run("c++", [], tmp_path)
    assert lines == [f"{isa}: passed" for isa in supported_isas()]


def test_float16_in_two_registers(tmp_path):
    """As a Zen 4 does with AVX-512: told that this machine is one."""
    if "avx512" not in supported_isas():
        pytest.skip("needs AVX-512")
    lines = build_and_run("c++", [], tmp_path, flags=["-D__builtin_cpu_is(name)=1"])
    assert lines == [f"{isa}: passed" for isa in supported_isas()]


def test_avx512_through_simde(tmp_path):
    """Where the machine has AVX-512 the test above runs it; elsewhere SIMDe stands in for it."""
    if "avx512" in supported_isas():
        pytest.skip("this machine has AVX-512")
    if "avx2" not in supported_isas() or not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("needs AVX2 and SIMDe (Debian: libsimde-dev)")
    avx512 = ROOT / "csrc/cpu/kernels/isa_avx512.cpp"
    stand_in = ["-w", "-mavx2", "-mfma", "-mf16c", "-include", str(SIMDE)]
    subprocess.run(
        ["c++", *FLAGS, *stand_in, "-c", str(avx512), "-o", str(tmp_path / "avx512.o")], check=True
    )
    others = [path for path in SOURCES if path != avx512]
    lines = build_and_run("c++", [], tmp_path, [*others, tmp_path / "avx512.o"])
    assert lines == [f"{isa}: passed" for isa in ("avx512", *supported_isas())]


def test_neon_under_an_emulator(tmp_path):
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    lines = build_and_run(compiler, [emulator, "-L", "/usr/aarch64-linux-gnu"], tmp_path)
    assert lines == ["neon: passed", "scalar: passed"]


@pytest.mark.parametrize(
    "kernel", ["lstm_step_backward", "matmul", "lstm_step", "squares", "scale", "bfloat16"]
)
def test_the_kernel_test_notices_a_wrong_kernel(tmp_path, kernel):
    """A program that cannot fail tests nothing: a copy with one broken operation must fail."""
    changes = {
        "lstm_step_backward": ("step-inl.h", "one - tanh_c * tanh_c", "one"),
        "matmul": ("matmul-inl.h", "const int64_t left = args.columns - column;",
                   "const int64_t left = args.columns - column - 1;"),
        "lstm_step": ("step-inl.h", "fma(f, c_prev, i * g)", "i * g"),
        "squares": ("group_lasso-inl.h", "args.column_sums[c] -= w * w;", "(void)w;"),
        "scale": ("group_lasso-inl.h", "{ args.of_columns[c] = value; }", "{}"),
        "bfloat16": ("vec_scalar-inl.h", " + (bits >> 16 & 1)", ""),
    }  # fmt: skip
    name, right, wrong = changes[kernel]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cpu/kernels" / name
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    program = tmp_path / "kernels_test"
    sources = [
        tmp_path / "csrc/cpu/kernels/isa_scalar.cpp",
        tmp_path / "csrc/cpu/kernels/dispatch.cpp",
    ]
    # Only the scalar table is built in: the others are declared, and defined away.
    (tmp_path / "csrc/cpu/kernels/dispatch.cpp").write_text(
        (tmp_path / "csrc/cpu/kernels/dispatch.cpp").read_text().replace("__x86_64__", "NOT_HERE")
    )
    flags = [*FLAGS[:-1], str(tmp_path / "csrc"), "-w"]
    test = Path(__file__).parent / "kernels_test.cpp"
    subprocess.run(["c++", *flags, *map(str, sources), str(test), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "scalar: FAILED" in result.stdout
