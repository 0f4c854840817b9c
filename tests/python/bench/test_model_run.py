"""Whole runs of bench_model on tiny models, with the CPU in place of the GPU: its rows, what is
skipped and why, what needs Liger, and kernels by kind."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("fp8")
pytest.importorskip("transformers", minversion="5.0")
if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import bench_model
import kernel_times
import liger_process
import model_variants
import peers
import runs
import sections
import sections_model
from small_models import TINY, model_row, tiny


def test_model(run, cases, no_liger):
    ours = ["fp8 tensorwise", "fp8 delayed"]
    cases += [
        tiny("llama", *ours, "torchao tensorwise compiled", "TE delayed", "bf16 + Liger"),
        tiny("llama", "fp8 tensorwise", part="layer", layers=1),
        tiny("mixtral", "fp8 tensorwise"),
    ]
    written = run("model", bench_model, "--repeats", "2")
    rows = [row for row in written["rows"] if not row["variant"].startswith(("TE", "torchao"))]
    assert [row["variant"] for row in rows] == [
        *("bf16", *ours, "bf16, last"),
        *("bf16", "fp8 tensorwise", "bf16, last") * 2,
    ]
    assert written["skipped"]["bf16 + Liger"] == "No module named 'liger_kernel'"
    assert "unfinished" not in written["header"]
    for row in rows:
        assert row["step_us"]["repeats"] == 2
        assert (row["loss"] is None) == (row["part"] == "layer")
        assert (row["without_optimizer_us"] is None) == (row["part"] == "layer")
        assert (row["host_ms"] is None) == (row["model"] == "Tiny mixtral")
        assert row["peak_ratio"] > 0
        assert row["profile"] is None
    losses = [row["loss"] for row in rows[: len(ours) + 2]]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)
    assert losses[0] == losses[-1]
    speeds = [row["step_us"]["median"] for row in rows[:2]]
    assert rows[1]["speedup"] == pytest.approx(speeds[0] / speeds[1])


def test_without_transformers(run, cases, missing, capsys):
    missing("transformers")
    cases.append(tiny("llama"))
    with pytest.raises(AssertionError):
        run("model", bench_model)
    assert "every model: No module named 'transformers'" in capsys.readouterr().out


def test_time_limit(run, cases, no_liger, monkeypatch):
    """bf16 of a case that has begun is measured, the rest is named."""
    cases += [tiny("llama", "fp8 tensorwise", "fp8 delayed"), tiny("mixtral", "fp8 tensorwise")]
    now = iter([0, 1, 2, 11, 12, 13, 14, 15, 16, 17])
    clock = types.SimpleNamespace(
        monotonic=lambda: next(now), perf_counter=bench_model.time.perf_counter
    )
    monkeypatch.setattr(bench_model, "time", clock)
    written = run("model", bench_model, "--repeats", "1", "--time-limit", "10")
    assert [row["variant"] for row in written["rows"]] == ["bf16", "bf16, last"]
    assert written["skipped"] == {
        "fp8 tensorwise at Tiny llama, 2 layers, 2 × 16": bench_model.LATE,
        "fp8 delayed at Tiny llama, 2 layers, 2 × 16": bench_model.LATE,
        "Tiny mixtral, 2 layers, 2 × 16": bench_model.LATE,
    }


@pytest.fixture
def failing(monkeypatch):
    def fail(model):
        raise RuntimeError("no such kernel\nand so on")

    return lambda name: monkeypatch.setitem(
        model_variants.VARIANTS, name, lambda: peers.Peer(name, fail)
    )


def test_peer_that_fails_is_named(run, cases, failing):
    failing("torchao tensorwise compiled")
    cases.append(tiny("llama", "torchao tensorwise compiled"))
    written = run("model", bench_model, "--repeats", "1")
    name = "torchao tensorwise compiled at Tiny llama, 2 layers, 2 × 16"
    assert written["skipped"] == {name: "no such kernel"}
    assert [row["variant"] for row in written["rows"]] == ["bf16", "bf16, last"]


def test_ours_that_fails_is_fatal_and_leaves_what_was_measured(
    run, cases, failing, no_liger, tmp_path
):
    failing("fp8 tensorwise")
    cases += [tiny("llama"), tiny("mixtral", "fp8 tensorwise")]
    with pytest.raises(RuntimeError, match="no such kernel"):
        run("model", bench_model, "--repeats", "1")
    left = runs.read(tmp_path / "model_h100.json")
    assert [row["model"] for row in left["rows"]] == ["Tiny llama"] * 2
    assert left["header"]["unfinished"] is True
    assert "a run that was not finished" in sections.describe(left["header"] | {"cublaslt": 0})


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger that patches transformers' module; its calls."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb  # given back, whichever model the patch was for
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)
    calls = []

    def apply_to(name):
        def apply(**options):
            calls.append((name, options))
            modeling_llama.apply_rotary_pos_emb = rope

        return apply

    def rope(q, k, cos, sin, **unused):
        calls.append("rope")
        return q, k

    fake = types.ModuleType("liger_kernel.transformers")
    for name in TINY:
        setattr(fake, f"apply_liger_kernel_to_{name}", apply_to(name))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    monkeypatch.setattr(model_variants, "version", lambda name: "9")
    return calls


def test_liger_in_its_own_process(run, cases, liger):
    """What that process does: bf16 runs unpatched, in the second case too."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    case = tiny("llama", "fp8 tensorwise", "bf16 + Liger", "fp8 tensorwise + Liger")
    cases += [case, case._replace(context=8), tiny("mixtral", "fp8 tensorwise")]
    written = run("model", bench_model, "--repeats", "1", "--liger")
    names = ["bf16", "bf16 + Liger 9", "fp8 tensorwise + Liger 9"]
    assert [row["variant"] for row in written["rows"]] == names * 2
    assert modeling_llama.apply_rotary_pos_emb is original
    applied = [call for call in liger if call != "rope"]
    assert [name for name, _ in applied] == ["llama"] * 4
    assert applied[0][1] == {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    assert liger[0] == applied[0]  # no bf16 step has met a patch before it
    with model_variants.patched(tiny("mixtral")):
        assert liger[-1][1]["swiglu"] is False  # experts stay transformers', or ours


def test_liger_joins_the_run(run, cases, liger, monkeypatch, tmp_path):
    """The command line of the other process, and what is made of its rows."""
    monkeypatch.setattr(bench_model, "find_spec", lambda name: True)
    commands = []

    def process(command, timeout, **settings):
        commands.append(command)
        case = cases[0]
        rows = [
            model_row("bf16", 98.0, case=case.row()),
            model_row("fp8 tensorwise + Liger 9", 60.0, case=case.row()),
        ]
        folder = Path(command[command.index("--output") + 1])
        facts = {"gpu": "NVIDIA H100 80GB HBM3"}
        runs.write("model", rows, facts, {"fp8 delayed + Liger 9 at it": "why"}, folder)
        return subprocess.CompletedProcess(command, 1)

    stand_in = types.SimpleNamespace(
        run=process, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired
    )
    monkeypatch.setattr(liger_process, "subprocess", stand_in)
    cases += [tiny("llama", "fp8 tensorwise + Liger"), tiny("mixtral")]
    written = run("model", bench_model, "--repeats", "1", "--profile", "bf16 + Liger")
    (command,) = commands  # both cases are of one group
    assert command[:5] == [
        sys.executable,
        str(liger_process.PROGRAM),
        "--liger",
        "--models",
        "llama",
    ]
    assert command[command.index("--profile") + 1] == "bf16 + Liger"
    assert command[-2:] == ["--repeats", "1"]
    assert [row["variant"] for row in written["rows"]] == [
        *("bf16", "bf16, last", "bf16, beside Liger", "fp8 tensorwise + Liger 9"),
        *("bf16", "bf16, last"),
    ]
    assert written["skipped"] == {
        "Liger with llama": "its process ended with status 1",
        "fp8 delayed + Liger 9 at it": "why",
    }


def test_variants_of_the_command_line(run, cases, no_liger):
    cases.append(tiny("llama", "fp8 tensorwise", "bf16 compiled"))
    written = run("model", bench_model, "--repeats", "1", "--variants", "fp8 rowwise")
    assert [row["variant"] for row in written["rows"]] == ["bf16", "fp8 rowwise", "bf16, last"]
    with pytest.raises(SystemExit):
        run("model", bench_model, "--variants", "fp8 columnwise")


def test_profile(run, cases, no_liger, monkeypatch):
    found = [
        kernel_times.Kernel("nvjet_tst", 60.0),
        kernel_times.Kernel("void fp8::core::cast_kernel<...>", 10.0),
        kernel_times.Kernel("multi_tensor_apply_kernel<FusedAdam>", 20.0),
        kernel_times.Kernel("elementwise_kernel", 9.0),
        kernel_times.Kernel("Memset (Device)", 1.0, is_kernel=False),
    ]

    def profile(step, steps):
        step()
        return found * steps

    monkeypatch.setattr(kernel_times, "profile", profile)
    cases.append(tiny("llama", "fp8 tensorwise", "fp8 rowwise"))
    written = run("model", bench_model, "--repeats", "1", "--profile")
    rows = {row["variant"]: row["profile"] for row in written["rows"]}
    assert [rows["fp8 rowwise"], rows["bf16, last"]] == [None, None]
    assert rows["bf16"] == rows["fp8 tensorwise"] == {
        "products_us": 60,
        "attention_us": 0,
        "fp8_us": 10,
        "optimizer_us": 20,
        "rest_us": 10,
        "kernels": 4,
        "rest_share": 0.1,
    }  # fmt: skip
    text = sections_model.section(written["rows"])
    assert "| fp8 tensorwise | 0.06 | 0 | 0.01 | 0.02 | 0.01 | 10% | 4 |" in text

    def forbidden(step, steps):
        raise RuntimeError("the profiler saw no kernel")

    kernel_times.profile(lambda: None, 1)
    monkeypatch.setattr(bench_model, "profile", lambda step: forbidden(step, 2))
    written = run("model", bench_model, "--repeats", "1", "--profile", "bf16")
    assert list(written["skipped"]) == ["profile of bf16 at Tiny llama, 2 layers, 2 × 16"]
