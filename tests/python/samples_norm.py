"""Sample calls of the norms and of rope."""

from __future__ import annotations

import torch
from sample import OPS, Sample, Table

_NORM_SHAPES = ((5, 64), (2, 3, 20), (7,), (0, 16), (3, 0), (4, 1), (3, 1000))
NORM_FORMS = ("scale_then_round", "round_then_scale", "scale_by_one_plus")


def _norm_tensors(shape: tuple[int, ...], device: str, dtype: torch.dtype, count: int) -> list:
    """`count` tensors of the shape, then a weight and a bias; all with a gradient."""
    shapes = (*(shape,) * count, shape[-1:], shape[-1:])
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def _rms_norm(device: str) -> list[Sample]:
    found = []
    for shape in _NORM_SHAPES:
        for form in NORM_FORMS:
            x, weight, _ = _norm_tensors(shape, device, torch.bfloat16, 1)
            found.append(Sample(f"{shape} {form}", (x, weight, 1e-6, form)))
    x, weight, _ = _norm_tensors((4, 3, 40), device, torch.float16, 1)
    for form in NORM_FORMS:
        found.append(Sample(f"fp32 weight {form}", (x, weight.detach().float(), 1e-6, form)))
    found.append(Sample("defaults, no weight", (x,)))
    found.append(Sample("no grad", (x.detach(), weight.detach())))
    found.append(Sample("strided", (x.transpose(0, 1), weight)))
    found.append(Sample("columns", (torch.randn(8, 6, device=device).t(),)))
    return found


def _layer_norm(device: str) -> list[Sample]:
    found = []
    for shape in _NORM_SHAPES:
        x, weight, bias = _norm_tensors(shape, device, torch.bfloat16, 1)
        found.append(Sample(f"{shape}", (x, weight, bias, 1e-6)))
    x, weight, bias = _norm_tensors((4, 40), device, torch.float32, 1)
    found += [Sample("no bias", (x, weight)), Sample("neither", (x,))]
    found.append(Sample("bias alone", (x, None, bias)))
    mixed = (x.detach().half(), weight.detach(), bias.detach().half())
    found.append(Sample("mixed, no grad", mixed))
    return found


def _add_rms_norm(device: str) -> list[Sample]:
    found = []
    for shape in _NORM_SHAPES:
        for form in NORM_FORMS:
            x, residual, weight, _ = _norm_tensors(shape, device, torch.bfloat16, 2)
            found.append(Sample(f"{shape} {form}", (x, residual, weight, 1e-6, form)))
    x, residual, weight, _ = _norm_tensors((4, 40), device, torch.float32, 2)
    found.append(Sample("frozen", (x.detach(), residual, weight.detach())))
    found.append(Sample("no weight", (x, residual)))
    found.append(Sample("no grad", (x.detach(), residual.detach(), weight.detach())))
    return found


def _norm_and_input(device: str) -> list[Sample]:
    found = []
    for shape in _NORM_SHAPES:
        x, weight, bias = _norm_tensors(shape, device, torch.bfloat16, 1)
        found += [Sample(f"{shape} {f}", (x, weight, None, 1e-6, f)) for f in range(3)]
        found.append(Sample(f"{shape} layer", (x, weight, bias, 1e-6, 3)))
    x, weight, _ = _norm_tensors((4, 3, 40), device, torch.float16, 1)
    found.append(Sample("fp32 weight", (x, weight.detach().float(), None, 1e-6, 1)))
    found.append(Sample("no grad", (x.detach(), weight.detach(), None, 1e-6, 0)))
    found.append(Sample("strided", (x.transpose(0, 1), None, None, 1e-6, 0)))
    return found


def _norm_forward(device: str) -> list[Sample]:
    found = []
    for shape in _NORM_SHAPES:
        x, residual, weight, bias = (
            t.detach() for t in _norm_tensors(shape, device, torch.bfloat16, 2)
        )
        found += [Sample(f"{shape} {f}", (x, None, weight, None, 1e-6, f)) for f in range(3)]
        found.append(Sample(f"{shape} residual", (x, residual, weight, None, 1e-6, 0)))
        found.append(Sample(f"{shape} layer", (x, None, weight, bias, 1e-6, 3)))
    return found


def _norm_backward(device: str) -> list[Sample]:
    found = []
    for sample in _norm_forward(device):
        x, residual, weight, bias, _, form = sample.args
        _, normed, mean, rstd = OPS._norm_forward(*sample.args)
        dy = torch.randn_like(x)
        saved = (x if residual is None else normed, mean if form == 3 else None, rstd, weight)
        bias_dtype = None if bias is None else bias.dtype
        for needs in ((True, True), (True, False), (False, True)):
            flags = (*needs, needs[1] and bias is not None)
            args = (dy, *saved, residual, bias_dtype, form, *flags)
            found.append(Sample(f"{sample.name} needs {flags}", args))
    return found


ROPE_LAYOUTS = ("halves", "interleaved", "interleaved_to_halves")  # in the order of their numbers
_ROPES = (
    # batch, heads of q and of k (0: no k), positions, D, columns of cos, R, layout
    ((2,), 5, 2, 3, 64, 64, 64, 0),
    ((2,), 5, 4, 3, 24, 8, 16, 1),
    ((), 3, 0, 5, 20, 10, 20, 2),
    ((0,), 3, 2, 4, 16, 16, 16, 1),
)


def _rope_tensors(case: tuple, device: str, dtype: torch.dtype, cos_dtype: torch.dtype) -> list:
    """q, k, cos and sin; in memory positions lie before heads."""
    batch, *heads, positions, size, columns, _, _ = case
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    rows = [(*batch, positions, count, size) for count in heads if count]
    q, k = [*(torch.randn(s, **options).transpose(-2, -3) for s in rows), None][:2]
    return [q, k, *(torch.randn(positions, columns, device=device).to(cos_dtype) for _ in "cs")]


def _rope(device: str) -> list[Sample]:
    found = []
    bf16 = torch.bfloat16
    for case in _ROPES:
        *_, rotary, layout = case
        for rounding in ("each", "sum", "once"):
            wide = torch.float32 if rounding == "sum" else bf16
            options = {"layout": ROPE_LAYOUTS[layout], "rotary_dim": rotary, "rounding": rounding}
            args = (*_rope_tensors(case, device, bf16, wide),)
            found.append(Sample(f"{case} {rounding}", args, options))
    q, k, cos, sin = _rope_tensors(_ROPES[0], device, torch.float16, torch.float32)
    found.append(Sample("fp32 results", (q, k, cos, sin)))
    found.append(Sample("no grad", (q.detach(), k.detach(), cos.half(), sin.half())))
    angles = [torch.randn(2, 1, 3, 64, device=device) for _ in range(2)]
    found.append(Sample("angles of each batch", (q, k.detach(), *angles)))
    x, angles = torch.randn(8, 6, device=device), torch.randn(2, 6, 8, device=device)
    found.append(Sample("columns", (x.t(), None, *angles)))
    found.append(Sample("1-D", (x[0], None, *torch.randn(2, 6, device=device))))
    return found


def _private_rope(device: str) -> list[Sample]:
    """Numbers of forms: csrc/torch/rope/rope_ops.h."""
    found = []
    for case in _ROPES:
        *_, rotary, layout = case
        q, k, *angles = _rope_tensors(case, device, torch.bfloat16, torch.bfloat16)
        order = list(range(q.dim()))
        for form in (0, 4, 8, 16, 16 | 8, 16 | 32):
            args = (q, k, *angles, rotary, layout | form, None, order, [])
            found.append(Sample(f"{case} {form}", args))
        found.append(Sample(f"{case} k", (None, q, *angles, rotary, layout, None, [], order)))
    q, _, *angles = _rope_tensors(_ROPES[0], device, torch.float32, torch.float32)
    found.append(Sample("to bf16", (q, None, *angles, 64, 16, torch.bfloat16, [], [])))
    return found


TABLE: Table = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "_norm_and_input": _norm_and_input,
    "_norm_forward": _norm_forward,
    "_norm_backward": _norm_backward,
    "rope": _rope,
    "_rope": _private_rope,
}
