"""What is made of bench_model's rows: kernels by kind, their section, plot and regressions."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fp8")
if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import bench_model
import kernel_times
import regressions
import sections
import timing
from small_models import FACTS, ROWS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<"
         "cutlass::gemm::kernel::GemmUniversal<...>>>", "products"),
        ("triton_tem_fused_mm_3", "products"),
        ("triton_poi_fused__scaled_mm_silu_2", "rest"),
        ("triton_red_fused__flash_attention_backward_add_5", "rest"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16_knob", "attention"),
        ("void fp8::core::(anonymous namespace)::row_kernel<float>", "fp8"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
         "FusedAdamMathFunctor<c10::BFloat16, 4>>", "optimizer"),
        ("void at::native::elementwise_kernel<128, 4, at::native::silu_kernel>", "rest"),
        ("_rms_norm_backward_kernel", "rest"),
        ("Memset (Device)", "rest"),
    ],
)  # fmt: skip
def test_kind_of_a_kernel(name, kind):
    assert kernel_times.kind(name) == kind


def test_times_in_a_row(cpu_as_gpu):
    calls = []
    found = timing.in_a_row(lambda: calls.append(0), repeats=4, warmup=2)
    assert len(calls) == 6
    assert found.repeats == 4
    assert found.low >= 0


def test_page_shows_whole_steps_first(tmp_path):
    block = {
        **{"model": "8B", "layers": 2, "sequences": 2, "context": 4096, "rotary": True},
        **{"variant": "bf16", "step_us": {"median": 4e4}, "peak_gib": 4.1},
    }
    found = {
        "block_h100": {"benchmark": "block", "header": FACTS, "rows": [block]},
        "model_h100": {"benchmark": "model", "header": FACTS, "rows": ROWS},
    }
    (tmp_path / "model_h100.png").touch()
    text = sections.everything(found, tmp_path)
    assert text.index("Training steps of transformers") < text.index("Llama 3 decoder layers")
    names = "Llama-3-8B, 4 layers, 2 × 4096 | Llama-3-8B, one layer, 2 × 4096"
    assert f"| speed / memory | {names} |" in text
    assert "| bf16 | 100 ms / 13.0 GiB | 40 ms / 13.0 GiB |" in text
    assert "| fp8 tensorwise | 1.25x / 0.80x | 2.00x / 1.00x |" in text
    assert "| torchao 0.18.0 tensorwise compiled | 0.80x / 1.00x |  |" in text
    assert "| bf16, " not in text
    assert "differs by at most 1.0%" in text
    assert "(../benchmarks/results/model_h100.png)" in text
    assert "Kernels of one step" not in text
    without = sections.everything({"block_h100": found["block_h100"]}, tmp_path)
    assert "Training steps" not in without
    landing = sections.landing(found)  # for the README: these alone, with their source
    assert "| fp8 tensorwise | 1.25x / 0.80x |\n" in landing  # of a step, not of one layer
    assert "Llama 3 decoder layers" not in landing
    assert landing.endswith("commit abc1234; `benchmarks/results/model_h100.json`</sub>")


def test_regressions_of_whole_steps():
    old = {"benchmark": "model", "header": FACTS, "rows": ROWS}
    slower = [row | {"speedup": row["speedup"] * 0.9} for row in ROWS]
    assert regressions.lacking(old) == set()
    found = regressions.regressions(old | {"rows": slower}, old)
    assert len(found) == 2
    assert all("fp8 tensorwise, speedup" in line for line in found)


def test_plot_and_table(tmp_path):
    import plots

    run = {"benchmark": "model", "header": FACTS, "rows": ROWS}
    plots.model_cases(run, tmp_path / "model_h100.png")
    assert (tmp_path / "model_h100.png").read_bytes().startswith(b"\x89PNG")
    lines = bench_model.table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert max(map(len, lines)) < 160
    same = plots._positions(["bf16 compiled", "fp8 tensorwise", "fp8 tensorwise + Liger 0.8.5"])
    assert list(same.values()) == [0, 0, 0]
    assert plots._hatch("torchao 0.18.0 tensorwise compiled") == ""
