"""The order of calls under the clock, the classes of kernels, and the rotary embedding."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import fp8

if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import kernel_times
import llama
import shapes
import timing


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_device_times_leads_each_timed_call(cpu_as_gpu, monkeypatch, lead):
    calls: list[str] = []

    class Flush:
        def __call__(self):
            calls.append("flush")

    monkeypatch.setattr(timing, "Flush", Flush)
    variants = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = timing.device_times(
        variants, repeats=2, warmup=0, before=lambda: calls.append("before"), lead=lead
    )
    one_round = []
    for name in ("a", "b"):
        one_round += ["before", name] * lead + ["before", "flush", name]
    assert calls == one_round * 2
    assert found["a"].repeats == 2


def test_device_times_leads_for_a_time(cpu_as_gpu, monkeypatch):
    """A short call is led by many of its kind, a long one by one."""
    monkeypatch.setattr(timing, "Flush", lambda: lambda: None)
    calls = {"short": 0, "long": 0}

    def call(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    variants = {"short": lambda: call("short", 0.002), "long": lambda: call("long", 0.04)}
    timing.device_times(variants, repeats=1, warmup=0, lead=1, lead_ms=20)
    assert calls["long"] == 3, "to find out, to lead, and the timed one"
    assert 3 < calls["short"] <= 12


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1", "gemm"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...> >", "gemm"),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
        ("void fp8::core::cast_kernel<__nv_bfloat16, 0>(fp8::core::CastParams)", "quantize"),
        ("_ZN3fp84core14rowwise_kernelE", "quantize"),
        ("void pytorch_flash::flash_fwd_kernel<Traits<128, cutlass::bf16>>", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_combine_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<...>", "other"),
        ("Memset (Device)", "other"),
    ],
)
def test_classify(name, group):
    assert kernel_times.classify(name) == group


def test_parse_takes_work_of_the_gpu_only():
    def event(name: str, category: str, us: float, phase: str = "X") -> dict:
        return {"ph": phase, "cat": category, "name": name, "ts": 1.0, "dur": us}

    trace = {
        "traceEvents": [
            event("nvjet_hsh", "kernel", 10),
            event("void fp8::core::cast_kernel", "kernel", 4),
            event("Memset (Device)", "gpu_memset", 2),
            event("cudaLaunchKernel", "cuda_runtime", 7),
            event("ProfilerStep#1", "gpu_user_annotation", 99),
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            event("a flow", "kernel", 0, "f"),
        ]
    }
    found = kernel_times.per_step(kernel_times.parse(trace) * 3, 3)
    assert found == pytest.approx(
        {"gemm_us": 10, "quantize_us": 4, "attention_us": 0, "other_us": 2, "kernels": 2}
    )


SHAPE = shapes.BlockShape(hidden=64, ffn=96, heads=4, kv_heads=2, sequences=2, tokens=24)


def test_rotary_angles():
    """The definition: the pair (i, i + half) of token t turns by t · base^(-2i / head_dim)."""
    cos, sin = llama.rotary(SHAPE, "cpu", torch.float64)
    assert cos.shape == sin.shape == (24, 16)
    angle = 5 * 500000.0 ** (-2 * 3 / 16)
    x = torch.zeros(1, 1, 24, 16, dtype=torch.float64)
    x[0, 0, 5, 3] = 1
    for rotated in llama.rotate(x, x, cos, sin):
        y = rotated[0, 0, 5]
        assert y[3].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
        assert y[3 + 8].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


def test_rotary_turns_without_stretching():
    cos, sin = llama.rotary(SHAPE, "cpu", torch.float64)
    q, k = (torch.randn(2, heads, 24, 16, dtype=torch.float64) for heads in (4, 2))
    for x, y in zip((q, k), llama.rotate(q, k, cos, sin), strict=True):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        assert not torch.equal(x, y)


def test_convert_finds_all_of_a_decoder_layer():
    model = llama.decoder(SHAPE._replace(layers=2), "cpu")
    fp8.convert(model, filter=lambda module, name: True)
    fused = fp8.summary(model).splitlines()
    for name, count in {"norms": 4, "mlp": 2, "rope": 2, "residual": 2, "siblings": 2}.items():
        assert any(f"{count} {name} fused" in line for line in fused), (name, fused)


@pytest.mark.parametrize("rotary", [True, False])
def test_decoder_trains(rotary):
    model = llama.decoder(SHAPE._replace(rotary=rotary), "cpu")
    assert len(list(model.buffers())) == (4 if rotary else 0)
    x = torch.randn(2, 24, 64, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.backward(torch.randn_like(y))
    assert y.shape == x.grad.shape == x.shape
    assert all(parameter.grad is not None for parameter in model.parameters())
