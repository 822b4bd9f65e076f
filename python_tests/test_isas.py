# SPDX-License-Identifier: Apache-2.0
"""The kernels by themselves, without torch: built here, and for aarch64 under an emulator."""

import functools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from iss_kernels.backend import supported_isas

ROOT = Path(__file__).parents[1]
SIMDE = Path(__file__).parent / "simde_avx512.h"
AMX = Path(__file__).parent / "amx_emulation.h"
SOURCES = [
    *sorted((ROOT / "csrc/cpu/kernels").glob("isa_*.cpp")),
    ROOT / "csrc/cpu/kernels/dispatch.cpp",
]
# -O1: the tiles are the same as at -O3, and it compiles in a few seconds.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-I", str(ROOT / "csrc")]


TEST = Path(__file__).parent / "kernels_test.cpp"
AVX512 = ROOT / "csrc/cpu/kernels/isa_avx512.cpp"


def compiled(source, directory, *flags, compiler="c++"):
    result = directory / f"{source.stem}.o"
    command = [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(result)]
    subprocess.run(command, check=True)
    return result


def all_compiled(directory, compiler="c++"):
    """{source: object}"""
    sources = [*SOURCES, TEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compile = functools.partial(compiled, directory=directory, compiler=compiler)
        return dict(zip(sources, pool.map(compile, sources), strict=True))


def run(objects, directory, compiler="c++", runner=()):
    """What the program of these objects prints."""
    program = directory / "kernels_test"
    subprocess.run([compiler, *map(str, objects.values()), "-o", str(program)], check=True)
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return all_compiled(tmp_path_factory.mktemp("objects"))


def test_every_isa_of_this_machine(objects, tmp_path):
    assert run(objects, tmp_path) == [f"{isa}: passed" for isa in supported_isas()]


def test_float16_in_two_registers(objects, tmp_path):
    """As a Zen 4 does with AVX-512: told that this machine is one."""
    if "avx512" not in supported_isas():
        pytest.skip("needs AVX-512")
    told = compiled(AVX512, tmp_path, "-D__builtin_cpu_is(name)=1")
    lines = run({**objects, AVX512: told}, tmp_path)
    assert lines == [f"{isa}: passed" for isa in supported_isas()]


def test_amx_by_an_emulation(objects, tmp_path):
    """Loops stand in for AMX, and SIMDe for AVX-512 where the machine has none to bfloat16."""
    stand_in = ["-w", "-include", str(AMX)]
    if "avx512_bf16" not in supported_isas():
        if "avx2" not in supported_isas() or not Path("/usr/include/simde/x86/avx512.h").exists():
            pytest.skip("needs AVX2 and SIMDe (Debian: libsimde-dev)")
        stand_in += ["-mavx2", "-mfma", "-mf16c", "-include", str(SIMDE)]
    lines = run({**objects, AVX512: compiled(AVX512, tmp_path, *stand_in)}, tmp_path)
    native = [isa for isa in supported_isas() if not isa.startswith(("avx512", "amx"))]
    assert lines == [f"{isa}: passed" for isa in ("amx", "avx512_bf16", "avx512", *native)]


def test_neon_under_an_emulator(tmp_path):
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    objects = all_compiled(tmp_path, compiler)
    lines = run(objects, tmp_path, compiler, [emulator, "-L", "/usr/aarch64-linux-gnu"])
    assert lines == [f"{isa}: passed" for isa in ("neon_bf16", "neon", "scalar", "scalar_bf16")]


# Copies of the kernels with broken operations: (file, right, wrong, what must fail). Each cell has
# one in a copy, so that what fails tells them apart.
MUTANTS = {
    "forward": [
        ("cells/lstm-inl.h", "fma(gates[1], before, gates[0] * gates[2])", "gates[0] * gates[2]",
         "lstm_step c["),
        ("cells/gru-inl.h", "fma(gates[0], saved, input[2])", "saved + input[2]", "gru_step h["),
        ("cells/rnn-inl.h", "h = relu(sum)", "h = sum", "rnn_relu_step h["),
        ("cells/rhn-inl.h", "mask * gates[0] - before, before", "gates[0] - before, before",
         "rhn_step h["),
        ("cpu/kernels/matmul-inl.h", "const int64_t left = args.columns - (panel + p) * kColumns;",
         "const int64_t left = args.columns - (panel + p) * kColumns - 1;", "matmul["),
        ("cpu/kernels/group_lasso-inl.h", "args.column_sums[c] -= w * w;", "(void)w;",
         "squares of columns["),
    ],
    "backward": [
        ("cells/lstm-inl.h", "one - tanh_c * tanh_c", "one", "lstm_step_backward dinputs["),
        ("cells/gru-inl.h", "dproduct[2] = dn * r", "dproduct[2] = dn",
         "gru_step_backward dproducts["),
        ("cells/rnn-inl.h", "constant<V>(1) - y * y", "constant<V>(1)",
         "rnn_tanh_step_backward dinputs["),
        ("cells/rhn-inl.h", "dbefore = dh * carry", "dbefore = dh",
         "rhn_carry_step_backward carried["),
        ("cpu/kernels/group_lasso-inl.h", "{ args.of_columns[c] = value; }", "{}",
         "scale["),
        ("cpu/kernels/vec_scalar-inl.h", " + (bits >> 16 & 1)", "", "bfloat16 rounded["),
    ],
    "resets and masks": [
        ("cpu/kernels/step-inl.h", "reset ? zero : dbefore", "dbefore",
         "gru_step_backward carried["),
        ("cpu/kernels/step-inl.h", "V dh = reset_after ? zero : V::load", "V dh = V::load",
         "rnn_relu_step_backward dinputs["),
        ("cpu/kernels/step-inl.h", "before = V::set(0);", "", "lstm_step c["),
        ("cpu/kernels/step-inl.h", "lanes.store(h * lanes.load(args.state_mask",
         "lanes.store(h + lanes.load(args.state_mask", "rhn_step masked["),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mutants", MUTANTS)
def test_the_kernel_test_notices_a_wrong_kernel(tmp_path, mutants):
    """A program that cannot fail tests nothing: it must name each broken operation of a copy."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name, right, wrong, _ in MUTANTS[mutants]:
        path = tmp_path / "csrc" / name
        text = path.read_text()
        assert text.count(right) == 1, right
        path.write_text(text.replace(right, wrong))
    program = tmp_path / "kernels_test"
    kernels = tmp_path / "csrc/cpu/kernels"
    sources = [kernels / "isa_scalar.cpp", kernels / "dispatch.cpp"]
    # Only the scalar table is built in: the others are declared, and defined away.
    sources[1].write_text(sources[1].read_text().replace("__x86_64__", "NOT_HERE"))
    flags = [*FLAGS[:-1], str(tmp_path / "csrc"), "-w"]
    subprocess.run(["c++", *flags, *map(str, sources), str(TEST), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "scalar: FAILED" in result.stdout
    lines = result.stdout.splitlines()
    missed = [m for m in MUTANTS[mutants] if not any(line.startswith(m[-1]) for line in lines)]
    assert missed == []
