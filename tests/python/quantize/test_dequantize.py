"""Dequantize: all 256 codes of both formats, every output dtype, every stride."""

from __future__ import annotations

import inputs
import pytest
import reference
import torch
from reference import E4M3, FLOAT_DTYPES, FP8_DTYPES, assert_same_bits

OPS = torch.ops.fp8


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 1e-38, 1e36, float("nan"), float("inf")])
def test_dequantize_every_code(device, dtype, out_dtype, scale):
    data = reference.from_codes(torch.arange(256).view(16, 16), dtype).to(device)
    factor = torch.tensor(scale, device=device)
    actual = OPS.dequantize(data, factor, out_dtype)
    assert_same_bits(actual, reference.dequantize(data, factor, out_dtype))


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (17, 33), (129, 64), (3, 5, 20), (50,), (0, 16), (4, 0), (200, 272), (3, 50, 300)],
    ids=str,
)
def test_dequantize_what_quantize_made(device, shape, out_dtype):
    """Padded rows, rowwise and tensorwise scales, and the transposed copies."""
    x = inputs.make("student_t", shape, torch.float32, device)
    for dtype in FP8_DTYPES:
        data, data_t, scale = OPS.quantize_tensorwise_transpose(x, dtype)
        pairs = [(data, scale), (data_t, scale)]
        data, data_t, scale, scale_t = OPS.quantize_rowwise_transpose(x, dtype)
        pairs += [(data, scale), (data_t, scale_t)]
        for blocks in ("1x128", "128x128"):
            quantize = getattr(OPS, f"quantize_blockwise_{blocks}_transpose")
            data, data_t, scale, scale_t = quantize(x, dtype)
            pairs += [(data, scale), (data_t, scale_t)]
        for data, scale in pairs:
            actual = OPS.dequantize(data, scale, out_dtype)
            assert actual.is_contiguous()
            assert_same_bits(actual, reference.dequantize(data, scale, out_dtype))


def test_dequantize_strided(device):
    data, _, scale, _ = OPS.quantize_rowwise_transpose(torch.randn(48, 80, device=device))
    views = {
        "transposed": (data.t(), scale.t()),
        "sliced": (data[3:, 5:30], scale[3:]),
        "step": (data[::2, 1::3], scale[::2]),
        "expanded": (data[:1].expand(9, -1), scale[:1].expand(9, -1)),
        "scale of other strides": (data, scale.expand(-1, 3)[:, 1:2]),
    }
    for name, (view, factor) in views.items():
        if name == "transposed":  # its groups are columns, which no scale shape of ours describes
            factor = torch.tensor(0.5, device=device)
        actual = OPS.dequantize(view, factor, torch.float32)
        assert_same_bits(actual, reference.dequantize(view, factor, torch.float32), name)


def test_dequantize_block_scales_of_any_strides(device):
    """Contiguous scales, and data whose rows are not whole groups of eight."""
    for shape in ((140, 300), (130, 256), (140, 259)):
        x = torch.randn(shape, device=device)
        for blocks in ("1x128", "128x128"):
            data, scale = getattr(OPS, f"quantize_blockwise_{blocks}")(x)
            expected = reference.dequantize(data, scale, torch.float32)
            for view in (scale, scale.contiguous(), scale.t().contiguous().t()):
                assert_same_bits(OPS.dequantize(data, view, torch.float32), expected)
            transposed = data.t().contiguous().t()
            assert_same_bits(OPS.dequantize(transposed, scale, torch.float32), expected)


def test_dequantize_defaults_to_bfloat16(device):
    data, scale = OPS.quantize_tensorwise(torch.randn(8, 32, device=device))
    assert OPS.dequantize(data, scale).dtype == torch.bfloat16


def test_dequantize_inverts_quantize(device):
    """Error of at most half a step: 2^-4 relative for normal e4m3 numbers, else 2^-10 · scale."""
    x = torch.randn(64, 96, device=device)
    data, scale = OPS.quantize_rowwise(x)
    error = (OPS.dequantize(data, scale, torch.float32) - x).abs()
    assert (error <= x.abs() * 2**-4 * (1 + 1e-6) + scale * 2**-10).all()


def test_dequantize_errors(device):
    data, scale = OPS.quantize_rowwise(torch.randn(8, 32, device=device))
    with pytest.raises(TypeError, match=r"fp8::dequantize: .*data"):
        OPS.dequantize(torch.zeros(8, 32, device=device), scale)
    with pytest.raises(TypeError, match=r"fp8::dequantize: .*scale"):
        OPS.dequantize(data, scale.double())
    with pytest.raises(TypeError, match=r"fp8::dequantize: .*dtype"):
        OPS.dequantize(data, scale, torch.float64)
    with pytest.raises(TypeError, match=r"fp8::dequantize: .*dtype"):
        OPS.dequantize(data, scale, E4M3)
    with pytest.raises(ValueError, match=r"fp8::dequantize: .*scale.*\[7, 1\]"):
        OPS.dequantize(data, scale[:7])
    for wrong in (scale.expand(8, 2), scale.view(1, 8), scale.view(2, 4), scale.view(8)):
        with pytest.raises(ValueError, match=r"fp8::dequantize: .*1x128.*scale=\["):
            OPS.dequantize(data, wrong)
    with pytest.raises(ValueError, match=r"fp8::dequantize: .*meta"):
        OPS.dequantize(data, scale.to("meta"))
