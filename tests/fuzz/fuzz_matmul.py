"""scaled_mm and scaled_mm_accumulate_ against fp64 products of the dequantized operands."""

from __future__ import annotations

import bounds
import error_bounds
import reference
import torch
from case_fields import Case, Choice, Extent, Family, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, laid_out, tensor
from error_bounds import Approx
from fuzz_quantize import FORMATS, MODES, mode
from torch import Tensor

OPS = torch.ops.fp8
PAIRS = (
    "tensor tensor",
    "rows rows",
    "blocks squares",
    "blocks blocks",
    "squares blocks",
    "squares squares",
)


def _operand(case: Case, name: str, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Data and scale: quantized values, or any codes with any scale of that shape."""
    a = name == "a"
    granularity = case["scaling"].split()[0 if a else 1]
    dtype, seed = FORMATS[case[f"{name}_format"]], case["data"] + (0 if a else 1)
    x = tensor(case[f"{name}_kind"], "contiguous", (rows, case["k"]), torch.float32, seed, "cpu")
    if granularity == "tensor":
        made = reference.quantize_tensorwise(x, dtype)
    elif granularity == "rows":
        made = reference.quantize_rowwise(x, dtype)
    else:
        made = reference.quantize_blocks(x, dtype, 128 if granularity == "squares" else 1)
    code, scale = made
    if case["codes"] != "quantized":
        largest = 256 if case["codes"] == "any" else 0x78
        code = torch.randint(largest, code.shape, dtype=torch.uint8)
        scale = torch.rand(scale.shape) * 2.0 ** torch.randint(-12, 12, scale.shape)
    data = laid_out(reference.from_codes(code, dtype).to(device), case[f"{name}_layout"])
    scale = laid_out(scale.to(device), case["scale_layout"])
    return data, scale


def check_matmul(case: Case, device: str) -> None:
    m, n = case["m"], case["n"]
    out_dtype = DTYPES[case["out_dtype"]]
    with mode(case["mode"]):
        a, scale_a = _operand(case, "a", m, device)
        b, scale_b = _operand(case, "b", n, device)
        into = case["into"]
        what = "scaled_mm" if into is None else "scaled_mm_accumulate_"
        fast = case["fast"]
        # With block scales accumulation is always split.
        blockwise = case["scaling"] not in PAIRS[:2]
        way = bounds.accumulation_of(device, fast and not blockwise)
        operands = [error_bounds.operand(a, scale_a), error_bounds.operand(b, scale_b)]
        expected = error_bounds.product(*operands, way)
        if into is None:
            bias = None
            if case["bias"]:
                wide = out_dtype == torch.float32 and case["bias"] == "bfloat16"
                bias = tensor(
                    case["bias_kind"],
                    case["bias_layout"],
                    (n,),
                    torch.bfloat16 if wide else out_dtype,
                    case["data"] + 2,
                    device,
                )
            out = OPS.scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, fast)
            expected = error_bounds.rounded(expected, out_dtype)
            expected = with_bias(expected, bias, out_dtype)
        else:
            out = tensor("normal", into, (m, n), out_dtype, case["data"] + 3, device)
            before = error_bounds.exact(out)
            same = OPS.scaled_mm_accumulate_(out, a, b, scale_a, scale_b, fast)
            assert same.data_ptr() == out.data_ptr(), f"{what} result: not its argument"
            expected = error_bounds.rounded(error_bounds.plus(expected, before), out_dtype)
    error_bounds.check(out, expected, f"{what} {case['scaling']}")


def with_bias(y: Approx, bias: Tensor | None, dtype: torch.dtype) -> Approx:
    """y, rounded already, plus bias, rounded again: no operator rounds more often."""
    if bias is None:
        return y
    return error_bounds.rounded(error_bounds.plus(y, error_bounds.exact(bias)), dtype)


MATMUL = Family(
    "matmul",
    {
        "scaling": Choice(*PAIRS),
        "m": Extent(0, 300),
        "n": Extent(0, 300),
        "k": Extent(0, 400),
        "codes": Choice("quantized", "finite", "any", plain=0.4),
        "a_format": Choice(*FORMATS),
        "b_format": Choice(*FORMATS),
        "a_kind": Choice(*KINDS),
        "b_kind": Choice(*KINDS),
        "a_layout": Choice(*LAYOUTS, plain=0.3),
        "b_layout": Choice(*LAYOUTS, plain=0.3),
        "scale_layout": Choice(*DENSE, plain=0.4),
        "into": Choice(None, *DENSE, plain=0.5),
        "out_dtype": Choice(*DTYPES),
        "bias": Choice(None, "same", "bfloat16"),
        "bias_kind": Choice(*KINDS),
        "bias_layout": Choice(*LAYOUTS),
        "fast": Choice(True, False),
        "mode": Choice(*MODES, plain=0.5),
        "data": Seed(),
    },
    check_matmul,
    share=1.5,
)
