"""grouped_mm: each group against the fp64 product of its dequantized operands."""

from __future__ import annotations

from itertools import pairwise

import bounds
import error_bounds
import reference
import torch
from case_fields import Case, Choice, Extent, Family, Listed, Seed
from case_tensors import DENSE, DTYPES, KINDS, laid_out, tensor
from error_bounds import Approx
from fuzz_grouped import joined, stacked
from fuzz_quantize import MODES, mode
from reference import E4M3
from torch import Tensor

OPS = torch.ops.fp8
PAD = 32  # columns of a group: core::kGroupPad


def _codes(case: Case, name: str, shape: tuple[int, ...]) -> Tensor:
    """Of values of a kind, or any at all."""
    seed = case["data"] + (name == "b")
    if case["codes"] == "quantized":
        x = tensor(case[f"{name}_kind"], "contiguous", shape, torch.float32, seed, "cpu")
        if not x.numel():
            return x.to(E4M3)
        flat = reference.quantize_rowwise(x.reshape(-1, shape[-1]), E4M3)
        return reference.from_codes(flat.codes, E4M3).view(shape)
    torch.manual_seed(seed)
    largest = 256 if case["codes"] == "any" else 0x78
    return reference.from_codes(torch.randint(largest, shape, dtype=torch.uint8), E4M3)


def _scale(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * 2.0 ** torch.randint(-12, 12, shape)


def _ends(counts: list[int]) -> list[int]:
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return ends


def _of_rows(case: Case) -> tuple[list[Tensor], list[int]]:
    """a, b and their scales, and where groups begin and end."""
    k, n, ends = case["k"], case["n"], _ends(case["counts"])
    rows, groups = ends[-1] + case["spare"], len(case["counts"])
    a, b = _codes(case, "a", (rows, k)), _codes(case, "b", (groups, n, k))
    blocks = -(-k // 128)
    shapes = {
        "tensor": ((), ()),
        "rows": ((rows, 1), (groups, n, 1)),
        "blocks": ((rows, blocks), (groups, -(-n // 128), blocks)),
    }[case["scaling"]]
    return [a, b, *(_scale(shape) for shape in shapes)], ends


def _of_columns(case: Case) -> tuple[list[Tensor], list[int]]:
    """The same; codes of zero behind the columns of each group."""
    m, n = case["k"], case["n"]
    extents = [max(-(-count // PAD), 1) * PAD for count in case["counts"]]
    ends = _ends(extents)
    a, b = _codes(case, "a", (m, ends[-1])), _codes(case, "b", (n, ends[-1]))
    for begin, count, extent in zip(ends, case["counts"], extents, strict=False):
        for t in (a, b):
            t.view(torch.uint8)[:, begin + count : begin + extent] = 0
    return [a, b, *(_scale((len(extents), rows)) for rows in (m, n))], ends


def _expected(case: Case, operands: list[Tensor], ends: list[int], device: str) -> Approx:
    a, b, scale_a, scale_b = operands
    way = bounds.accumulation_of(device, case["fast"] and case["scaling"] != "blocks")
    hopper = device != "cpu" and torch.cuda.get_device_capability() == (9, 0)
    out_dtype = DTYPES[case["out_dtype"]]
    by_aten = device != "cpu" and not hopper and case["scaling"] != "blocks"
    parts = []
    for g, (begin, end) in enumerate(pairwise(ends)):
        if case["columns"]:
            pairs = [
                (t[:, begin:end], scale[g][:, None]) for t, scale in ((a, scale_a), (b, scale_b))
            ]
        elif case["scaling"] == "tensor":
            pairs = [(a[begin:end], scale_a), (b[g], scale_b)]
        else:
            pairs = [(a[begin:end], scale_a[begin:end]), (b[g], scale_b[g])]
        part = error_bounds.product(*(error_bounds.operand(*pair) for pair in pairs), way)
        if by_aten:
            part = error_bounds.rounded(part, torch.bfloat16)
        parts.append(error_bounds.rounded(part, out_dtype))
    if case["columns"]:
        return stacked(parts)
    return joined(parts, (a.shape[0], b.shape[1]))


def check_grouped_mm(case: Case, device: str) -> None:
    with mode(case["mode"]):
        made, ends = (_of_columns if case["columns"] else _of_rows)(case)
        layouts = (case["a_layout"], case["b_layout"], *(case["scale_layout"],) * 2)
        given = [laid_out(t.to(device), how) for t, how in zip(made, layouts, strict=True)]
        offsets = torch.tensor(ends[1:], dtype=torch.int32, device=device)
        out_dtype = DTYPES[case["out_dtype"]]
        out = OPS.grouped_mm(*given, offsets, out_dtype, case["fast"])
        what = f"grouped_mm {'columns' if case['columns'] else case['scaling']}"
        assert out.dtype == out_dtype, f"{what} dtype: {out.dtype}"
        error_bounds.check(out, _expected(case, made, ends, device), what)


GROUPED_MM = Family(
    "grouped_mm",
    {
        "columns": Choice(False, True, plain=0.6),
        "scaling": Choice("tensor", "rows", "blocks"),  # of rows
        "counts": Listed(Extent(0, 300), 1, 6),
        "spare": Choice(0, 1, 5, plain=0.7),
        "k": Extent(0, 400),  # rows of a, where groups are columns
        "n": Extent(0, 300),
        "codes": Choice("quantized", "finite", "any", plain=0.4),
        "a_kind": Choice(*KINDS),
        "b_kind": Choice(*KINDS),
        "a_layout": Choice(*DENSE, plain=0.4),
        "b_layout": Choice(*DENSE, plain=0.4),
        "scale_layout": Choice(*DENSE, plain=0.4),
        "out_dtype": Choice(*DTYPES),
        "fast": Choice(True, False),
        "mode": Choice(*MODES, plain=0.5),
        "data": Seed(),
    },
    check_grouped_mm,
)
