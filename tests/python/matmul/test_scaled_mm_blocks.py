"""scaled_mm with block scales: what they have beyond the other granularities."""

from __future__ import annotations

import bounds
import operands
import pytest
import torch
from operands import Operands
from reference import E4M3, E5M2, FLOAT_DTYPES, assert_same_bits

import fp8

OPS = torch.ops.fp8
BLOCKS = ("1x128 128x128", "128x128 1x128", "1x128 1x128")
SQUARES = "128x128 128x128"  # which cuBLASLt refuses


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("granularity", [*BLOCKS, SQUARES])
@pytest.mark.parametrize("k", [128, 384, 512, 640, 1024, 16384])
def test_scaled_mm_blocks_values(device, k, granularity, positive):
    """K / 128 of every remainder by 4: without padded rows of scales squares would go wrong."""
    data = operands.make(144, 272, k, granularity, device, positive=positive)
    operands.check(data, None, torch.float32)
    operands.check(data, torch.randn(272, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("granularity", [*BLOCKS, SQUARES])
def test_scaled_mm_blocks_each_scale_counts(device, granularity):
    """Scales that differ by powers of two from block to block: one taken for another shows. Exact
    in fp32, since every partial sum is a small integer times a power of two."""
    m, n, k = 272, 400, 640
    a, b, scale_a, scale_b = operands.make(m, n, k, granularity, device)
    a.copy_(torch.ones(m, k, device=device))
    b.copy_(torch.ones(n, k, device=device))
    for scale, step in ((scale_a, 5), (scale_b, 3)):
        index = torch.arange(scale.numel(), device=device).view(scale.shape)
        scale.copy_(torch.exp2((index * step) % 7 - 3))
    out = OPS.scaled_mm(a, b, scale_a, scale_b, None, torch.float32)
    exact = bounds.product(a, b, scale_a, scale_b).exact
    assert_same_bits(out, exact.float())


@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_scaled_mm_blocks_fast_accum_is_ignored(device, out_dtype, granularity):
    data = operands.make(96, 160, 512, granularity, device)
    split = OPS.scaled_mm(*data, None, out_dtype, False)
    assert_same_bits(OPS.scaled_mm(*data, None, out_dtype, True), split)


@pytest.mark.parametrize("granularity", BLOCKS)
def test_scaled_mm_blocks_bias(device, granularity):
    """Added in fp32: on the CPU before the product is rounded, on a GPU in a pass after that."""
    data = operands.make(64, 96, 256, granularity, device)
    bias = (torch.randn(96, device=device) * 100).bfloat16()
    product = OPS.scaled_mm(*data, None, torch.float32 if device == "cpu" else torch.bfloat16)
    expected = (product.float() + bias.float()).bfloat16()
    assert_same_bits(OPS.scaled_mm(*data, bias), expected)


@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize(("m", "n", "k"), [(40, 56, 300), (1, 16, 128), (17, 9, 129), (8, 8, 520)])
def test_scaled_mm_blocks_scales_of_any_strides(device, m, n, k, granularity):
    """Contiguous scales, as another library would bring them, give the same bits."""
    data = operands.make(m, n, k, granularity, device)
    expected = OPS.scaled_mm(*data)
    a, b, scale_a, scale_b = data
    for other in (
        Operands(a, b, scale_a.contiguous(), scale_b.contiguous()),
        Operands(a, b, scale_a.t().contiguous().t(), scale_b.t().contiguous().t()),
        Operands(a.clone(), b.clone(), scale_a.clone(), scale_b.clone()),
    ):
        assert_same_bits(OPS.scaled_mm(*other), expected)


def test_scaled_mm_blocks_read_no_memory_of_others(device):
    """What lies behind the rows of an operand and of its scales has no influence."""
    data = operands.make(40, 56, 256, "1x128 128x128", device)
    big = operands.make(64, 64, 256, "1x128 128x128", device)
    expected = OPS.scaled_mm(*data)
    a, b = big.a[:40].copy_(data.a), big.b[:56].copy_(data.b)
    big.a.view(torch.uint8)[40:] = 0x7F  # NaN
    big.b.view(torch.uint8)[56:] = 0x7F
    scale_a = big.scale_a[:40].copy_(data.scale_a)
    big.scale_a[40:] = float("nan")
    assert_same_bits(OPS.scaled_mm(a, b, scale_a, data.scale_b), expected)


@pytest.mark.parametrize("granularity", [*BLOCKS, SQUARES])
def test_scaled_mm_blocks_non_finite_stays_in_its_group(device, granularity):
    a, b, scale_a, scale_b = operands.make(160, 144, 384, granularity, device)
    scale_a[1, 2] = float("nan")
    out = OPS.scaled_mm(a, b, scale_a, scale_b)
    expected = torch.ones(160, 144, dtype=torch.bool, device=device)
    rows = slice(128, 160) if granularity.startswith("128x128") else slice(1, 2)
    expected[rows] = False
    assert_same_bits(out.isfinite(), expected)


@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
def test_scaled_mm_blocks_formats(device, a_dtype, b_dtype):
    for granularity in BLOCKS:
        operands.check(operands.make(48, 64, 256, granularity, device, a_dtype, b_dtype))


def test_scaled_mm_blocks_errors(device):
    a, b, scale_a, scale_b = operands.make(160, 144, 384, "1x128 128x128", device)
    scalar = torch.tensor(1.0, device=device)
    rows = torch.ones(160, 1, device=device)
    prefix = r"fp8::scaled_mm: .*ceil.*"
    for wrong in (scalar, rows, scale_a[:, :2], scale_a[:159], scale_b[:1]):
        with pytest.raises(ValueError, match=prefix + r"scale_a=\["):
            OPS.scaled_mm(a, b, wrong, scale_b)
    for wrong in (scalar, rows[:144], scale_b[:1], scale_b.t()):
        with pytest.raises(ValueError, match=prefix + r"scale_b=\["):
            OPS.scaled_mm(a, b, scale_a, wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("k", [1024, 4096, 16384])
def test_scaled_mm_blocks_accumulation_error(k, granularity, positive):
    """As the model of bounds.py has it for split accumulation, twice it."""
    data = operands.make(512, 768, k, granularity, "cuda", positive=positive)
    out = OPS.scaled_mm(*data, None, torch.float32)
    expected = bounds.product(*data)
    bounds.assert_within(out, expected, "split")
    error = bounds.relative_rms(out, expected)
    assert error <= 2 * bounds.expected_rms(k, positive, "split"), error


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", BLOCKS)
def test_scaled_mm_blocks_run_in_cublaslt(granularity):
    """Ragged extents too: padding, not the fallback."""
    before = fp8.plan_cache_info()["fallbacks"]
    for m, n, k in ((256, 512, 1024), (1, 512, 1024), (100, 200, 300), (37, 4100, 136), (5, 7, 9)):
        data = operands.make(m, n, k, granularity, "cuda")
        operands.check(data)
        operands.check(data, torch.randn(n, device="cuda", dtype=torch.bfloat16))
        out = torch.zeros(m, n, device="cuda")
        OPS.scaled_mm_accumulate_(out, *data)
    assert fp8.plan_cache_info()["fallbacks"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(256, 512, 1024), (2048, 4096, 4096), (128, 384, 640), (4096, 4096, 14336)]
)
def test_scaled_mm_blocks_equal_torch(m, n, k, granularity):
    """torch.nn.functional.scaled_mm runs the same cuBLASLt modes: the same bits where it also runs
    the same algorithm, and the bound in any case."""
    from torch.nn.functional import ScalingType, SwizzleType
    from torch.nn.functional import scaled_mm as torch_scaled_mm

    data = operands.make(m, n, k, granularity, "cuda")

    def theirs(scale, mode):
        """Their form of our scales: squares as the transpose of the padded rows."""
        if mode == "1x128":
            return scale, ScalingType.BlockWise1x128
        rows, cols = scale.shape
        return scale.as_strided((rows, -(-cols // 4) * 4), scale.stride()).t(), (
            ScalingType.BlockWise128x128
        )

    mode_a, mode_b = granularity.split()
    scale_a, recipe_a = theirs(data.scale_a, mode_a)
    scale_b, recipe_b = theirs(data.scale_b, mode_b)
    expected = torch_scaled_mm(
        data.a,
        data.b.t(),
        scale_a,
        recipe_a,
        scale_b,
        recipe_b,
        swizzle_a=SwizzleType.NO_SWIZZLE,
        swizzle_b=SwizzleType.NO_SWIZZLE,
        output_dtype=torch.bfloat16,
    )
    ours = operands.check(data)
    bounds.assert_within(expected, bounds.product(*data), "split", "torch")
    if granularity != "1x128 1x128":  # which has several algorithms
        assert_same_bits(ours, expected)
