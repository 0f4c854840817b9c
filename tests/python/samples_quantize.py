"""Sample calls of the operators that quantize, and of scaled_mm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import E4M3, E5M2
from sample import OPS, Sample, Table, inputs
from torch import Tensor


def _quantize(static_scale: bool) -> Callable[[str], list[Sample]]:
    def make(device: str) -> list[Sample]:
        found = [Sample(name, (x, E4M3)) for name, x in inputs(device).items()]
        x = torch.randn(17, 33, device=device)
        found += [Sample("e5m2", (x, E5M2)), Sample("default dtype", (x,))]
        found.append(Sample("power of two", (x, E4M3), {"power_of_two": True}))
        if static_scale:
            scale = torch.tensor(0.25, device=device)
            found.append(Sample("static scale", (x, E4M3), {"scale": scale}))
        return found

    return make


def _dequantize(device: str) -> list[Sample]:
    found = []
    for name, x in inputs(device).items():
        for dtype in (torch.bfloat16, torch.float32):
            found.append(Sample(f"rowwise {name}", (*OPS.quantize_rowwise(x), dtype)))
    for blocks in ("1x128", "128x128"):
        quantize = getattr(OPS, f"quantize_blockwise_{blocks}_transpose")
        data, data_t, scale, scale_t = quantize(torch.randn(2, 70, 150, device=device))
        found.append(Sample(blocks, (data, scale, torch.float32)))
        found.append(Sample(f"{blocks} data_t", (data_t, scale_t)))
    data, data_t, scale = OPS.quantize_tensorwise_transpose(torch.randn(20, 36, device=device))
    found.append(Sample("tensorwise", (data, scale, torch.float16)))
    found.append(Sample("data_t, default dtype", (data_t, scale)))
    return found


# How a and b are quantized: the middle of an operator's name each.
_SCALINGS = (
    ("tensorwise", "tensorwise"),
    ("rowwise", "rowwise"),
    ("blockwise_1x128", "blockwise_128x128"),
    ("blockwise_1x128", "blockwise_1x128"),
)


def _operands(m: int, n: int, k: int, device: str, scaling: tuple[str, str]) -> tuple[Tensor, ...]:
    a, scale_a = getattr(OPS, f"quantize_{scaling[0]}")(torch.randn(m, k, device=device))
    b, scale_b = getattr(OPS, f"quantize_{scaling[1]}")(torch.randn(n, k, device=device))
    return a, b, scale_a, scale_b


_MATMUL_SHAPES = ((32, 48, 64), (7, 9, 5), (0, 16, 32), (16, 24, 0), (20, 40, 272))


def _scaled_mm(device: str) -> list[Sample]:
    found = []
    for scaling in _SCALINGS:
        for m, n, k in _MATMUL_SHAPES:
            args = _operands(m, n, k, device, scaling)
            bias = torch.randn(n, device=device, dtype=torch.bfloat16)
            what = f"{' '.join(scaling)} {m}x{n}x{k}"
            found.append(Sample(what, args))
            found.append(Sample(f"{what} bias", (*args, bias)))
            found.append(Sample(f"{what} fp32", (*args, None, torch.float32, False)))
    return found


def _scaled_mm_accumulate_(device: str) -> list[Sample]:
    return [
        Sample(f"{m}x{n}x{k} {dtype}", (out.to(dtype), *_operands(m, n, k, device, scaling)))
        for scaling in _SCALINGS
        for dtype in (torch.float32, torch.bfloat16)
        for m, n, k in _MATMUL_SHAPES
        for out in [torch.randn(m, n, device=device)]
    ]


def _scaled_mm_accumulate(device: str) -> list[Sample]:
    return [Sample(s.name, (*s.args, False)) for s in _scaled_mm_accumulate_(device)]


TABLE: Table = {
    "quantize_tensorwise": _quantize(static_scale=True),
    "quantize_rowwise": _quantize(static_scale=False),
    "quantize_tensorwise_transpose": _quantize(static_scale=True),
    "quantize_rowwise_transpose": _quantize(static_scale=False),
    "quantize_blockwise_1x128": _quantize(static_scale=False),
    "quantize_blockwise_128x128": _quantize(static_scale=False),
    "quantize_blockwise_1x128_transpose": _quantize(static_scale=False),
    "quantize_blockwise_128x128_transpose": _quantize(static_scale=False),
    "dequantize": _dequantize,
    "scaled_mm": _scaled_mm,
    "scaled_mm_accumulate_": _scaled_mm_accumulate_,
    "_scaled_mm_accumulate": _scaled_mm_accumulate,
}
