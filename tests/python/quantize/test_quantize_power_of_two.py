"""power_of_two: multipliers rounded down to powers of two, the same bits as the reference, on the
CPU and on CUDA."""

from __future__ import annotations

import inputs
import pytest
import torch
from quantize_checks import check_all
from reference import E4M3, E5M2, FLOAT_DTYPES, FP8_DTYPES, FP8_MAX, assert_same_bits, codes

OPS = torch.ops.fp8
TENSORWISE_OPS = ("quantize_tensorwise", "quantize_tensorwise_transpose")
ROWWISE_OPS = ("quantize_rowwise", "quantize_rowwise_transpose")
BLOCKWISE_OPS = (
    "quantize_blockwise_1x128",
    "quantize_blockwise_1x128_transpose",
    "quantize_blockwise_128x128",
    "quantize_blockwise_128x128_transpose",
)
EVERY_OP = TENSORWISE_OPS + ROWWISE_OPS + BLOCKWISE_OPS


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_quantize_power_of_two_kinds_of_values(device, kind, x_dtype, dtype):
    check_all(inputs.make(kind, (67, 163), x_dtype, device), dtype, power_of_two=True)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (129, 65), (257, 1000), (0, 16), (16, 0), (100,), (2, 3, 5, 31)], ids=str
)
def test_quantize_power_of_two_shapes(device, shape, dtype, poisoned_memory):
    x = inputs.make("student_t", shape, torch.bfloat16, device)
    check_all(x, dtype, power_of_two=True)


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(2048 + 7, 1536 + 9), (3, 70001)], ids=str)
def test_quantize_power_of_two_large(device, shape, x_dtype):
    check_all(inputs.make("student_t", shape, x_dtype, device), E4M3, power_of_two=True)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_quantize_power_of_two_every_16_bit_amax(device, x_dtype, dtype):
    """Each pattern alone in its scaling group, NaN, Inf, zeros and subnormals too."""
    x = inputs.every_16_bit_pattern(x_dtype).unsqueeze(1).to(device)
    check_all(x, dtype, power_of_two=True)
    scale = OPS.quantize_rowwise(x, dtype, power_of_two=True)[1]
    finite = x.isfinite()
    fraction, exponent = torch.frexp(scale[finite])
    assert bool((fraction == 0.5).all()), "every scale is a power of two"
    assert exponent.min() - 1 >= -127
    assert exponent.max() - 1 <= 120
    assert not scale[~finite].isfinite().any()


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_quantize_power_of_two_boundaries(device, dtype):
    """Amaxes where 448 / amax or 57344 / amax is a power of two, and one ulp to either side."""
    exponents = torch.arange(-149, 113).float()
    points = (FP8_MAX[dtype] * torch.exp2(exponents)).to(torch.float32)
    points = torch.cat([points[points.isfinite()], torch.tensor([torch.finfo(torch.float32).max])])
    inf = torch.tensor(float("inf"))
    every = torch.cat([points, points.nextafter(inf), points.nextafter(-inf)])
    every = every[every.isfinite() & (every > 0)]
    check_all(every.unsqueeze(1).to(device), dtype, power_of_two=True)
    for value in (every[0], every[-1], points[-1]):
        check_all(value.expand(3, 17).to(device), dtype, power_of_two=True)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_quantize_power_of_two_zero_tiny_and_largest_amax(device, dtype):
    largest = torch.finfo(torch.float32).max
    for amax, expected in (
        (0.0, 1.0),
        (1e-45, 2.0**-127),  # the quotient is Inf, clamped to FLT_MAX, rounded to 2^127
        (largest, 2.0**120 if dtype == E4M3 else 2.0**113),
        (FP8_MAX[dtype], 1.0),
        (FP8_MAX[dtype] * 1.001, 2.0),
    ):
        x = torch.full((2, 16), amax, device=device)
        for name in EVERY_OP:
            scale = getattr(OPS, name)(x, dtype, power_of_two=True)[-1]
            assert bool((scale == expected).all()), (name, amax)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_quantize_power_of_two_non_finite_stays_visible(device, bad, dtype):
    """A NaN's exponent bits alone would be those of Inf, whose scale is 0."""
    for x_dtype in FLOAT_DTYPES:
        x = torch.randn(40, 72).to(x_dtype).to(device)
        x[7, 50] = bad
        check_all(x, dtype, power_of_two=True)
        for scale in (
            OPS.quantize_tensorwise(x, dtype, power_of_two=True)[1],
            OPS.quantize_rowwise(x, dtype, power_of_two=True)[1][7],
            OPS.quantize_blockwise_1x128(x, dtype, power_of_two=True)[1][7],
            OPS.quantize_blockwise_128x128(x, dtype, power_of_two=True)[1],
        ):
            assert not scale.isfinite().any()


def test_quantize_power_of_two_scaling_rounds_nothing_but_to_fp8(device):
    """Values that FP8 holds, at any power of two, come back exactly."""
    exact = torch.randint(0, 0x7F, (64, 96), dtype=torch.uint8).view(E4M3).float()
    exact[:, 0] = 448.0
    exact = exact * torch.exp2(torch.randint(-30, 30, (64, 1)).float())
    x = exact.to(device)
    data, scale = OPS.quantize_rowwise(x, power_of_two=True)
    assert_same_bits(OPS.dequantize(data, scale, torch.float32), x)


@pytest.mark.parametrize("name", TENSORWISE_OPS)
def test_quantize_power_of_two_error_with_a_given_scale(device, name):
    x = torch.randn(4, 16, device=device)
    message = rf"fp8::{name}: expected power_of_two=False with a static scale.*got both"
    for tensor in (x, x.to("meta")):
        scale = torch.ones((), device=tensor.device)
        with pytest.raises(ValueError, match=message):
            getattr(OPS, name)(tensor, E4M3, scale, power_of_two=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4097, 14336), (16, 2**21)], ids=str)
def test_quantize_power_of_two_cuda_equals_cpu(shape):
    """Sizes for which the numpy reference would be slow."""
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * torch.randn(1, device="cuda")
    host = x.cpu()
    for name in EVERY_OP:
        operator = getattr(OPS, name)
        results = operator(x, E5M2, power_of_two=True)
        for ours, expected in zip(results, operator(host, E5M2, power_of_two=True), strict=True):
            assert_same_bits(ours, expected, name)


@pytest.mark.parametrize("name", EVERY_OP)
def test_quantize_power_of_two_is_off_by_default(device, name):
    x = torch.randn(33, 47, device=device)
    plain, off = getattr(OPS, name)(x), getattr(OPS, name)(x, power_of_two=False)
    for ours, expected in zip(off, plain, strict=True):
        assert_same_bits(ours, expected)
    assert not torch.equal(codes(getattr(OPS, name)(x, power_of_two=True)[0]), codes(plain[0]))
