"""Whole benchmarks on tiny shapes, with the CPU in place of the GPU: what they measure is void, but
every line runs, the rows have the fields that the report reads, and the report accepts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

fp8 = pytest.importorskip("fp8")
if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import bench_accumulate  # noqa: E402
import bench_block  # noqa: E402
import bench_breakdown  # noqa: E402
import bench_decode  # noqa: E402
import bench_generate  # noqa: E402
import bench_host  # noqa: E402
import bench_linear  # noqa: E402
import bench_matmul  # noqa: E402
import bench_sizes  # noqa: E402
import kernel_times  # noqa: E402
import peers  # noqa: E402
import timing  # noqa: E402
from shapes import (  # noqa: E402
    RECIPES,
    BlockShape,
    DecoderCase,
    LinearShape,
)

TINY = BlockShape(hidden=64, ffn=96, heads=4, kv_heads=2, layers=1, sequences=2, tokens=8)


LAYER = LinearShape(32, 64, 96)


@pytest.fixture
def autotune(monkeypatch):
    """fp8.autotune's calls: (number of fp8.Linear, tokens)."""
    calls = []

    def record(module, tokens):
        calls.append((sum(isinstance(m, fp8.Linear) for m in module.modules()), tokens))

    monkeypatch.setattr(fp8, "autotune", record, raising=False)
    return calls


def scaled_mm_anywhere(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


def test_block(run, monkeypatch, autotune):
    cases = [
        DecoderCase("8B", TINY, ("TE current", "torchao tensorwise eager")),
        DecoderCase("8B", TINY._replace(rotary=False)),
    ]
    monkeypatch.setattr(bench_block, "decoder_cases", lambda quick: cases)
    written = run("block", bench_block, "--repeats", "2")
    ours = [f"fp8 {recipe}" for recipe in RECIPES]
    rows = [row for row in written["rows"] if not row["variant"].startswith(("TE", "torchao"))]
    assert [row["variant"] for row in rows] == ["bf16", *ours] * 2
    each = 1 + len(RECIPES)
    assert [row["rotary"] for row in rows] == [True] * each + [False] * each
    assert {row["variant"]: row["autotuned"] for row in rows} == {
        "bf16": False,
        **dict.fromkeys(ours, True),
    }
    assert written["header"]["wall_s"] > 0
    assert autotune == [(7, 16)] * 2 * len(RECIPES)  # each linear of the decoder layer


def test_block_time_budget(run, monkeypatch):
    """A compiled peer is not even built once the budget is spent."""
    monkeypatch.setitem(peers.PEERS, "slow", lambda: peers.Peer("slow compiled", None))
    cases = [DecoderCase("8B", TINY, ("slow",))]
    monkeypatch.setattr(bench_block, "decoder_cases", lambda quick: cases)
    written = run("block", bench_block, "--repeats", "1", "--budget", "-1")
    assert written["skipped"] == {"slow compiled at 8B, 2 × 8": "the time budget was spent"}


def test_block_names_a_case_that_fails(run, monkeypatch):
    cases = [DecoderCase("8B", TINY), DecoderCase("70B", TINY._replace(sequences=3))]
    monkeypatch.setattr(bench_block, "decoder_cases", lambda quick: cases)
    build = bench_block.llama.decoder

    def out_of_memory(shape):
        if shape.sequences == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return build(shape)

    monkeypatch.setattr(bench_block.llama, "decoder", out_of_memory)
    written = run("block", bench_block, "--repeats", "1", "--no-autotune")
    assert {row["model"] for row in written["rows"]} == {"8B"}
    assert written["skipped"]["70B, 3 × 8"] == "CUDA out of memory"
    assert written["header"]["autotuned"] is False


def test_linear(run, monkeypatch, autotune):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_anywhere)
    monkeypatch.setattr(bench_linear, "main_shapes", lambda quick: [LAYER])
    monkeypatch.setattr(
        bench_linear, "sweep_shapes", lambda quick: [LAYER._replace(m=m) for m in (16, 48)]
    )
    written = run("linear", bench_linear, "--repeats", "2", "--no-peers")
    tokens = [row for row in written["rows"] if row["sweep"] == "tokens"]
    assert {row["m"] for row in tokens} == {16, 48}
    assert {row["variant"] for row in tokens} == {
        *("bf16", "fp8 tensorwise", "fp8 rowwise", "fp8 delayed"),
        *("GEMMs alone", "GEMMs alone, rowwise"),
    }
    variants = {row["variant"] for row in written["rows"] if row["sweep"] == "main"}
    assert variants == {"bf16", *(f"fp8 {recipe}" for recipe in RECIPES), *bench_linear.CEILINGS}
    assert written["header"]["autotuned"] is True
    assert [m for _, m in autotune] == [32] * len(RECIPES) + [16] * 3 + [48] * 3


def test_linear_not_autotuned(run, monkeypatch, autotune):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_anywhere)
    monkeypatch.setattr(bench_linear, "main_shapes", lambda quick: [LAYER])
    monkeypatch.setattr(bench_linear, "sweep_shapes", lambda quick: [])
    run("linear", bench_linear, "--repeats", "1", "--no-peers", "--no-autotune")
    assert not autotune


@pytest.mark.parametrize("recipe", bench_linear.CEILINGS.values())
def test_gemms_alone_are_the_products_of_a_step(cpu_as_gpu, monkeypatch, recipe):
    """Shapes of y, dx and dw; only the forward's accumulation is fast."""
    calls = []

    def product(a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=False):
        shape = a.shape[0], b.shape[1 if recipe != "blockwise" else 0]
        calls.append((shape, a.shape[1], [tuple(scale.shape) for scale in scales], use_fast_accum))

    class Ops:
        """fp8's operators, the product recorded."""

        scaled_mm = staticmethod(product)

        def __getattr__(self, name):
            return getattr(ops, name)

    ops = torch.ops.fp8
    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.ops, "fp8", Ops())
    _, step = bench_linear.gemms_alone(LinearShape(32, 64, 256), recipe)
    step()
    assert [call[:2] for call in calls] == [((32, 256), 64), ((32, 64), 256), ((256, 64), 32)]
    fast = recipe != "blockwise"  # which has no such choice
    assert [call[3] for call in calls] == [fast, False, False]
    if recipe == "blockwise":
        scales = [[(32, 1), (2, 1)], [(32, 2), (1, 2)], [(256, 1), (64, 1)]]
        assert [call[2] for call in calls] == scales


def test_decode(run, monkeypatch):
    monkeypatch.setattr(timing, "graph_of", lambda work: (work, work()))
    monkeypatch.setattr(bench_decode, "copy_us", lambda moved, repeats: 1.0)
    monkeypatch.setattr(bench_decode, "LAYERS", ((64, 96),))
    monkeypatch.setattr(bench_decode, "M_VALUES", (1, 80))
    rows = run("decode", bench_decode)["rows"]
    assert [row["m"] for row in rows] == [1] * 12 + [80] * 9
    frozen = [row for row in rows if row["variant"].startswith("frozen")]
    assert len(frozen) == 15
    assert sum(row["price"] is not None for row in frozen) == 6
    assert all(row["sqnr_db"] > 25 for row in frozen)
    assert all((row["of_weight_copy"] is None) == (row["m"] == 80) for row in rows)


def test_generate(run, monkeypatch):
    monkeypatch.setattr(timing, "graph_of", lambda work: (work, work()))
    monkeypatch.setattr(bench_generate, "SHAPE", TINY._replace(sequences=1))
    monkeypatch.setattr(bench_generate, "VOCABULARY", 96)
    monkeypatch.setattr(bench_generate, "BATCHES", (1, 2))
    written = run("generate", bench_generate)
    rows = written["rows"]
    ours = [row for row in rows if row["variant"].startswith("fp8")]
    assert [row["batch"] for row in ours] == [1] * 8 + [2] * 8
    assert all(row["weights_ratio"] < 1 and row["sqnr_db"] > 15 for row in ours)
    plain = [row for row in rows if row["variant"] == "bf16, graph"]
    assert [row["speedup"] for row in plain] == [1.0, 1.0]
    assert "torchao PerRow" in written["skipped"]


def test_matmul(run, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_anywhere)
    monkeypatch.setattr(bench_matmul, "LAYERS", ((64, 96),))
    monkeypatch.setattr(bench_matmul, "M_VALUES", (16, 32))
    rows = run("matmul", bench_matmul)["rows"]
    blocks = [row for row in rows if "128" in row["variant"]]
    assert [row["m"] for row in blocks] == [16] * 4 + [32] * 4
    assert {row["variant"] for row in blocks} == {
        *("scaled_mm 1x128 · 128x128, split", "scaled_mm 1x128 · 1x128, split"),
        "scaled_mm_accumulate_ 1x128 · 128x128, split, fp32 out",
        "scaled_mm_accumulate_ 1x128 · 1x128, split, fp32 out",
    }
    assert all(row["sqnr_db"] > 25 for row in blocks if row["variant"].startswith("scaled_mm 1"))


def test_autotune_that_fails_is_not_fatal(monkeypatch, capsys):
    def fail(module, tokens):
        raise RuntimeError("no algorithm")

    monkeypatch.setattr(fp8, "autotune", fail, raising=False)
    assert peers.autotune(fp8.Linear(16, 16), 8, True) is False
    assert "fp8.autotune failed at 8 tokens: no algorithm" in capsys.readouterr().err
    assert peers.autotune(torch.nn.Linear(16, 16), 8, True) is False


def test_accumulate(run, monkeypatch):
    monkeypatch.setattr(bench_accumulate, "LLAMA_8B", TINY)
    monkeypatch.setattr(bench_accumulate, "MICRO_TOKENS", (8, 16))
    rows = run("accumulate", bench_accumulate)["rows"]
    names = ["bf16"]
    for recipe in ("tensorwise", "rowwise"):
        names += [f"fp8 {recipe}", f"fp8 {recipe}, cached weights"]
    assert [row["variant"] for row in rows] == names * 2
    assert [row["of_uncached"] is None for row in rows[:5]] == [True, True, False, True, False]


def test_accumulation_adds_up():
    """Four micro-batches' gradients, and as many again from zero, not on top."""
    layer = torch.nn.Linear(4, 3, bias=False)
    xs, dy = [torch.randn(2, 4) for _ in range(4)], torch.randn(2, 3)
    step = bench_accumulate.accumulation(layer, xs, dy)
    step()
    step()
    torch.testing.assert_close(layer.weight.grad, sum(dy.t() @ x for x in xs))


def test_breakdown(run, monkeypatch):
    monkeypatch.setattr(bench_breakdown, "LAYERS", (LAYER,))
    monkeypatch.setattr(bench_breakdown, "DECODER", TINY)
    found = [
        kernel_times.Kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN", 3.0),
        kernel_times.Kernel("void fp8::core::cast_kernel<...>(fp8::core::CastParams)", 1.5),
        kernel_times.Kernel("Memset (Device)", 0.5, is_kernel=False),
    ]

    def profile(step, steps):
        step()
        return found * steps

    monkeypatch.setattr(kernel_times, "profile", profile)
    rows = run("breakdown", bench_breakdown)["rows"]
    assert [row["case"] for row in rows] == ["M=32, 64 → 96"] * 3 + ["1 layers of 8B, 2 × 8"] * 3
    for row in rows:
        assert [row["gemm_us"], row["quantize_us"], row["other_us"]] == pytest.approx([3, 1.5, 0.5])
        assert row["kernels"] == 2
        assert row["rest_us"] == pytest.approx(max(0, row["span_us"] - 5))


def test_host(run, monkeypatch):
    monkeypatch.setattr(bench_host, "PEERS", ("TE current",))
    monkeypatch.setattr(bench_host, "TOKENS", 2)
    rows = run("host", bench_host, "--quick")["rows"]
    each = 1 + len(RECIPES)
    assert [row["bias"] for row in rows] == [False] * each + [True] * each
    assert [row["step_ratio"] for row in rows if row["variant"] == "bf16"] == [1.0, 1.0]


def test_host_time_budget(run, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", lambda: peers.Peer("slow compiled", None))
    monkeypatch.setattr(bench_host, "PEERS", ("slow",))
    written = run("host", bench_host, "--budget", "-1")
    assert written["skipped"]["slow compiled, bias=True"] == "the time budget was spent"


def test_sizes(run, monkeypatch):
    monkeypatch.setattr(bench_sizes, "SIDES", (16, 32))
    monkeypatch.setattr(bench_sizes, "OBLONG", ())
    monkeypatch.setattr(bench_sizes, "TOKENS", (8,))
    rows = run("sizes", bench_sizes, "--quick")["rows"]
    assert [row["k"] for row in rows] == [16] * 5 + [32] * 5


def test_profile_reads_the_profilers_trace(monkeypatch):
    """kernel_times.profile on this machine: a trace without a GPU has no kernels, and is valid."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        torch.profiler,
        "ProfilerActivity",
        type("", (), {"CUDA": torch.profiler.ProfilerActivity.CPU}),
    )
    steps = []
    assert kernel_times.profile(lambda: steps.append(torch.ones(3) + 1), 2) == []
    assert len(steps) == 2
    with pytest.raises(RuntimeError, match="saw no kernel"):
        kernel_times.per_step([], 2)


def test_results_are_json(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_block, "decoder_cases", lambda quick: [DecoderCase("8B", TINY)])
    run("block", bench_block, "--repeats", "1")
    assert json.loads((tmp_path / "block_h100.json").read_text())["benchmark"] == "block"
