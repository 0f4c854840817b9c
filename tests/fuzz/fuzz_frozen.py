"""linear_frozen, forward and backward: any codes and scales, in memory of any layout.

The reference quantizes x and dy to the bit and multiplies in fp64.
"""

from __future__ import annotations

import contextlib

import bounds
import error_bounds
import reference
import torch
from case_fields import Case, Choice, Extent, Family, Lead, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, laid_out, tensor
from error_bounds import Approx, Operand, exact, product, quantized, rounded
from fuzz_matmul import with_bias
from fuzz_quantize import MODES, mode
from reference import E4M3, as_matrix, assert_same_bits
from torch import Tensor

import fp8

OPS = torch.ops.fp8
# What of the weight shares a scale, and what of x: the reference's words and the operator's.
FORMS = (
    "tensor tensorwise",
    "tensor rowwise",
    "rows tensorwise",
    "rows rowwise",
    "squares blockwise",
)
OF_X = {"tensorwise": "tensor", "rowwise": "rows", "blockwise": "blocks"}


def _weight(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Codes and scales: quantized values, or any codes with any scales."""
    granularity, _ = case["form"].split()
    n, k = case["n"], case["k"]
    x = tensor(case["w_kind"], "contiguous", (n, k), torch.float32, case["data"], "cpu")
    if granularity == "tensor":
        codes, scale = reference.quantize_tensorwise(x, E4M3)
    elif granularity == "rows":
        codes, scale = reference.quantize_rowwise(x, E4M3)
    else:
        codes, scale = reference.quantize_blocks(x, E4M3, 128)
    if case["codes"] == "any":
        codes = torch.randint(0x78, codes.shape, dtype=torch.uint8)
        scale = torch.rand(scale.shape) * 2.0 ** torch.randint(-12, 12, scale.shape)
    data = laid_out(reference.from_codes(codes, E4M3).to(device), case["w_layout"])
    return data, laid_out(scale.to(device), case["scale_layout"])


def _transposed(weight: Operand) -> Operand:
    value, error = weight.value.t(), weight.error.t()
    each = weight.scale.amax() if weight.scale.numel() else torch.ones((), dtype=torch.float64)
    return Operand(value, error, each.expand(value.shape[0], 1), weight.largest_code)


def _input_gradient(case: Case, dy: Tensor, data: Tensor, scale: Tensor, device: str) -> Approx:
    granularity, _ = case["form"].split()
    two = case["power_of_two"]
    matrix = as_matrix(dy.detach().cpu())
    if granularity == "rows" and scale.numel() != 1:  # one is the whole weight's
        dtype = torch.float32 if dy.dtype == torch.float16 else dy.dtype
        matrix = (matrix.float() * scale.detach().cpu().reshape(1, -1)).to(dtype)
        scale = torch.ones_like(scale)
    rows = "blocks" if granularity == "squares" else "rows"
    weight = _transposed(error_bounds.operand(data, scale))
    way = bounds.accumulation_of(device, False)
    return rounded(product(quantized(exact(matrix), rows, E4M3, two), weight, way), dy.dtype)


def check_frozen(case: Case, device: str) -> None:
    dtype = DTYPES[case["dtype"]]
    granularity, of_x = case["form"].split()
    seed = case["data"]
    with mode(case["mode"]):
        data, scale = _weight(case, device)
        shape = (*case["lead"], case["k"])
        x = tensor(case["x_kind"], case["x_layout"], shape, dtype, seed + 1, device).detach()
        bias = None
        if case["bias"]:
            bias = tensor(case["b_kind"], case["b_layout"], (case["n"],), dtype, seed + 2, device)
            bias = bias.detach().requires_grad_("b" in case["wants"])
        x.requires_grad_("x" in case["wants"])
        static = None
        if of_x == "tensorwise" and case["scale"] is not None:
            static = torch.tensor(case["scale"], device=device)
        autocast = case["autocast"] and DTYPES[case["autocast"]]
        cast = contextlib.nullcontext()
        if autocast:
            cast = torch.autocast(torch.device(device).type, autocast)
        two = case["power_of_two"]
        options = {"input_granularity": of_x, "power_of_two": two}
        invariant = case["invariant"] and (of_x != "tensorwise" or static is not None)
        rows = fp8.batch_invariant if invariant else contextlib.nullcontext
        with cast, rows():
            y = OPS.linear_frozen(x, data, scale, bias, static, **options)
            if invariant and y.dim() > 1 and y.numel():
                last = as_matrix(x.detach())[-1:]
                alone = OPS.linear_frozen(last, data, scale, bias, static, **options)
                found_of_all = as_matrix(y.detach())[-1:]
                assert_same_bits(alone.detach(), found_of_all, "linear_frozen of the last row")
        within = autocast or dtype
        what = f"linear_frozen y, {case['form']}"
        assert y.dtype == within, f"{what} dtype: {y.dtype}, expected {within}"
        matrix = exact(as_matrix(x.detach().cpu().to(within)))
        weight = error_bounds.operand(data, scale)
        given = None if static is None else static.cpu()
        qx = quantized(matrix, OF_X[of_x], E4M3, two and given is None, given)
        way = bounds.accumulation_of(device, granularity != "squares")
        expected = rounded(product(qx, weight, way), within)
        cast_bias = None if bias is None else bias.detach().cpu().to(within)
        error_bounds.check(as_matrix(y.detach()), with_bias(expected, cast_bias, within), what)
        if not y.requires_grad:
            return
        dy = tensor(case["dy_kind"], case["dy_layout"], tuple(y.shape), within, seed + 3, device)
        leaves = [t for t in (x, bias) if t is not None and t.requires_grad]
        found = dict(zip(leaves, torch.autograd.grad(y, leaves, dy.detach()), strict=True))
        if x.requires_grad:
            expected = _input_gradient(case, dy, data, scale, device)
            if dtype != within:
                expected = rounded(expected, dtype)
            grad = found[x].reshape(expected.value.shape)
            error_bounds.check(grad, expected, f"linear_frozen dx, {case['form']}")
        if bias is not None and bias.requires_grad:
            matrix = exact(as_matrix(dy.detach().cpu()))
            expected = rounded(rounded(error_bounds.total(matrix), within), dtype)
            error_bounds.check(found[bias], expected, f"linear_frozen db, {case['form']}")
        with torch.no_grad(), cast, rows():
            again = OPS.linear_frozen(x, data, scale, bias, static, **options)
        assert_same_bits(again, y.detach(), "linear_frozen repeated")


FROZEN = Family(
    "frozen",
    {
        "form": Choice(*FORMS),
        "lead": Lead(300),
        "k": Extent(0, 300),
        "n": Extent(0, 300),
        "dtype": Choice(*DTYPES),
        "codes": Choice("quantized", "any"),
        "bias": Choice(False, True),
        "power_of_two": Choice(False, True, plain=0.7),
        "invariant": Choice(False, True, plain=0.7),
        "w_kind": Choice(*KINDS, plain=0.3),
        "x_kind": Choice(*KINDS, plain=0.3),
        "b_kind": Choice(*KINDS, plain=0.4),
        "dy_kind": Choice(*KINDS, plain=0.3),
        "w_layout": Choice(*LAYOUTS, plain=0.4),
        "scale_layout": Choice(*DENSE, plain=0.5),
        "x_layout": Choice(*LAYOUTS, plain=0.4),
        "b_layout": Choice(*LAYOUTS, plain=0.4),
        "dy_layout": Choice(*LAYOUTS, plain=0.4),
        "wants": Choice("x", "", "b", "xb"),
        "scale": Choice(None, 1.0, 0.01, 1e-38, 3e35, plain=0.6),
        "autocast": Choice(None, "bfloat16", "float16", plain=0.7),
        "mode": Choice(*MODES, plain=0.7),
        "data": Seed(),
    },
    check_frozen,
)
