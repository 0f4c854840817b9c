"""scaled_mm refuses what it cannot mean, with a message that names op, expected and actual."""

from __future__ import annotations

import operands
import pytest
import torch

OPS = torch.ops.fp8
M, N, K = 32, 48, 64


@pytest.fixture(params=operands.GRANULARITIES)
def data(request, device) -> operands.Operands:
    return operands.make(M, N, K, request.param, device)


def test_scaled_mm_error_shapes(data):
    a, b, scale_a, scale_b = data
    with pytest.raises(
        ValueError, match=r"fp8::scaled_mm: a and b must share K, got a=\[32, 32\], b=\[48, 64\]"
    ):
        OPS.scaled_mm(a[:, :32], b, scale_a, scale_b)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*matrices.*a=\[64\]"):
        OPS.scaled_mm(a[0], b, scale_a, scale_b)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*matrices.*b=\[1, 48, 64\]"):
        OPS.scaled_mm(a, b.unsqueeze(0), scale_a, scale_b)


def test_scaled_mm_error_operand_dtypes(data):
    a, b, scale_a, scale_b = data
    for wrong in (torch.bfloat16, torch.float32, torch.uint8):
        with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*\ba\b.*float8"):
            OPS.scaled_mm(a.float().to(wrong), b, scale_a, scale_b)
        with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*\bb\b.*float8"):
            OPS.scaled_mm(a, b.float().to(wrong), scale_a, scale_b)
    for wrong in (torch.float64, torch.float8_e4m3fn, torch.int32):
        with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*out_dtype"):
            OPS.scaled_mm(a, b, scale_a, scale_b, None, wrong)


def test_scaled_mm_error_scales(device):
    a, b, scale_a, scale_b = operands.make(M, N, K, "rowwise", device)
    one = torch.tensor(1.0, device=device)
    with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*float32.*scale_a bfloat16"):
        OPS.scaled_mm(a, b, scale_a.bfloat16(), scale_b)
    with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*float32.*scale_b float64"):
        OPS.scaled_mm(a, b, scale_a, scale_b.double())
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*scale_a.*scale_b"):
        OPS.scaled_mm(a, b, one, scale_b)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*scale_a.*scale_b"):
        OPS.scaled_mm(a, b, scale_a, one)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*scale_a.*\[31, 1\]"):
        OPS.scaled_mm(a, b, scale_a[1:], scale_b)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*scale_b.*\[47, 1\]"):
        OPS.scaled_mm(a, b, scale_a, scale_b[1:])
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*scale_b.*\[1, 48\]"):
        OPS.scaled_mm(a, b, scale_a, scale_b.t())  # torch._scaled_mm's form, not ours


def test_scaled_mm_error_bias(data):
    bias = torch.zeros(N, device=data.a.device)
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*bias.*\[48\].*\[47\]"):
        OPS.scaled_mm(*data, bias[1:].bfloat16())
    with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*bias.*\[1, 48\]"):
        OPS.scaled_mm(*data, bias.bfloat16().unsqueeze(0))
    for out_dtype, wrong in (
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        with pytest.raises(TypeError, match=r"fp8::scaled_mm: .*bias"):
            OPS.scaled_mm(*data, bias.to(wrong), out_dtype)


def test_scaled_mm_error_devices(data):
    a, b, scale_a, scale_b = data
    for args in (
        (a, b.to("meta"), scale_a, scale_b),
        (a, b, scale_a.to("meta"), scale_b),
        (a, b, scale_a, scale_b.to("meta")),
        (a, b, scale_a, scale_b, torch.zeros(N, device="meta", dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=r"fp8::scaled_mm: .*meta"):
            OPS.scaled_mm(*args)


def test_scaled_mm_error_on_meta_is_the_same(device):
    """One contract: Meta kernels refuse what the real ones refuse, in the same words."""
    real = operands.make(M, N, K, "rowwise", device)
    meta = operands.Operands(*(tensor.to("meta") for tensor in real))
    broken = (
        lambda d: (d.a[:, :32], *d[1:]),
        lambda d: (d.a, d.b, d.scale_a[1:], d.scale_b),
        lambda d: (*d, torch.zeros(3, device=d.a.device, dtype=torch.bfloat16)),
        lambda d: (*d, None, torch.float64),
    )
    for breaking in broken:
        messages = []
        for data in (real, meta):
            with pytest.raises((ValueError, TypeError)) as caught:
                OPS.scaled_mm(*breaking(data))
            messages.append((caught.type, str(caught.value).splitlines()[0]))
        assert messages[0] == messages[1]
