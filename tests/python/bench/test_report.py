"""What is made of the benchmarks' JSON: the tables of README.md and docs/, plots, and the check
against earlier runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import documents  # noqa: E402
import regressions  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import sections  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402

import fp8  # noqa: E402


def linear_row(variant: str, step: float, m: int = 8192, sweep: str = "main") -> runs.Row:
    times = timing.summarize([step]).as_dict()
    return {
        "sweep": sweep,
        "autotuned": False,
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


def block_row(variant: str, step: float, context: int = 4096) -> runs.Row:
    return {
        "model": "8B",
        "layers": 2,
        "sequences": 8192 // context,
        "context": context,
        "rotary": True,
        "variant": variant,
        "autotuned": variant.startswith("fp8"),
        "forward_us": timing.summarize([step / 3]).as_dict(),
        "step_us": timing.summarize([step]).as_dict(),
        "host_ms": 4.0,
        "peak_gib": 4.1,
        "sqnr_db": None,
        "speedup": 38000 / step,
        "peak_ratio": 1.0,
    }


def accumulate_row(variant: str, micro: float, of_uncached: float | None = None) -> runs.Row:
    return {
        "micro_batches": 4,
        "sequences": 1,
        "context": 2048,
        "variant": variant,
        "autotuned": False,
        "round_us": timing.summarize([4 * micro]).as_dict(),
        "micro_us": micro,
        "speedup": 10000 / micro,
        "of_uncached": of_uncached,
        "peak_gib": 3.0,
        "peak_ratio": 1.0,
    }


def breakdown_row(variant: str, gemm: float) -> runs.Row:
    return {
        "case": "M=8192, 4096 → 14336",
        "variant": variant,
        "autotuned": False,
        "span_us": 4000.0,
        "gemm_us": gemm,
        "quantize_us": 400.0,
        "attention_us": 0.0,
        "other_us": 0.0,
        "rest_us": 3600.0 - gemm,
        "kernels": 9,
        "host_us": 300.0,
        "speedup": 1.5,
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
    linear_row("bf16", 900, 2048, "tokens"),
    linear_row("fp8 tensorwise", 700, 2048, "tokens"),
    linear_row("bf16", 3000, 8192, "tokens"),
    linear_row("fp8 tensorwise", 1900, 8192, "tokens"),
]
BLOCK = [
    block_row("bf16", 38000),
    block_row("fp8 tensorwise", 25000),
    block_row("TE 2 current", 27000),
    block_row("bf16", 36000, 2048),
    block_row("fp8 tensorwise", 24000, 2048),
]
RUNS = {
    "linear_h100": {"benchmark": "linear", "header": FACTS, "rows": LINEAR},
    "block_h100": {"benchmark": "block", "header": FACTS | {"autotuned": True}, "rows": BLOCK},
    "accumulate_h100": {
        "benchmark": "accumulate",
        "header": FACTS,
        "rows": [
            accumulate_row("bf16", 10000),
            accumulate_row("fp8 tensorwise", 8000),
            accumulate_row("fp8 tensorwise, cached weights", 7600, 8000 / 7600),
        ],
    },
    "breakdown_h100": {
        "benchmark": "breakdown",
        "header": FACTS | {"wall_s": 20.5},
        "rows": [breakdown_row("bf16", 3500), breakdown_row("fp8 tensorwise", 1800)],
    },
    "host_h100": {
        "benchmark": "host",
        "header": FACTS,
        "rows": [
            {
                "variant": "fp8 rowwise",
                "bias": bias,
                "step_ratio": 1.4,
                **dict.fromkeys(
                    ("forward_us", "graph_us", "step_us"), timing.summarize([80.0]).as_dict()
                ),
            }
            for bias in (False, True)
        ],
    },
}


def test_page_has_a_section_of_each_benchmark(tmp_path):
    (tmp_path / "linear_h100.png").touch()
    text = sections.everything(RUNS, tmp_path)
    assert text.startswith("### NVIDIA H100 80GB HBM3\n\n#### Decoder layers\n\n")
    assert set(sections.TITLES) == set(sections.SECTIONS)
    assert "| speed / memory | 8B, 2 × 4096 | 8B, 4 × 2048 |" in text
    assert "| bf16 | 38 ms / 4.1 GiB | 36 ms / 4.1 GiB |" in text
    assert "| fp8 tensorwise | 1.52x / 1.00x | 1.58x / 1.00x |" in text
    assert "| TE 2 current | 1.41x / 1.00x |  |" in text
    assert "| 8192, 4096 → 14336 | 3 ms | 1.67x |" in text  # of the main shapes only
    assert "| fp8 tensorwise, cached weights | 1.32x / 1.00x |" in text
    assert "by class of kernels: bf16, fp8 tensorwise." in text
    assert "| fp8 rowwise | 80 (1.40x) | 80 (1.40x) |" in text
    assert "cuBLASLt 130100, fp8.autotune, commit abc1234</sub>" not in text
    assert "cuBLASLt 130100, fp8.autotune, commit abc1234; `benchmarks/results/block_h1" in text
    assert "(../benchmarks/results/linear_h100.png)" in text
    assert "breakdown_h100.png" not in text  # was not drawn
    assert "make bench" in sections.everything({}, tmp_path)


def test_page_of_two_gpus(tmp_path):
    other = RUNS["block_h100"] | {"header": FACTS | {"gpu": "NVIDIA H200"}}
    text = sections.everything(RUNS | {"block_h200": other}, tmp_path)
    assert text.index("### NVIDIA H100") < text.index("### NVIDIA H200")
    assert text.count("Llama 3 decoder layers") == 2


def moe_row(variant: str, step: float, peak: float | None) -> runs.Row:
    return {
        **shapes.MIXTRAL._asdict(),
        "variant": variant,
        "forward_us": timing.summarize([step / 4]).as_dict(),
        "step_us": timing.summarize([step]).as_dict(),
        "forward_speedup": 30000 / step,
        "step_speedup": 30000 / step,
        "host_us": None,
        "host_ratio": None,
        "peak_gib": peak,
        "peak_ratio": peak and peak / 10,
        **dict.fromkeys(("sqnr_db", "sqnr_dx_db", "sqnr_dw_db")),
    }


def test_page_of_experts(tmp_path):
    rows = [
        moe_row("bf16", 30000, 10.0),
        moe_row("fp8 rowwise", 20000, 9.0),
        moe_row("GEMMs alone, fp8", 15000, None),
    ]
    run = {"benchmark": "moe", "header": FACTS, "rows": rows}
    text = sections.everything({"moe_h100": run}, tmp_path)
    assert "Mixtral-8x7B: 8 experts, 4096 → 14336, top 2." in text
    assert "| bf16 | 30 / 7.5 ms / 10.0 GiB |" in text
    assert "| fp8 rowwise | 1.50x / 1.50x / 0.90x |" in text
    assert "| GEMMs alone, fp8 | 2.00x / 2.00x |" in text
    slower = run | {"rows": [moe_row("fp8 rowwise", 25000, 9.0)]}
    assert len(regressions.regressions(slower, run)) == 2


def test_page_of_frozen_experts(tmp_path):
    def row(variant, time, of_copy):
        facts = {"mixture": "Mixtral-8x7B", "tokens": 4, "experts_used": 6, "variant": variant}
        times = {"time_us": {"median": time}, "speedup": 100 / time, "of_weight_copy": of_copy}
        return facts | times | {"sqnr_db": None}

    rows = [
        row("bf16", 100.0, 0.25),
        row("frozen rowwise", 40.0, 0.625),
        row("frozen blockwise", 50.0, None),
    ]
    run = {"benchmark": "experts", "header": FACTS, "rows": rows}
    text = sections.everything({"experts_h100": run}, tmp_path)
    assert "| speed / of a copy | Mixtral-8x7B, 4 (6) |" in text
    assert "| bf16 | 100 us |" in text
    assert "| frozen rowwise | 2.50x / 62% |" in text
    assert "| frozen blockwise | 2.00x |" in text
    slower = run | {"rows": [row("frozen rowwise", 50.0, 0.5)]}
    assert len(regressions.regressions(slower, run)) == 1


def test_blocks_are_replaced_between_their_lines():
    document = "before\n<!-- some:begin -->\nold\n<!-- some:end -->\nafter\n"
    once = documents.replace_between(document, "new", "some")
    assert once == "before\n<!-- some:begin -->\nnew\n<!-- some:end -->\nafter\n"
    assert documents.replace_between(once, "new", "some") == once
    turned = "<!-- some:end --> <!-- some:begin -->"
    for broken in ("nothing", "<!-- some:begin -->", turned, document.replace("some", "other")):
        with pytest.raises(ValueError, match="lacks the lines <!-- some:begin --> and"):
            documents.replace_between(broken, "new", "some")


def test_pages_have_what_the_committed_results_say():
    """And the library's recipes; `python benchmarks/report.py --readme` writes them."""
    for path, text in documents.rendered(report.load(runs.RESULTS)).items():
        assert path.read_text() == text, f"{path} is not what report.py --readme makes of it"
    for name in fp8.RECIPES:
        assert f"| `{name}` |" in documents.recipes()


def test_blocks_are_written_to_the_files_that_have_them(tmp_path):
    for file, name in documents.BLOCKS:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as page:
            page.write(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n")
    written = documents.write(RUNS, tmp_path, tmp_path)
    assert set(written) == {tmp_path / file for file, _ in documents.BLOCKS}
    assert "No results yet" in (tmp_path / "README.md").read_text()  # of whole steps
    devices = (tmp_path / "docs/devices.md").read_text()
    line = "| `linear_h100.json` | NVIDIA H100 80GB HBM3 | abc1234 | `tensorwise` |"
    assert line in devices
    assert "| `breakdown_h100.json` | NVIDIA H100 80GB HBM3 | abc1234 | `tensorwise` |" in devices


def test_figures_on_pages_stand_in_blocks():
    """A speed beside bf16, "1.38x", comes from a file; notes from development have their page."""
    for path in [runs.ROOT / "README.md", *(runs.ROOT / "docs").glob("*.md")]:
        if path.name == "measurements.md":
            continue
        text = re.sub(r"<!-- (\w+):begin -->.*<!-- \1:end -->", "", path.read_text(), flags=re.S)
        assert re.findall(r"\d\.\d+x\b|\d TFLOP|\d GiB\b", text) == [], path


def test_regressions_of_our_rows():
    old = RUNS["linear_h100"]
    slower = [linear_row("bf16", 3300), linear_row("fp8 tensorwise", 2100)]
    assert regressions.regressions(old, old) == []
    (found,) = regressions.regressions(old | {"rows": slower}, old)
    assert found == "linear main, 8192, 4096, 14336, fp8 tensorwise, step_speedup: 1.429, was 1.667"


def test_regressions_where_smaller_is_better():
    host = RUNS["host_h100"]
    worse = host | {"rows": [row | {"step_ratio": 1.8} for row in host["rows"]]}
    assert len(regressions.regressions(worse, host)) == 2
    assert regressions.regressions(host, worse) == []
    block = RUNS["block_h100"]
    fatter = block | {"rows": [row | {"peak_ratio": 1.2} for row in block["rows"]]}
    found = regressions.regressions(fatter, block)
    assert len(found) == 2
    assert all("fp8 tensorwise, peak_ratio" in line for line in found)


def test_check_compares_something():
    well, text = regressions.check(RUNS, RUNS)
    assert well
    assert "14 figures of 5 runs compared, 0 worse" in text
    well, text = regressions.check(RUNS, {"linear_h200": RUNS["linear_h100"]})
    assert not well
    assert "nothing to compare" in text


def test_every_benchmark_has_ratios_and_a_table():
    names = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert names == set(report.TABLES) == set(regressions.RATIOS)
    script = (BENCHMARKS.parent / "scripts" / "bench.sh").read_text()
    (listed,) = [line for line in script.splitlines() if line.startswith("benchmarks=")]
    assert set(listed.removeprefix("benchmarks=(").rstrip(")").split()) == names


def test_report_ignores_runs_of_an_earlier_form(tmp_path, capsys):
    rows = [{key: value for key, value in row.items() if key != "sweep"} for row in LINEAR]
    runs.write("linear", rows, FACTS, {}, tmp_path)
    runs.write("block", BLOCK, FACTS, {}, tmp_path)
    runs.write("gone", [{}], FACTS, {}, tmp_path)
    assert list(report.load(tmp_path)) == ["block_h100"]
    printed = capsys.readouterr().err
    assert "linear_h100.json: lacks sweep" in printed
    assert "gone_h100.json: unknown benchmark" in printed


def test_report_program(tmp_path):
    """The whole of it: tables on the screen, plots, and the exit code of the check."""
    for run in RUNS.values():
        runs.write(run["benchmark"], run["rows"], run["header"], {}, tmp_path)
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--results", str(tmp_path)]

    def report_on(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)

    done = report_on("--plots", "--check", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "fp8 tensorwise" in done.stdout
    assert "no regression" in done.stdout
    assert re.search(r"breakdown_h100 +20.5", done.stdout)
    for name in ("linear_h100.png", "block_h100.png", "breakdown_h100.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    faster = tmp_path / "faster"
    rows = [row | {"step_speedup": 2 * row["step_speedup"]} for row in LINEAR]
    runs.write("linear", rows, FACTS, {}, faster)
    done = report_on("--check", str(faster))
    assert done.returncode == 1
    assert "3 figures of 1 runs compared, 3 worse" in done.stdout
