"""Launch budgets: kernels, memsets and copies on the device, counted by the profiler."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fp8

pytestmark = pytest.mark.gpu
OPS = torch.ops.fp8
RECIPES = tuple(fp8.RECIPES)
SHAPE = (2048, 1024)


def launches(run) -> list[str]:
    """Names of the device activities of one run, after a warm-up."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in recorded.events() if event.device_type == cuda]


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("quantize_tensorwise", 2),
        ("quantize_tensorwise_transpose", 2),
        ("quantize_rowwise", 1),
        ("quantize_rowwise_transpose", 2),
        ("quantize_blockwise_1x128", 1),
        ("quantize_blockwise_1x128_transpose", 1),
        ("quantize_blockwise_128x128", 1),
        ("quantize_blockwise_128x128_transpose", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_of_quantize(name, budget, dtype):
    x = torch.randn(SHAPE, device="cuda", dtype=dtype)
    found = launches(lambda: getattr(OPS, name)(x))
    assert 1 <= len(found) <= budget, found


def test_launches_of_static_quantize():
    x, scale = torch.randn(SHAPE, device="cuda"), torch.ones((), device="cuda")
    found = launches(lambda: OPS.quantize_tensorwise_transpose(x, scale=scale))
    assert len(found) == 1, found


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise"])
def test_launches_of_scaled_mm(granularity):
    quantize = getattr(OPS, f"quantize_{granularity}")
    a, scale_a = quantize(torch.randn(SHAPE, device="cuda"))
    b, scale_b = quantize(torch.randn(SHAPE, device="cuda"))
    bias = torch.randn(SHAPE[0], device="cuda", dtype=torch.bfloat16)
    found = launches(lambda: OPS.scaled_mm(a, b, scale_a, scale_b, bias))
    assert len(found) <= 2, found  # the second would be a split-K reduction


@pytest.mark.parametrize("of_b", ["1x128", "128x128"])
def test_launches_of_scaled_mm_in_blocks(of_b):
    """What the quantize operators made goes to cuBLASLt as it is, whatever the number of rows; a
    bias is one launch more, which fills the output with it."""
    n, k = 1536, 640
    b, scale_b = getattr(OPS, f"quantize_blockwise_{of_b}")(torch.randn(n, k, device="cuda"))
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for m in (2048, 2040, 37, 1):
        a, scale_a = OPS.quantize_blockwise_1x128(torch.randn(m, k, device="cuda"))
        found = launches(lambda operands=(a, b, scale_a, scale_b): OPS.scaled_mm(*operands))
        assert len(found) <= 2, (m, found)  # the second would be a split-K reduction
        found = launches(lambda operands=(a, b, scale_a, scale_b): OPS.scaled_mm(*operands, bias))
        assert len(found) <= 3, (m, found)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_launches_of_fused_linear(recipe, with_bias):
    m, k, n = 2048, 1024, 1536
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    leaves = [x, weight, bias] if with_bias else [x, weight]

    def forward():
        return OPS.fused_linear(x, weight, bias if with_bias else None, recipe)

    found = launches(forward)
    assert 1 <= len(found) <= 5, found
    with torch.no_grad():
        found = launches(forward)
    assert 1 <= len(found) <= 5, found
    found = launches(lambda: torch.autograd.grad(forward(), leaves, dy))
    assert len(found) <= 10, found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_launches_with_main_grad(recipe, buffer_dtype, overwrite):
    """The wgrad matmul adds by itself: no launch more than without."""
    layer = fp8.Linear(1024, 1536, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    layer.weight.main_grad = torch.zeros(1536, 1024, device="cuda", dtype=buffer_dtype)
    layer.weight.overwrite_main_grad = overwrite
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2048, 1536, device="cuda", dtype=torch.bfloat16)

    def step():
        x.grad = layer.bias.grad = None
        layer(x).backward(dy)

    found = launches(step)
    assert len(found) <= 10, found


def ours(names: list[str]) -> list[str]:
    """Kernels of this library: quantization. cuBLASLt's have other names."""
    return [name for name in names if "fp8::core" in name]


@pytest.mark.parametrize("option", ["", ":power_of_two"])
def test_launches_with_a_static_input_scale(option):
    """One launch for x instead of two, forward alone and with a backward."""
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = fp8.Linear(
        1024, 1536, device="cuda", dtype=torch.bfloat16, recipe=f"tensorwise{option}"
    )
    dy = torch.randn(2048, 1536, device="cuda", dtype=torch.bfloat16)

    def step():
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    def forward():
        with torch.no_grad():
            return layer(x)

    counts = {}
    for what, scale in (("dynamic", None), ("static", torch.tensor(0.01, device="cuda"))):
        layer.input_scale = scale
        with fp8.cached_weights(layer):
            alone = ours(launches(forward))
        counts[what] = (len(alone), len(ours(launches(forward))), len(ours(launches(step))))
    # x; x and weight; x, weight, dy (with its sums) and weight transposed
    assert counts == {"dynamic": (2, 4, 7), "static": (1, 3, 6)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_launches_with_power_of_two_scales(recipe):
    """No launch more than without."""
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1536, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2048, 1536, device="cuda", dtype=torch.bfloat16)
    counts = [
        len(
            ours(
                launches(
                    lambda name=name: torch.autograd.grad(
                        OPS.fused_linear(x, weight, None, name), [x, weight], dy
                    )
                )
            )
        )
        for name in (recipe, f"{recipe}:power_of_two")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("option", ["", ":power_of_two"])
def test_launches_of_delayed_scaling(option):
    """Each tensor is read once, by the launch that casts it, and one follows that as a rule reads
    nothing of it; with a bias dy is read once more, for its sums. From the first call on."""
    m, k, n = 2048, 1024, 1536
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def step(recipe, with_bias):
        x = dy.new_ones(m, k, requires_grad=True)
        leaves = [x, weight, bias] if with_bias else [x, weight]
        history = fp8.ops.make_history("cuda") if recipe.startswith("delayed") else None
        y = OPS.fused_linear(x, weight, bias if with_bias else None, recipe, history=history)
        return torch.autograd.grad(y, leaves, dy)

    def count(recipe, with_bias):
        kinds = ("statistics_kernel", "cast_kernel", "settle_delayed_kernel")
        names = ours(launches(lambda: step(recipe, with_bias)))
        counts = [sum(kind in name for name in names) for kind in kinds]
        assert sum(counts) == len(names), names
        return counts

    # x, weight and dy: amax and cast; weight transposed in the backward: cast
    dynamic = [count(f"tensorwise{option}", with_bias) for with_bias in (False, True)]
    assert dynamic == [[3, 4, 0]] * 2
    assert count(f"delayed{option}", False) == [0, 4, 3]
    assert count(f"delayed{option}", True) == [1, 4, 2]
