"""Every operator is complete: kernels, a sample, a docstring, a benchmark, its schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
import torch

import fp8
from fp8._native import loader as _loader

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

# The public contract: names and order of arguments, and what is returned.
SCHEMAS = {
    "quantize_tensorwise": ("x dtype scale power_of_two", 2),
    "quantize_rowwise": ("x dtype power_of_two", 2),
    "quantize_tensorwise_transpose": ("x dtype scale power_of_two", 3),
    "quantize_rowwise_transpose": ("x dtype power_of_two", 4),
    "quantize_blockwise_1x128": ("x dtype power_of_two", 2),
    "quantize_blockwise_128x128": ("x dtype power_of_two", 2),
    "quantize_blockwise_1x128_transpose": ("x dtype power_of_two", 4),
    "quantize_blockwise_128x128_transpose": ("x dtype power_of_two", 4),
    "dequantize": ("data scale dtype", 1),
    "scaled_mm": ("a b scale_a scale_b bias out_dtype fast_accum", 1),
    "scaled_mm_accumulate_": ("out a b scale_a scale_b fast_accum", None),
    "fused_linear": ("x weight bias recipe input_scale history", 1),
    "linear_frozen": (
        "x weight weight_scale bias input_scale input_granularity power_of_two decode",
        1,
    ),
    "experts_frozen": (
        "x top_k_index top_k_weights gate_up gate_up_scale down down_scale gate_up_bias down_bias"
        " activation interleaved alpha limit input_granularity power_of_two",
        1,
    ),
    "merged_linear": ("x weights biases recipe history", 1),
    "mlp": (
        "x gate up down activation recipe gate_bias up_bias down_bias save gate_second alpha limit"
        " gate_history up_history down_history",
        1,
    ),
    "grouped_mm": ("a b scale_a scale_b offsets out_dtype fast_accum", 1),
    "grouped_linear": ("x weight offsets bias recipe", 1),
    "rms_norm": ("x weight eps form", 1),
    "layer_norm": ("x weight bias eps", 1),
    "add_rms_norm": ("x residual weight eps form", 2),
    "rope": ("q k cos sin layout rotary_dim rounding", 2),
    "moe_experts": (
        "x top_k_index top_k_weights gate_up down gate_up_bias down_bias activation interleaved"
        " alpha limit recipe",
        1,
    ),
}


def schema(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.fp8, name).default._schema


def test_registration_public_operators():
    assert samples.public_namespace() == sorted(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_registration_schema(name):
    arguments, returns = SCHEMAS[name]
    assert [a.name for a in schema(name).arguments] == arguments.split()
    # An operator that only modifies may return what it modified or nothing.
    assert returns is None or len(schema(name).returns) == returns


@pytest.mark.parametrize("name", samples.namespace())
def test_registration_kernels(name):
    keys = ["CPU", "Meta"]
    if _loader.native().build_info()["cuda"]:
        keys.append("CUDA")
    for key in keys:
        found = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fp8::{name}", key)
        assert found, f"fp8::{name} has no {key} kernel"


@pytest.mark.parametrize("name", samples.namespace())
def test_registration_sample(name):
    assert name in samples.TABLE, f"add samples of {name} to tests/python/samples.py"
    assert samples.samples(name, "cpu")


@pytest.mark.parametrize("name", samples.public_namespace())
def test_registration_documentation(name):
    assert name in fp8.ops.__all__
    doc = getattr(fp8.ops, name).__doc__
    assert doc
    if "as `" in doc:  # refers to the operator that explains the arguments
        return
    for argument in schema(name).arguments:
        assert argument.name in doc, f"fp8.ops.{name} does not explain {argument.name}"


@pytest.mark.parametrize("name", samples.public_namespace())
def test_registration_benchmark(name):
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not beside the tests")
    texts = [path.read_text() for path in BENCHMARKS.glob("*.py")]
    assert any(name in text for text in texts), f"no benchmark runs {name}"


def test_registration_only_accumulation_and_histories_modify():
    written = {
        "scaled_mm_accumulate_": ["out"],
        "fused_linear": ["history"],
        "_linear_forward": ["history"],
        "_linear_backward": ["main_grad", "history"],
        "_fused_linear_into": ["history"],
        "merged_linear": ["history"],
        "_merged_forward": ["history"],
        "_merged_backward": ["history"],
        "_grouped_backward": ["main_grad"],
        "_moe_backward": ["gate_up_main_grad", "down_main_grad"],
    }
    for name in ("mlp", "_mlp_forward", "_mlp_backward"):
        written[name] = ["gate_history", "up_history", "down_history"]
    for name in samples.namespace():
        modified = [a.name for a in schema(name).arguments if a.is_write]
        assert modified == written.get(name, []), name
