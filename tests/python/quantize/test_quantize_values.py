"""Quantize: the same bits as the reference, on the CPU and on CUDA, for every kind of value."""

from __future__ import annotations

import inputs
import pytest
import reference
import torch
from quantize_checks import check_all
from reference import FLOAT_DTYPES, FP8_DTYPES, assert_same_bits, codes

OPS = torch.ops.fp8

SHAPES = [
    (1, 1),
    (1, 17),
    (3, 5),
    (17, 33),
    (129, 65),
    (128, 64),
    (257, 1000),
    (0, 16),
    (16, 0),
    (0,),
    (1,),
    (100,),
    (4, 3, 40),
    (2, 0, 16),
    (2, 3, 5, 31),
    (2, 1, 3, 2, 48),
]


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_quantize_kinds_of_values(device, kind, x_dtype, dtype):
    check_all(inputs.make(kind, (67, 163), x_dtype, device), dtype)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_shapes(device, shape, dtype, poisoned_memory):
    check_all(inputs.make("student_t", shape, torch.bfloat16, device), dtype)


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(2048 + 7, 1536 + 9), (5000, 31), (3, 70001)], ids=str)
def test_quantize_large(device, shape, x_dtype):
    check_all(inputs.make("student_t", shape, x_dtype, device), torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4097, 14336), (16, 2**21)], ids=str)
def test_quantize_cuda_equals_cpu(shape):
    """Sizes for which the numpy reference would be slow."""
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * torch.randn(1, device="cuda")
    host = x.cpu()
    for dtype in FP8_DTYPES:
        for name in (
            *("tensorwise", "rowwise", "tensorwise_transpose", "rowwise_transpose"),
            *("blockwise_1x128", "blockwise_1x128_transpose"),
            *("blockwise_128x128", "blockwise_128x128_transpose"),
        ):
            operator = getattr(OPS, f"quantize_{name}")
            for ours, expected in zip(operator(x, dtype), operator(host, dtype), strict=True):
                assert_same_bits(ours, expected, name)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_quantize_every_16_bit_pattern_as_a_row(device, x_dtype, dtype):
    """Each pattern alone in its scaling group: NaN, Inf, zeros and subnormals too."""
    x = inputs.every_16_bit_pattern(x_dtype).unsqueeze(1).to(device)
    expected = reference.quantize_rowwise(x, dtype)
    data, scale = OPS.quantize_rowwise(x, dtype)
    assert_same_bits(scale, expected.scale, "scale")
    assert_same_bits(codes(data), expected.codes, "data")


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_quantize_every_16_bit_pattern_static(device, x_dtype, dtype):
    x = inputs.every_16_bit_pattern(x_dtype).view(256, 256).to(device)
    scale = torch.tensor(1.0, device=device)
    expected = reference.quantize_tensorwise(x, dtype, scale)
    data, returned = OPS.quantize_tensorwise(x, dtype, scale)
    assert_same_bits(codes(data), expected.codes, "data")
    assert_same_bits(returned, scale, "scale")


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_quantize_every_finite_16_bit_pattern_dynamic(device, x_dtype, dtype):
    x = inputs.every_16_bit_pattern(x_dtype)
    check_all(x[x.isfinite()].view(-1, 256).to(device), dtype)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_quantize_rounding_midpoints(device, dtype):
    """Every fp32 value where rounding turns, and its neighbours: ties go to the even code."""
    x = inputs.rounding_midpoints(dtype).to(device)
    scale = torch.tensor(1.0, device=device)
    expected = reference.quantize_tensorwise(x, dtype, scale)
    data, data_t, _ = OPS.quantize_tensorwise_transpose(x, dtype, scale)
    assert_same_bits(codes(data), expected.codes, "data")
    assert_same_bits(codes(data_t)[:, 0], expected.codes, "data_t")


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_non_finite_stays_visible(device, bad, x_dtype, dtype):
    x = torch.randn(40, 72).to(x_dtype).to(device)
    x[7, 50] = bad
    check_all(x, dtype)
    for scale in (OPS.quantize_tensorwise(x, dtype)[1], OPS.quantize_rowwise(x, dtype)[1][7]):
        assert not scale.isfinite().any()
    scale, scale_t = OPS.quantize_rowwise_transpose(x, dtype)[2:]
    assert int((~scale.isfinite()).sum()) == 1, "one bad row, 39 clean ones"
    assert int((~scale_t.isfinite()).sum()) == 1, "one bad column, 71 clean ones"


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_non_finite_stays_in_its_block(device, bad, x_dtype):
    """Padding beside it stays zero too (300 and 200 are no multiples of 16)."""
    x = torch.randn(200, 300).to(x_dtype).to(device)
    x[199, 290] = bad
    check_all(x, torch.float8_e4m3fn)
    for blocks, bad_elements in (("1x128", 300 - 256), ("128x128", (200 - 128) * (300 - 256))):
        quantize = getattr(OPS, f"quantize_blockwise_{blocks}_transpose")
        data, data_t, scale, scale_t = quantize(x)
        assert int((~scale.isfinite()).sum()) == 1
        assert int((~scale_t.isfinite()).sum()) == 1
        assert not scale[-1, -1].isfinite()
        assert not scale_t[-10 if blocks == "1x128" else -1, -1].isfinite()
        back = OPS.dequantize(data, scale)
        assert int((~back.isfinite()).sum()) == bad_elements
        rows, cols = ((200, 304), (300, 208))
        assert not data.view(torch.uint8).as_strided(rows, (304, 1))[:, 300:].any()
        assert not data_t.view(torch.uint8).as_strided(cols, (208, 1))[:, 200:].any()


def test_quantize_nan_of_any_sign_and_payload(device):
    """0x7F whatever the NaN, and NaN wins over Inf in the amax, wherever the two stand."""
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32)
    nans = bits.view(torch.float32)
    assert nans.isnan().all()
    inf = torch.tensor([float("inf")])
    for row in (torch.cat([nans, inf]), torch.cat([inf, nans]), nans[1:2], nans[3:]):
        for dtype in FP8_DTYPES:
            check_all(row.to(device), dtype)


def test_quantize_zero_amax_has_scale_one(device):
    x = inputs.make("zeros", (5, 33), torch.float32, device)
    data, scale = OPS.quantize_tensorwise(x)
    assert scale.item() == 1.0
    assert_same_bits(codes(data), (x.cpu().signbit() * 0x80).to(torch.uint8), "sign of zero")


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_quantize_tiny_amax_is_clamped(device, dtype):
    """fp8_max / amax would be Inf: FLT_MAX is used, and the scale is 1 / FLT_MAX."""
    x = torch.full((2, 16), 1e-39, device=device)
    data, scale = OPS.quantize_tensorwise(x, dtype)
    flt_max = torch.tensor(torch.finfo(torch.float32).max)
    assert_same_bits(scale, 1 / flt_max, "scale")
    assert_same_bits(codes(data), reference.quantize_tensorwise(x, dtype).codes, "data")


def test_quantize_is_deterministic(device):
    x = inputs.make("student_t", (333, 777), torch.bfloat16, device)
    first = OPS.quantize_rowwise_transpose(x)
    for _ in range(3):
        for a, b in zip(OPS.quantize_rowwise_transpose(x), first, strict=True):
            assert_same_bits(a, b)
