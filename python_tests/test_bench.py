# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, checks before it times, and writes what it promises."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
COLUMNS = (
    "series engine weights layers T B threads ms_p50 ms_p20 ms_p80 gflops roofline "
    "device isa torch git date onnxruntime openvino"
)
FORMATS = ("float32", "float16", "bfloat16", "int8")


def run(*args):
    """In a process of its own: the engines' packages warn, and keep threads."""
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "inference.csv"
    args = ["-m", "iss_kernels", "bench", "--quick", "--threads", "1", "--seconds", "0.02"]
    done = run(*args, "--output", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def installed(*packages):
    return all(importlib.util.find_spec(package) is not None for package in packages)


def test_bench_writes_a_row_for_every_engine(quick):
    path, out = quick
    text = path.read_text()
    assert text.splitlines()[0].split(",") == COLUMNS.split()
    rows = list(csv.DictReader(text.splitlines()))
    theirs = {"nn.LSTM", "nn.LSTM no oneDNN"}
    if installed("onnxruntime", "onnx"):
        theirs |= {"ONNX Runtime", "ONNX Runtime int8"}
    stream = theirs | {f"Stream {weights}" for weights in FORMATS}
    layer = theirs | {f"prepared {weights}" for weights in FORMATS} | {"torch int8", "ISSLSTM"}
    if installed("openvino", "onnx"):
        layer |= {"OpenVINO", "OpenVINO bfloat16"}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        layer |= {"nn.LSTM bfloat16", "nn.LSTM autocast"}
    assert {row["engine"] for row in rows if row["series"] == "stream"} == stream
    assert {row["engine"] for row in rows if row["series"] == "layer"} == layer
    assert len(rows) == len(stream) + 2 * len(layer)
    for column in ("ms_p50", "ms_p20", "ms_p80", "gflops", "roofline"):
        assert all(float(row[column]) > 0 for row in rows)
    assert out.count("layer ") == 2 and out.count("stream ") == 1


def test_bench_writes_a_row_for_every_engine_of_the_gru(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "inference_gru.csv"
    args = ["-m", "iss_kernels", "bench", "--cell", "gru", "--quick", "--threads", "1"]
    done = run(*args, "--seconds", "0.02", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    theirs = {"nn.GRU"} | ({"ONNX Runtime"} if installed("onnxruntime", "onnx") else set())
    stream = theirs | {f"Stream {weights}" for weights in FORMATS}
    layer = theirs | {f"prepared {weights}" for weights in FORMATS} | {"torch int8", "ISSGRU"}
    if installed("openvino", "onnx"):
        layer |= {"OpenVINO"}
    assert {row["engine"] for row in rows if row["series"] == "stream"} == stream
    assert {row["engine"] for row in rows if row["series"] == "layer"} == layer
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- bench_gru:begin -->\n<!-- bench_gru:end -->\n")
    done = run(BENCH / "report.py", path, "--plots", tmp_path, "--docs", page)
    assert done.returncode == 0, done.stderr
    assert "| nn.GRU | ONNX Runtime | OpenVINO | ours | speed-up |" in page.read_text()


@pytest.mark.parametrize("cell, module", [("lstm", "LSTM"), ("gru", "GRU")])
def test_the_training_benchmark_writes_a_row_for_every_provider(tmp_path, cell, module):
    path = tmp_path / "new" / "training.csv"
    args = ["--cell", cell, "--quick", "--threads", "1", "--output", path]
    done = run(BENCH / "bench_training.py", *args)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    providers = {f"nn.{module}", f"ISS{module}", f"ISS{module} recompute"}
    if cell == "lstm":
        providers |= {"nn.LSTM without oneDNN"}
    assert len(rows) == 3 * len(providers) and {row["provider"] for row in rows} == providers
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    assert {row["packed"]: row["roofline"] != "" for row in rows} == {"0": True, "1": False}
    assert "packed x1: geometric mean" in done.stdout


def test_the_benchmark_of_precisions_compares_engines_of_the_same(tmp_path):
    path, page = tmp_path / "precision-here.csv", tmp_path / "page.md"
    args = ["--quick", "--threads", "1", "--seconds", "0.02", "--output", path]
    done = run(BENCH / "bench_precision.py", *args)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["precision"] for row in rows if row["task"] == "inference"} == set(FORMATS)
    trained = {(row["engine"], row["precision"]) for row in rows if row["task"] == "training"}
    assert {("nn.LSTM", "float32"), ("ISSLSTM", "float32")} <= trained
    blocks = {"precision": list(FORMATS), "precision-times": ["64; 10", "64; 20"]}
    for block, second in blocks.items():
        page.write_text(f"<!-- {block}:begin -->\n<!-- {block}:end -->\n")
        done = run(BENCH / "bench_precision.py", "--docs", page, "--csv", path)
        assert done.returncode == 0, done.stderr
        lines = [line.split(" | ") for line in page.read_text().splitlines() if line[:2] == "| "]
        assert [line[1] for line in lines if "machine" not in line[0]] == second
    page.write_text("")
    done = run(BENCH / "bench_precision.py", "--docs", page, "--csv", path)
    assert done.returncode == 2
    assert "expected <!-- precision or precision-times:begin -->" in done.stderr


def test_the_benchmark_of_resets_compares_with_split_segments(tmp_path):
    path = tmp_path / "new" / "resets.csv"
    args = ["--cell", "gru", "--quick", "--threads", "1", "--output", path]
    done = run(BENCH / "bench_resets.py", *args)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {(row["provider"], row["resets"]) for row in rows} == {
        (provider, resets) for provider in ("nn.GRU", "ISSGRU") for resets in ("0", "0.03")
    }
    assert len(rows) == 8 and all(float(row["ms_p50"]) > 0 for row in rows)


def test_the_benchmark_of_the_paper_s_model_times_every_format(tmp_path):
    path = tmp_path / "new" / "ptb.csv"
    done = run(BENCH / "bench_ptb.py", "--quick", "--threads", "1", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    ours = [("iss_kernels", w) for w in ("float32", "float16", "bfloat16", "int8")]
    torchs = [("torch", "float32")]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        torchs += [("torch", "bfloat16"), ("iss_kernels", "bfloat16 model")]
    assert [(row["provider"], row["weights"]) for row in rows] == [*torchs, *ours]
    assert all(float(row["ms_p50"]) > 0 for row in rows)


def test_the_benchmark_of_the_paper_s_reader_times_every_format(tmp_path):
    path = tmp_path / "new" / "squad.csv"
    done = run(BENCH / "bench_squad.py", "--quick", "--threads", "1", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    ours = [("prepared", weights) for weights in ("float32", "bfloat16", "int8")]
    assert [(row["provider"], row["weights"]) for row in rows] == [
        ("nn.LSTM", "float32"), ("ISSLSTM", "float32"), *ours
    ]  # fmt: skip
    assert all(float(row["ms_p50"]) > 0 for row in rows)


def test_the_benchmark_of_linear_layers_times_every_format(tmp_path):
    path = tmp_path / "linear.csv"
    done = run(BENCH / "bench_linear.py", "--quick", "--threads", "1", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    timed = [("iss_kernels", w) for w in ("float32", "float16", "bfloat16", "int8")]
    timed += [("torch", "float32"), ("torch", "int8")]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        timed.append(("torch", "bfloat16"))
    assert sorted((row["provider"], row["weights"]) for row in rows) == sorted(timed)
    assert all(float(row["ms_p50"]) > 0 for row in rows)


def test_the_lasso_benchmark_writes_a_row_for_every_kernel(tmp_path):
    path = tmp_path / "new" / "lasso.csv"
    done = run(BENCH / "bench_lasso.py", "--quick", "--threads", "1", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    kernels = {"norms", "gradient", "penalty", "proximal", "threshold"}
    assert {row["kernel"] for row in rows} == kernels | {"training step", "with the lasso"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    assert all(float(row["gbps"]) > 0 for row in rows if row["kernel"] in kernels)


def test_the_gpu_benchmark_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(BENCH / "bench_cuda.py", "--quick")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "bench_cuda: needs a CUDA device; there is none here\n"


def test_the_gpu_benchmark_writes_a_row_for_every_engine(tmp_path):
    """Tried on the CPU: what differs on a GPU is the clock, the graphs and the kernels."""
    path = tmp_path / "new" / "cuda.csv"
    args = ["--quick", "--device", "cpu", "--precisions", "float32", "--seconds", "0.01"]
    done = run(BENCH / "bench_cuda.py", *args, "--output", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    layer = [row for row in rows if row["series"] == "layer"]
    points = {(row["mode"], row["H"], row["B"], row["T"]) for row in layer}
    assert points == {
        (mode, *shape)
        for mode in ("forward", "training")
        for shape in (("32", "1", "8"), ("100", "8", "16"))
    }
    assert {row["engine"] for row in layer} == {"nn.LSTM", "ISSLSTM"} and len(layer) == 8
    assert {bool(row["tier"]) for row in layer if row["engine"] == "ISSLSTM"} == {True}
    kernels = {"w.sum()", "norms", "norms, torch", "gradient", "gradient, torch"}
    assert {row["engine"] for row in rows if row["series"] == "lasso"} == kernels
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    assert "forward float32: geometric mean" in done.stdout
    assert path.with_suffix(".svg").exists() == installed("matplotlib")


def test_the_gpu_report_compares_the_best_call_of_each_side(tmp_path):
    path = tmp_path / "cuda.csv"
    times = {("nn.LSTM", 0): 4, ("nn.LSTM", 1): 3, ("ISSLSTM", 0): 5, ("ISSLSTM", 1): 1.5}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ("series", "engine", "mode", "precision", "H", "B", "T", "graph", "ms_p50")
        writer.writerow(columns)
        for (engine, graph), ms in times.items():
            for H, factor in ((64, 1), (128, 4 if engine == "ISSLSTM" else 1)):
                row = ["layer", engine, "forward", "tf32", H, 1, 128, graph, ms * factor]
                writer.writerow(row)
    done = run(BENCH / "bench_cuda.py", "--report", "--output", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "forward tf32: geometric mean 1.00, 1 of 2 points below 0.97, least 0.50 at H128 B1 T128"
    )


def test_bench_resumes_after_what_it_has(quick):
    path, _ = quick
    text = path.read_text()
    args = ["-m", "iss_kernels", "bench", "--quick", "--threads", "1", "--resume"]
    done = run(*args, "--output", path)
    assert done.returncode == 0, done.stderr
    assert "layer " not in done.stdout and path.read_text() == text


@pytest.fixture
def checkout(tmp_path):
    """A copy of the benchmarks with their CSVs of record, and {name: bytes} of these."""
    shutil.copytree(BENCH, tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    results = tmp_path / "bench" / "results"
    return tmp_path, {path.name: path.read_bytes() for path in results.iterdir()}


def unharmed(checkout):
    folder, before = checkout
    results = folder / "bench" / "results"
    return {path.name: path.read_bytes() for path in results.iterdir()} == before


@pytest.mark.parametrize(
    "script, args",
    [
        ("inference", ["--quick", "--seconds", "0.001"]),
        ("inference", ["--only", "stream", "--hidden", "8", "--seconds", "0.001"]),
        ("resets", ["--quick", "--cell", "gru"]),
    ],
)
def test_a_part_of_a_benchmark_leaves_the_record_alone(checkout, script, args):
    done = run(checkout[0] / "bench" / f"bench_{script}.py", *args, "--threads", "1")
    assert done.returncode == 0, done.stderr
    path = checkout[0] / "build" / "bench" / f"{script}.csv"
    assert f"wrote {path}" in done.stdout and len(path.read_text().splitlines()) > 4
    assert unharmed(checkout) and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "script, args, sentence",
    [
        ("inference", "--threads 0", "--threads: expected a whole number from 1, got '0'"),
        ("inference", "--hidden 0", "--hidden: expected a whole number from 1, got '0'"),
        ("inference", "--seconds nan", "--seconds: expected a number in (0, inf), got 'nan'"),
        ("lasso", "--threads -1", "--threads: expected a whole number from 1, got '-1'"),
        ("rhn", "--depth 0", "--depth: expected a whole number from 1, got '0'"),
        ("ptb", "--batch 0", "--batch: expected a whole number from 1, got '0'"),
        ("ptb", "--sizes 3,4", "--sizes: expected three sizes E,H1,H2, got '3,4'"),
    ],
)
def test_a_benchmark_refuses_a_wrong_number(checkout, script, args, sentence):
    done = run(checkout[0] / "bench" / f"bench_{script}.py", "--quick", *args.split())
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: argument {sentence}\n")
    assert unharmed(checkout)


def test_only_the_whole_benchmark_goes_to_the_record(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    harness = importlib.import_module("harness")
    parser, record = harness.command_line(None, "less"), harness.RESULTS / "x.csv"
    parser.add_argument("--cell", default="lstm")
    parser.add_argument("--batch", type=int, nargs="+", default=(10, 64))
    tried = BENCH.parent / "build" / "bench" / "x.csv"
    for args, path in (
        ("", record), ("--cell gru", record), ("--batch 10 64", record), ("--output y", Path("y")),
        ("--batch 10", tried), ("--quick", tried), ("--threads 77", tried),
    ):  # fmt: skip
        options = parser.parse_args(args.split())
        assert harness.output_of(parser, options, record, free=["cell"]) == path


def test_rows_of_a_benchmark_that_is_stopped_do_not_replace_the_record(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    harness = importlib.import_module("harness")
    path = tmp_path / "x.csv"
    path.write_text("whole")
    with harness.recording(path) as rows:
        rows.append({"ms": 1})
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert (tmp_path / "x.csv.part").read_text() == "ms\n1\n"


def test_bench_resumes_no_other_csv(tmp_path):
    path = tmp_path / "rhn.csv"
    path.write_text("H,D\n1,2\n")
    done = run("-m", "iss_kernels", "bench", "--quick", "--resume", "--output", path)
    assert done.returncode == 2
    assert done.stderr.endswith(f"expected a CSV of this benchmark to resume, got {path}\n")
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "H,D\n1,2\n"


def test_report_fills_the_block_of_a_page(quick, tmp_path):
    pytest.importorskip("matplotlib")
    path, _ = quick
    page, plot = tmp_path / "benchmarks.md", tmp_path / "inference.svg"
    page.write_text("a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nb\n")
    report = [BENCH / "report.py", path, "--plots", tmp_path, "--docs", page]
    done = run(*report)
    assert done.returncode == 0, done.stderr
    assert "points below" in done.stdout and "Stream float32" in done.stdout
    text = page.read_text()
    assert "old" not in text and "| H | B | T |" in text
    assert text.startswith("a\n") and text.endswith("\nb\n")
    first = plot.read_bytes()
    page.write_text("no markers")
    done = run(*report)
    assert done.returncode == 2 and "<!-- bench:begin -->" in done.stderr
    assert plot.read_bytes() == first


@pytest.mark.parametrize(
    "script, page, blocks",
    [
        ("report.py", "docs/benchmarks.md", "bench|bench_gru"),
        ("report_training.py", "docs/training.md", "training"),
        ("bench_contention.py", "docs/servers.md", "contention"),
        ("report_demo.py", "README.md", "demo"),
        ("bench_precision.py", "README.md", "precision"),
        ("bench_precision.py", "docs/benchmarks.md", "precision-times"),
        ("bench_ptb.py", "docs/benchmarks.md", "ptb"),
        ("bench_linear.py", "docs/benchmarks.md", "linear"),
        ("bench_squad.py", "examples/squad/README.md", "squad"),
    ],
)
def test_the_tables_of_the_pages_are_those_of_the_results(tmp_path, script, page, blocks):
    pytest.importorskip("matplotlib")
    committed = (BENCH.parent / page).read_text()
    copy = tmp_path / "page.md"
    block = rf"(<!-- ({blocks}):begin -->\n).*?(<!-- \2:end)"
    copy.write_text(re.sub(block, r"\1\3", committed, flags=re.S))
    assert copy.read_text() != committed
    plots = ["--plots", tmp_path] if script == "report.py" else []
    done = run(BENCH / script, "--docs", copy, *plots)
    assert done.returncode == 0, done.stderr
    assert copy.read_text() == committed


def test_the_picture_of_the_demo_is_that_of_its_result(tmp_path):
    pytest.importorskip("matplotlib")
    plot, committed = tmp_path / "demo.svg", BENCH.parent / "docs" / "demo.svg"
    done = run(BENCH / "report_demo.py", "--plot", plot)
    assert done.returncode == 0, done.stderr
    units = sum(json.loads((BENCH / "results" / "demo.json").read_text())["hidden_after"])
    # Other versions of matplotlib draw other paths; the words are the same.
    drawn, kept = (re.findall(r"<text.*?>([^<]*)</text>", p.read_text()) for p in (plot, committed))
    assert drawn == kept and f"{units} units" in kept
    assert "<dc:date>" not in committed.read_text() and committed.stat().st_size < 60_000


def test_the_table_of_the_demo_shows_what_the_result_holds(tmp_path):
    result = json.loads((BENCH / "results" / "demo.json").read_text())
    for key in ("small_torch_ms", "int8_ms", "perplexity_int8"):
        result.pop(key, None)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    done = run(BENCH / "report_demo.py", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| test perplexity \| [\d.]+ \| [\d.]+ \| [\d.]+ \| - \|\n", done.stdout)
    times = result["torch_ms"]
    result |= {"small_torch_ms": times, "int8_ms": dict.fromkeys(times, 0.1)}
    path.write_text(json.dumps(result | {"perplexity_int8": 50.5}))
    done = run(BENCH / "report_demo.py", path, "--plot", tmp_path / "demo.svg")
    assert done.returncode == 0, done.stderr
    one, speed_up = f"{times['1']:.2f} ms", times["1"] / 0.1
    assert " | 50.50 |\n" in done.stdout and f"| {one} | {one} (1.0x) |" in done.stdout
    assert f" | 0.10 ms ({speed_up:.1f}x) |\n" in done.stdout
