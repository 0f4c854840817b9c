"""linear_frozen refuses what it cannot compute, and says what it expected and what came."""

from __future__ import annotations

import pytest
import torch
from frozen_reference import problem

import fp8

OP = r"fp8::linear_frozen: .*"


@pytest.fixture
def tensors(device):
    return problem(((16,), 272, 144), "rowwise", bias=True, device=device)


def test_linear_frozen_error_dtypes(tensors):
    p = tensors
    with pytest.raises(TypeError, match=OP + r"weight in float8_e4m3fn, got bfloat16"):
        fp8.ops.linear_frozen(p.x, p.weight, p.scale)
    other = p.codes.float().to(torch.float8_e5m2)
    with pytest.raises(TypeError, match=OP + r"weight in float8_e4m3fn, got float8_e5m2"):
        fp8.ops.linear_frozen(p.x, other, p.scale)
    with pytest.raises(TypeError, match=OP + r"x in bfloat16.*got float64"):
        fp8.ops.linear_frozen(p.x.double(), p.codes, p.scale)
    with pytest.raises(TypeError, match=OP + r"weight_scale in float32, got bfloat16"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale.bfloat16())
    with pytest.raises(TypeError, match=OP + r"bias in x's dtype bfloat16, got float32"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias.float())
    scale = torch.ones((), dtype=torch.float64, device=p.x.device)
    with pytest.raises(TypeError, match=OP + r"input_scale in float32, got float64"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, None, scale)


def test_linear_frozen_error_shapes(tensors):
    p = tensors
    with pytest.raises(ValueError, match=OP + r"share K.*\[16, 271\].*\[144, 272\]"):
        fp8.ops.linear_frozen(p.x[:, 1:], p.codes, p.scale)
    with pytest.raises(ValueError, match=OP + r"weight \[N, K\].*\[272\]"):
        fp8.ops.linear_frozen(p.x, p.codes[0], p.scale)
    for wrong in ((143, 1), (2, 2), (144, 2), (3, 2), (2, 3, 1), (0,), (145,)):
        scale = torch.ones(wrong, device=p.x.device)
        shown = str(list(wrong)).replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(ValueError, match=OP + r"144 .*\[2, 3\].*got shape " + shown):
            fp8.ops.linear_frozen(p.x, p.codes, scale)
    with pytest.raises(ValueError, match=OP + r"bias of shape \[N\] = \[144\], got \[143\]"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias[1:])
    with pytest.raises(ValueError, match=OP + r"input_scale of one element, got shape \[2\]"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, None, torch.ones(2, device=p.x.device))
    with pytest.raises(ValueError, match=OP + r"x of at least one dimension"):
        fp8.ops.linear_frozen(p.x[0, 0], p.codes, p.scale)


def test_linear_frozen_error_options(tensors):
    p = tensors
    with pytest.raises(ValueError, match=OP + r"'tensorwise', 'rowwise' or 'blockwise', got 'row'"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="row")
    with pytest.raises(ValueError, match=OP + r"128x128 blocks.*got 'blockwise'"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="blockwise")
    one = torch.ones((), device=p.x.device)
    with pytest.raises(ValueError, match=OP + r"with input_scale, got 'rowwise'"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale, None, one, input_granularity="rowwise")
    codes, scale = fp8.ops.quantize_blockwise_128x128(p.weight)
    with pytest.raises(ValueError, match=OP + r"no input_scale with a weight of 128x128 blocks"):
        fp8.ops.linear_frozen(p.x, codes, scale, None, one)
    for name in ("tensorwise", "rowwise"):
        with pytest.raises(ValueError, match=OP + rf"128x128 blocks.*got '{name}'"):
            fp8.ops.linear_frozen(p.x, codes, scale, input_granularity=name)


def test_linear_frozen_error_devices(tensors):
    p = tensors
    with pytest.raises(ValueError, match=OP + r"weight on the device of x"):
        fp8.ops.linear_frozen(p.x.to("meta"), p.codes, p.scale)
    with pytest.raises(ValueError, match=OP + r"weight_scale on the device of weight"):
        fp8.ops.linear_frozen(p.x, p.codes, p.scale.to("meta"))
