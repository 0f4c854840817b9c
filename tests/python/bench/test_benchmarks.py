"""The benchmarks' pure parts on any machine: statistics, tables, JSON, the report; and that each
program can be imported and says so when there is no GPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))

if not PROGRAMS:
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import report  # noqa: E402
import runs  # noqa: E402
import shapes  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402


def linear_row(variant: str, step: float, m: int = 8192) -> runs.Row:
    times = timing.summarize([step]).as_dict()
    return {
        "m": m,
        "k": 4096,
        "n": 14336,
        "variant": variant,
        "forward_us": times,
        "step_us": times,
        "forward_speedup": 3000 / step,
        "step_speedup": 3000 / step,
        "sqnr_db": 28.6,
    }


def block_row(variant: str, step: float) -> runs.Row:
    return {
        "variant": variant,
        "forward_us": timing.summarize([step / 3]).as_dict(),
        "step_us": timing.summarize([step]).as_dict(),
        "host_ms": 4.0,
        "peak_gib": 4.1,
        "sqnr_db": None,
        "speedup": 38000 / step,
        "peak_ratio": 1.0,
    }


FACTS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580",
    "cuda": "13.0",
    "torch": "2.11.0",
    "cublaslt": 130100,
    "commit": "abc1234",
}
LINEAR = [
    linear_row("bf16", 3000),
    linear_row("fp8 tensorwise", 1800),
    linear_row("bf16", 900, 2048),
]
BLOCK = [
    block_row("bf16", 38000),
    block_row("fp8 tensorwise", 25000),
    block_row("TE 2 current", 27000),
]


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
    path = runs.write("linear", LINEAR, FACTS, {"torchao": "No module named 'torchao'"}, tmp_path)
    assert path.name == "linear_h100.json"
    run = runs.read(path)
    assert run["rows"] == LINEAR
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
    assert len(shapes.linear_shapes()) == 8
    assert set(shapes.linear_shapes(quick=True)) < set(shapes.linear_shapes())
    assert shapes.LinearShape(2, 3, 5).flops == 60
    assert shapes.BlockShape().head_dim == 128
    sizes = [rows * shapes.QUANTIZE_COLUMNS * 2 / 1e6 for rows in shapes.QUANTIZE_ROWS]
    assert [round(size) for size in sizes] == [17, 67, 134, 235]


def test_report_readme_table():
    measured = {
        "linear_h100": {"benchmark": "linear", "header": FACTS, "rows": LINEAR},
        "block_h100": {"benchmark": "block", "header": FACTS, "rows": BLOCK},
    }
    table = report.readme_table(measured)
    assert "| M=8192, 4096 → 14336 | 3 | 1.67x |" in table
    assert "| fp8 tensorwise | 8.33 | 25 | 1.52x | 1.00x |" in table
    assert "NVIDIA H100 80GB HBM3, driver 580" in table
    assert "`benchmarks/results/block_h100.json`" in table
    assert "make bench" in report.readme_table({})


def test_report_replaces_between_markers():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.replace_between(document, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.replace_between(once, "new") == once
    for broken in ("nothing", report.BEGIN, f"{report.END} {report.BEGIN}"):
        with pytest.raises(ValueError, match="lacks the lines"):
            report.replace_between(broken, "new")


def test_report_finds_regressions():
    old = {"benchmark": "linear", "header": FACTS, "rows": LINEAR}
    slower = [linear_row("bf16", 3000), linear_row("fp8 tensorwise", 2100)]
    assert report.regressions(old, old) == []
    (found,) = report.regressions(old | {"rows": slower}, old)
    assert "fp8 tensorwise" in found
    host = {"benchmark": "host", "rows": [{"variant": "fp8 rowwise", "step_ratio": 1.4}]}
    worse = {"benchmark": "host", "rows": [{"variant": "fp8 rowwise", "step_ratio": 1.8}]}
    assert len(report.regressions(worse, host)) == 1
    assert report.regressions(host, worse) == []


def test_report_program(tmp_path):
    """The whole of it: tables on the screen, plots, and the exit code of the check."""
    runs.write("linear", LINEAR, FACTS, {}, tmp_path)
    runs.write("block", BLOCK, FACTS, {}, tmp_path)
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--results", str(tmp_path)]
    done = subprocess.run(
        [*command, "--plots", "--check", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "fp8 tensorwise" in done.stdout
    assert "no regression" in done.stdout
    for name in ("linear_h100.png", "block_h100.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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
