"""The quantize operators and dequantize, bit for bit, on inputs of any shape, layout and value."""

from __future__ import annotations

import reference
import torch
from case_fields import Case, Choice, Extent, Family, Lead, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, laid_out, tensor
from reference import E4M3, E5M2, assert_same_bits, codes
from torch import Tensor

import fp8  # noqa: F401  (registers the operators)

OPS = torch.ops.fp8
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
MODES = ("grad", "no_grad", "inference")


def mode(name: str) -> torch.autograd.grad_mode.inference_mode | torch.set_grad_enabled:
    """The context of that name."""
    return torch.inference_mode() if name == "inference" else torch.set_grad_enabled(name == "grad")


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    assert_same_bits(actual, expected.reshape(actual.shape) if expected.numel() else expected, what)


def _padding(data: Tensor, what: str) -> None:
    """Behind the elements of a row lie zeros, up to a multiple of 16."""
    flat = data.view(torch.uint8)
    rows, cols = reference.as_matrix(data).shape
    width = -(-cols // 16) * 16
    if rows > 1 and width > cols > 0:
        behind = flat.as_strided((rows, width), (width, 1))[:, cols:]
        assert not behind.any(), f"{what} padding: not zero"


def _expected(x: Tensor, way: str, dtype, power_of_two: bool, scale: Tensor | None):
    if way == "tensorwise":
        return reference.quantize_tensorwise(x, dtype, scale, power_of_two)
    if way == "rowwise":
        return reference.quantize_rowwise(x, dtype, power_of_two)
    rows = 128 if way == "blockwise_128x128" else 1
    return reference.quantize_blocks(x, dtype, rows, power_of_two)


def check_quantize(case: Case, device: str) -> None:
    way, dtype = case["way"], FORMATS[case["format"]]
    shape = (*case["lead"], case["k"])
    with mode(case["mode"]):
        x = tensor(case["kind"], case["layout"], shape, DTYPES[case["dtype"]], case["data"], device)
        x.requires_grad_(case["requires_grad"])
        scale, options = None, {"power_of_two": case["power_of_two"]}
        if way == "tensorwise" and case["scale"] is not None:
            scale = torch.tensor(case["scale"], device=device)
            options = {"scale": scale}
        transposed = "_transpose" if case["transpose"] else ""
        what = f"quantize_{way}{transposed}"
        made = getattr(OPS, what)(x, dtype, **options)
    power_of_two = case["power_of_two"] and scale is None
    expected = _expected(x, way, dtype, power_of_two, scale)
    _same(made[-2 if way != "tensorwise" and transposed else -1], expected.scale, f"{what} scale")
    assert_same_bits(codes(made[0]), expected.codes, f"{what} data")
    _padding(made[0], what)
    if not transposed:
        return
    matrix = reference.as_matrix(x.detach().cpu())
    other = _expected(matrix.t(), way, dtype, power_of_two, scale)
    assert_same_bits(codes(made[1]), other.codes, f"{what} data_t")
    _padding(made[1], f"{what} data_t")
    if way != "tensorwise":
        _same(made[3], other.scale, f"{what} scale_t")


def check_dequantize(case: Case, device: str) -> None:
    """Of what was quantized on this device, or of any codes and scales."""
    dtype, out_dtype = FORMATS[case["format"]], DTYPES[case["out_dtype"]]
    shape = (*case["lead"], case["k"])
    x = tensor(case["kind"], "contiguous", shape, torch.float32, case["data"], device)
    way = case["way"]
    data, scale = getattr(OPS, f"quantize_{way}")(x, dtype)
    if case["any_codes"]:
        data = torch.randint(256, data.shape, dtype=torch.uint8).to(device).view(dtype)
    data = laid_out(data, case["layout"])
    with mode(case["mode"]):
        out = OPS.dequantize(data, scale, out_dtype)
    _same(out, reference.dequantize(data, scale, out_dtype), f"dequantize {way}")


WAYS = ("tensorwise", "rowwise", "blockwise_1x128", "blockwise_128x128")
_SHAPE = {"lead": Lead(300), "k": Extent(0, 400)}
QUANTIZE = Family(
    "quantize",
    {
        "way": Choice(*WAYS),
        "transpose": Choice(False, True),
        **_SHAPE,
        "dtype": Choice(*DTYPES),
        "format": Choice(*FORMATS),
        "kind": Choice(*KINDS),
        "layout": Choice(*LAYOUTS, plain=0.3),
        "power_of_two": Choice(False, True),
        "scale": Choice(None, 1.0, 0.01, 1e-38, 3e35, plain=0.6),
        "mode": Choice(*MODES, plain=0.5),
        "requires_grad": Choice(False, True),
        "data": Seed(),
    },
    check_quantize,
    share=2,
)
DEQUANTIZE = Family(
    "dequantize",
    {
        "way": Choice(*WAYS),
        **_SHAPE,
        "format": Choice(*FORMATS),
        "kind": Choice(*KINDS),
        "any_codes": Choice(False, True),
        "layout": Choice(*DENSE),
        "out_dtype": Choice(*DTYPES),
        "mode": Choice(*MODES, plain=0.5),
        "data": Seed(),
    },
    check_dequantize,
)
