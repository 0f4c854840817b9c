"""The benchmarks' pure parts on any machine: statistics, tables, JSON, shapes; and that each
program can be imported and says so when there is no GPU."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))

if not PROGRAMS:
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import peers  # noqa: E402
import runs  # noqa: E402
import shapes  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580", "commit": "abc1234"}
ROWS = [{"variant": "bf16", "step_us": timing.summarize([3000]).as_dict()}]


def test_summarize_median_and_deciles():
    found = timing.summarize(float(x) for x in [*range(1, 101), 10_000])
    assert found.median == 51
    assert (found.low, found.high) == (11, 91)
    assert found.repeats == 101
    assert found.spread == pytest.approx(80 / 51)


def test_summarize_one_and_none():
    assert timing.summarize([7.0]) == timing.Measurement(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no times"):
        timing.summarize([])


def test_sqnr():
    exact = torch.ones(100)
    assert timing.sqnr(exact + 0.01, exact) == pytest.approx(40, abs=0.01)
    assert timing.sqnr(exact, exact) is None
    with pytest.raises(ValueError, match="NaN"):
        timing.sqnr(exact * float("nan"), exact)


def test_tables_align_and_format():
    lines = tables.text(
        ["name", "us"], [["first", 1234.56], ["b", 0.12345], ["none", None]]
    ).splitlines()
    assert lines == ["name      us", "-----  -----", "first   1235", "b      0.123", "none"]
    assert tables.markdown(["a", "b"], [["x", 1.5]]) == "| a | b |\n| --- | ---: |\n| x | 1.5 |"
    assert tables.ratio(1.523) == "1.52x"
    assert tables.ratio(None) == ""


def test_results_round_trip(tmp_path):
    path = runs.write("linear", ROWS, FACTS, {"torchao": "No module named 'torchao'"}, tmp_path)
    assert path.name == "linear_h100.json"
    run = runs.read(path)
    assert run["rows"] == ROWS
    assert run["header"] == FACTS
    assert run["skipped"] == {"torchao": "No module named 'torchao'"}


def test_results_refuse_other_json_and_nan(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="lacks benchmark, header"):
        runs.read(tmp_path / "other.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        runs.write("x", [{"value": float("nan")}], FACTS, {}, tmp_path)


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx"),
        ("", "none"),
    ],
)
def test_results_slug(gpu, slug):
    assert runs.slug(gpu) == slug


def test_results_header_names_everything():
    assert set(runs.header()) == {
        *("gpu", "driver", "cuda", "torch", "cublaslt", "fp8", "commit", "command")
    }


def test_shapes():
    assert len(shapes.main_shapes()) == 5
    assert set(shapes.main_shapes(quick=True)) < set(shapes.main_shapes())
    assert len(shapes.sweep_shapes()) == 14
    assert [shape.m for shape in shapes.sweep_shapes(quick=True)] == [512, 8192] * 2
    assert shapes.LinearShape(2, 3, 5).flops == 60
    assert shapes.BlockShape().head_dim == shapes.LLAMA_70B.head_dim == 128
    sizes = [rows * shapes.QUANTIZE_COLUMNS * 2 / 1e6 for rows in shapes.QUANTIZE_ROWS]
    assert [round(size) for size in sizes] == [17, 67, 134, 235]


def test_decoder_cases():
    cases = shapes.decoder_cases()
    assert [str(case) for case in cases] == [
        "8B, 2 × 4096",
        "8B, 2 × 4096, no RoPE",
        "8B, 4 × 2048",
        "70B, 2 × 4096",
        "70B, 4 × 2048",
    ]
    assert {case.shape.rows for case in cases} == {8192}
    assert {name for case in cases for name in case.peers} <= set(peers.PEERS)
    assert shapes.decoder_cases(quick=True)[0].peers == ()


@pytest.mark.parametrize("program", PROGRAMS)
def test_benchmark_without_gpu(program, monkeypatch, capsys):
    """Exit code 2 and a sentence, never a traceback; --help works anywhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(argument: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [program, argument])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(BENCHMARKS / f"{program}.py"), run_name="__main__")
        printed = capsys.readouterr()
        return stopped.value.code, printed.out + printed.err

    code, printed = run("--quick")
    assert code == runs.NO_GPU
    assert "needs a CUDA GPU" in printed
    code, printed = run("--help")
    assert code == 0
    assert "--quick" in printed
