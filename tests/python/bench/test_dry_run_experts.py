"""The benchmarks of grouped products and of experts on tiny shapes, with the CPU in place of the
GPU (see test_dry_run.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fp8")
if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import bench_experts
import bench_grouped
import bench_moe
import moe_layer
import runs
import timing
from shapes import GROUPED_RECIPES, MoeShape


def scaled_grouped_mm_anywhere(a, b, scale_a, scale_b, ends, out_dtype, use_fast_accum):
    """a [R, K] and b [E, K, N], or a [N, R] and b [R, K] with scales of each group's rows."""
    count, outs, begin = ends.numel(), [], 0
    for group, end in enumerate(ends.tolist()):
        if b.dim() == 3:
            left, scales = a[begin:end], (scale_a[begin:end], scale_b[group])
            right = b[group]
        else:
            left, right = a[:, begin:end], b[begin:end]
            scales = (scale_a.view(count, -1)[group], scale_b.view(count, -1)[group])
        outs.append((left.float() @ right.float()) * scales[0][:, None] * scales[1])
        begin = end
    return (torch.cat(outs) if b.dim() == 3 else torch.stack(outs)).to(out_dtype)


def test_grouped(run, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm_anywhere)
    cases = (
        bench_grouped.Case("tiny", 4, 128, 256, 256),
        bench_grouped.Case("tiny", 4, 128, 256, 256, "half"),
    )
    monkeypatch.setattr(bench_grouped, "CASES", cases)
    rows = run("grouped", bench_grouped)["rows"]
    assert [row["variant"] for row in rows if row["product"] == "wgrad"] == 2 * [
        *("bf16", "ATen fast", "ATen split", "fast", "split", "loop")
    ]
    assert {row["routing"] for row in rows} == {"even", "half"}
    assert cases[1].counts() == [64, 128, 64, 0]


def test_experts(run, monkeypatch):
    monkeypatch.setattr(timing, "graph_of", lambda work: (work, work()))
    monkeypatch.setattr(bench_experts, "copy_us", lambda moved, repeats: 1.0)
    tiny = bench_experts.Mixture("tiny", 6, 2, 128, 128)
    monkeypatch.setattr(bench_experts, "MIXTURES", (tiny,))
    monkeypatch.setattr(bench_experts, "TOKENS", (16, 80))
    rows = run("experts", bench_experts)["rows"]
    assert [row["tokens"] for row in rows] == [16] * 5 + [80] * 5
    ours = [row for row in rows if row["variant"].startswith(("frozen", "fused"))]
    assert len(ours) == 6
    assert all(row["sqnr_db"] > 22 for row in ours)  # four quantizations, as in experts' tests
    assert all((row["of_weight_copy"] is None) == (row["tokens"] == 80) for row in rows)
    assert all(1 <= row["experts_used"] <= 6 for row in rows)


TINY_EXPERTS = MoeShape("Tiny", 320, 4, 2, 64, 48)


@pytest.fixture
def tiny_experts(monkeypatch):
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm_anywhere)
    monkeypatch.setattr(bench_moe, "moe_shapes", lambda quick: [TINY_EXPERTS])


def test_moe(run, tiny_experts):
    written = run("moe", bench_moe, "--repeats", "1")
    rows = {row["variant"]: row for row in written["rows"]}
    ours = [f"fp8 {recipe}" for recipe in GROUPED_RECIPES]
    assert list(rows) == ["bf16", *ours, "fp8 rowwise, composed", *bench_moe.CEILINGS]
    assert "torchao" in written["skipped"]
    for name in ours:
        for figure in ("sqnr_db", "sqnr_dx_db", "sqnr_dw_db"):  # as derived for experts' tests
            assert 18 < rows[name][figure] < 40 < rows["bf16"][figure]
        assert rows[name]["host_ratio"] > 0
    assert rows["GEMMs alone, fp8"]["peak_ratio"] is None


def test_moe_without_transformers(run, tiny_experts, monkeypatch):
    def missing(shape):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(moe_layer, "make_experts", missing)
    monkeypatch.setattr(sys, "argv", ["moe"])
    assert runs.main("moe", "", bench_moe.measure, bench_moe.table, bench_moe.arguments) == 1


@pytest.mark.parametrize("kind", ["bf16", "split"])
def test_moe_gemms_alone_are_the_products_of_a_step(cpu_as_gpu, tiny_experts, monkeypatch, kind):
    """Six products of the shapes of a step's, FP8's near bf16's."""
    calls = {"bf16": [], "split": []}
    plain, scaled = torch._grouped_mm, scaled_grouped_mm_anywhere
    monkeypatch.setattr(torch, "_grouped_mm", lambda *a: calls["bf16"].append(plain(*a)))
    monkeypatch.setattr(
        torch, "_scaled_grouped_mm", lambda *a, **k: calls["split"].append(scaled(*a, **k))
    )
    module = moe_layer.make_experts(TINY_EXPERTS)
    torch.manual_seed(5)
    operands = moe_layer.gemms_alone(TINY_EXPERTS, module, "bf16")
    torch.manual_seed(5)
    forward, step = (
        operands if kind == "bf16" else moe_layer.gemms_alone(TINY_EXPERTS, module, kind)
    )
    forward()
    assert [tuple(y.shape) for y in calls[kind]] == [(640, 96), (640, 64)]
    calls[kind].clear()
    step()
    e, h, i = 4, 64, 48
    wanted = [(640, 2 * i), (640, h), (640, h), (e, 2 * i, h), (640, i), (e, h, i)]
    assert [tuple(y.shape) for y in calls[kind]] == wanted
    if kind == "split":
        operands[1]()
        for ours, theirs in zip(calls["split"], calls["bf16"], strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error < 0.06  # two operands of 2.7% each


def test_moe_composed_is_not_the_fused_operator(cpu_as_gpu):
    """It is what experts run whose gating no operator has."""

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **kwargs or {})

    names: list[str] = []
    module = moe_layer.make_experts(TINY_EXPERTS)
    made, _ = moe_layer.variants(module, ("rowwise",), peers=False)
    data = moe_layer.make_data(TINY_EXPERTS)
    found = {}
    for name in ("fp8 rowwise", "fp8 rowwise, composed"):
        names.clear()
        with Names():
            found[name] = moe_layer.calls(made[name], data)[0]()
        assert ("fp8::moe_experts" in names) == (name == "fp8 rowwise")
        assert ("fp8::grouped_linear" in names) == (name != "fp8 rowwise")
    one, two = (y.float() for y in found.values())
    assert (one - two).norm() < 0.03 * one.norm()  # codes that an exp moves
