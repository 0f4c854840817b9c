"""One table of sample calls for every operator of the namespace; the generic tests (opcheck, fake
tensors, registration) run over it. A new operator gets a row here, or a test fails."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import samples_merged as merged
import torch
from reference import E4M3, E5M2
from torch import Tensor

import fp8
from fp8.ops import make_history

OPS = torch.ops.fp8
RECIPES = tuple(fp8.RECIPES)  # in the order of their numbers, as private operators take them
ROWWISE, GW_HP, DELAYED = map(RECIPES.index, ("rowwise", "rowwise_gw_hp", "delayed"))
POWER_OF_TWO = 1 << 8  # where such a number has its option


@dataclass
class Sample:
    """Arguments of one call. Every tensor is fresh, so a sample may be modified."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


# fp8.cached_weights, and what Python asks once: they compute nothing, so there is nothing to trace.
STATE_OPS = {"_cache_weights", "_forget_weights", "_uncache_weights"}
STATE_OPS |= {"_recipes", "_amax_history_size"}


def namespace() -> list[str]:
    """Every operator under fp8:: that computes, private ones too, without overload names."""
    names = torch._C._dispatch_get_all_op_names()
    found = {n.split("::")[1].split(".")[0] for n in names if n.startswith("fp8::")}
    return sorted(found - STATE_OPS)


def public_namespace() -> list[str]:
    return [name for name in namespace() if not name.startswith("_")]


def samples(name: str, device: str) -> list[Sample]:
    """The samples of one operator on `device`."""
    return TABLE[name](device)


def _inputs(device: str) -> dict[str, Tensor]:
    """x of the dtypes, ranks and layouts that take different ways through a quantize kernel."""
    matrix = torch.randn(24, 40, device=device)
    return {
        "bf16 [32, 64]": torch.randn(32, 64, device=device, dtype=torch.bfloat16),
        "fp16 [5, 7]": torch.randn(5, 7, device=device, dtype=torch.float16),
        "fp32 [2, 3, 20]": torch.randn(2, 3, 20, device=device),
        "1-D": torch.randn(33, device=device, dtype=torch.bfloat16),
        "no rows": torch.randn(0, 16, device=device, dtype=torch.bfloat16),
        "no columns": torch.randn(3, 0, device=device, dtype=torch.bfloat16),
        "transposed": matrix.t(),
        "sliced": matrix[1:, 3:30],
        "expanded": matrix[:1].expand(9, -1),
    }


def _quantize(static_scale: bool) -> Callable[[str], list[Sample]]:
    def make(device: str) -> list[Sample]:
        found = [Sample(name, (x, E4M3)) for name, x in _inputs(device).items()]
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
    for name, x in _inputs(device).items():
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


def _fused_linear(device: str) -> list[Sample]:
    found = []
    for recipe in RECIPES:
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((40,), 16), ((0, 16), 8)):
            x, weight, bias = (
                torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True)
                for s in (shape, (n, shape[-1]), (n,))
            )
            found.append(Sample(f"{recipe} {shape} bias", (x, weight, bias, recipe)))
            found.append(Sample(f"{recipe} {shape}", (x, weight, None, recipe)))
            found.append(Sample(f"{recipe} {shape} frozen", (x, weight.detach(), None, recipe)))
    x, weight = torch.randn(8, 32, device=device), torch.randn(16, 32, device=device)
    found.append(Sample("defaults, no grad", (x, weight)))
    for recipe in RECIPES:
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        found.append(Sample(f"{recipe}, power of two", (*leaves, None, f"{recipe}:power_of_two")))
    for shape in ((5, 32), (0, 32)):
        x = torch.randn(shape, device=device, requires_grad=True)
        scale = {"input_scale": torch.tensor(0.01, device=device)}
        found.append(Sample(f"static {shape}", (x, weight.clone().requires_grad_()), scale))
        found.append(Sample(f"static {shape}, no grad", (x.detach(), weight), scale))
        args = (x, weight.clone().requires_grad_(), None, "delayed")
        found += _delayed([Sample(f"delayed {shape}", args)])
    args = (x.detach(), weight, None, "delayed:power_of_two")
    return found + _delayed([Sample("delayed, power of two, no grad", args)])


def _delayed(samples: list[Sample]) -> list[Sample]:
    """The same with an empty history."""
    return [
        Sample(f"{s.name}, history", s.args, {"history": make_history(s.args[0].device)})
        for s in samples
    ]


def _linear_forward(device: str) -> list[Sample]:
    found = []
    for recipe in range(len(RECIPES)):
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((0, 16), 8)):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weight = torch.randn(n, shape[-1], device=device, dtype=torch.bfloat16)
            bias = torch.randn(n, device=device, dtype=torch.bfloat16)
            for saves in ((True, True), (True, False), (False, True), (False, False)):
                what = f"{RECIPES[recipe]} {shape} saves {saves}"
                found.append(Sample(what, (x, weight, bias, recipe, *saves)))
        x, weight = torch.randn(8, 32, device=device), torch.randn(16, 32, device=device)
        args = (x, weight, None, recipe | POWER_OF_TWO, True, True)
        found.append(Sample(f"{RECIPES[recipe]}, power of two", args))
    scale = {"input_scale": torch.tensor([0.01], device=device)}
    found.append(Sample("static", (x, weight, None, 0, True, True), scale))
    return found + _delayed([Sample("delayed", (x, weight, None, DELAYED, True, True))])


def _linear_backward(device: str) -> list[Sample]:
    found = []
    for recipe, name in enumerate(RECIPES):
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((0, 16), 8)):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weight = torch.randn(n, shape[-1], device=device, dtype=torch.bfloat16)
            dy = torch.randn(*shape[:-1], n, device=device, dtype=torch.bfloat16)
            _, x_t, x_t_scale, amax = OPS._linear_forward(x, weight, None, recipe, True, True)
            fp8_wgrad = fp8.RECIPES[name].wgrad == "fp8"
            saved = (x_t, x_t_scale) if fp8_wgrad else (x, None)
            one_scale = fp8.RECIPES[name].granularity == "tensorwise"
            args = (dy, *saved, weight, amax if one_scale else None, shape[-1], recipe)
            for needs in ((True, True, True), (True, False, False), (False, True, True)):
                found.append(Sample(f"{name} {shape} needs {needs}", (*args, *needs)))
    found += _delayed([s for s in found if s.args[6] == DELAYED])
    return found + [_into_buffer(turn, s) for turn, s in enumerate(found) if s.args[8]]


def _into_buffer(turn: int, sample: Sample) -> Sample:
    """The same with a main_grad, added to or overwritten."""
    dy, *_, in_features, _, _, _, _ = sample.args
    buffer = _buffer(dy.shape[-1], in_features, dy.device.type, turn)
    kwargs = deepcopy(sample.kwargs) | {"main_grad": buffer, "overwrite": turn % 4 == 0}
    return Sample(f"{sample.name} into, turn {turn}", sample.args, kwargs)


def _buffer(n: int, k: int, device: str, turn: int) -> Tensor:
    """A main_grad: fp32, bf16 and transposed ones in turns."""
    if turn % 3 == 2:
        return torch.randn(k, n, device=device).t()
    dtype = torch.bfloat16 if turn % 3 else torch.float32
    return torch.randn(n, k, device=device, dtype=dtype)


def _fused_linear_functional(device: str) -> list[Sample]:
    found = []
    for sample in _fused_linear(device):
        x, weight, bias, recipe = (*sample.args, None, "tensorwise")[:4]
        tensors = [None if t is None else t.detach() for t in (x, weight, bias)]
        scaling = [sample.kwargs.get(name) for name in ("input_scale", "history")]
        found.append(Sample(sample.name, (*tensors, recipe, *scaling)))
    return found


def _fused_linear_into(device: str) -> list[Sample]:
    found = []
    for turn, sample in enumerate(_fused_linear(device)):
        x, weight, bias, recipe = (*sample.args, None, "tensorwise")[:4]
        main_grad = _buffer(*weight.shape, device, turn)
        stand_in = torch.zeros_like(weight) if turn % 2 else None
        args = (x, weight, bias, recipe, main_grad, turn % 4 == 0, stand_in)
        found.append(Sample(f"{sample.name}, turn {turn}", args, deepcopy(sample.kwargs)))
    return found


def _grouped_problem(
    device: str, counts: tuple[int, ...], k: int, n: int, transposed: bool, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, offsets, bias. `spare` rows lie past the last offset."""
    rows, groups = sum(counts) + spare, len(counts)
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(rows, k, **options)
    weight = torch.randn(groups, *((k, n) if transposed else (n, k)), **options)
    offsets = torch.tensor(counts, device=device).cumsum(0).int()
    bias = torch.randn(groups, n, **options)
    return x, weight.transpose(1, 2) if transposed else weight, offsets, bias


_GROUPED = (
    # counts, k, n, stored transposed, rows past the last offset
    ((17, 0, 30, 1), 64, 48, False, 0),
    ((40, 8), 32, 64, True, 5),
    ((3, 9), 20, 7, False, 0),
    ((0, 0), 16, 16, False, 0),
)


def _grouped_linear(device: str) -> list[Sample]:
    found = []
    for recipe in (*fp8.GROUPED_RECIPES, "rowwise:power_of_two"):
        for counts, k, n, transposed, spare in _GROUPED:
            x, weight, offsets, bias = _grouped_problem(device, counts, k, n, transposed, spare)
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            what = f"{recipe} {counts} {k}->{n}"
            found.append(Sample(f"{what} bias", (leaves[0], leaves[1], offsets, leaves[2], recipe)))
            found.append(Sample(f"{what} frozen", (leaves[0], weight, offsets, None, recipe)))
    found.append(Sample("defaults, no grad", _grouped_problem(device, (5, 6), 32, 16, False)[:3]))
    return found


def _grouped_forward(device: str) -> list[Sample]:
    return [
        Sample(f"{counts} {recipe} {saves}", (*problem, recipe, saves), {"save_amax": saves})
        for counts, k, n, transposed, _ in _GROUPED
        for recipe in (ROWWISE, GW_HP, ROWWISE | POWER_OF_TWO)
        for saves in (True, False)
        # Rows past the last offset have no place in x_t: nothing says what lies there.
        for problem in [_grouped_problem(device, counts, k, n, transposed)]
    ]


def _grouped_backward(device: str) -> list[Sample]:
    found = []
    for counts, k, n, transposed, spare in _GROUPED:
        x, weight, offsets, _ = _grouped_problem(device, counts, k, n, transposed, spare)
        dy = torch.randn(x.shape[0], n, device=device, dtype=torch.bfloat16)
        for recipe in (ROWWISE, GW_HP, ROWWISE | POWER_OF_TWO):
            made = OPS._grouped_forward(x, weight, offsets, None, recipe, True, save_amax=True)
            saved = (x, None, None) if recipe == GW_HP else made[1:4]
            known = {} if transposed else {"weight_amax": made[4]}
            args = (dy, *saved, weight, offsets, k, transposed, recipe)
            for needs in ((True, True, True), (True, False, False), (False, True, True)):
                found.append(Sample(f"{counts} {recipe} needs {needs}", (*args, *needs)))
            found.append(
                Sample(f"{counts} {recipe} {list(known)}", (*args, True, True, True), known)
            )
    return found


def _moe_problem(device: str, tokens: int, transposed: bool, bias: bool, spare: int = 0) -> list:
    """x, top_k_index, top_k_weights, gate_up, down and the biases: 5 experts, H 32, I 16, k 2."""
    options = {"device": device, "dtype": torch.bfloat16}

    def weight(rows: int, cols: int) -> Tensor:
        stored = (cols, rows) if transposed else (rows, cols)
        drawn = torch.randn(5, *stored, **options) / cols**0.5
        return drawn.transpose(1, 2) if transposed else drawn

    weights, index = torch.randn(tokens, 5 + spare, device=device).softmax(-1).topk(2)
    biases = [torch.randn(5, n, **options) if bias else None for n in (32, 32)]
    x = torch.randn(tokens, 32, **options)
    return [x, index, weights.bfloat16(), weight(32, 32), weight(32, 16), *biases]


_MOE_OPTIONS = (
    # tokens, stored transposed, biases, activation, interleaved
    (24, False, False, 0, False),
    (3, True, True, 3, True),
    (40, False, True, 1, False),
    (0, False, True, 2, False),
)
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")


def _moe_experts(device: str) -> list[Sample]:
    found = []
    for tokens, transposed, bias, activation, interleaved in _MOE_OPTIONS:
        for recipe in (*fp8.GROUPED_RECIPES, "rowwise:power_of_two"):
            problem = _moe_problem(device, tokens, transposed, bias, spare=1)
            leaves = [
                t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
                for t in problem
            ]
            options = (_ACTIVATIONS[activation], interleaved, 1.702, 7.0, recipe)
            found.append(Sample(f"{tokens} tokens {options}", (*leaves, *options)))
    found.append(Sample("defaults, no grad", tuple(_moe_problem(device, 9, False, False)[:5])))
    return found


def _moe_forward(device: str) -> list[Sample]:
    return [
        Sample(
            f"{o} {recipe} {saves}",
            (*_moe_problem(device, *o[:3]), *o[3:], 1.702, 7.0, recipe),
            {"save_amax": saves},
        )
        for o in _MOE_OPTIONS
        for recipe in (ROWWISE, ROWWISE | POWER_OF_TWO)
        for saves in (False, True)
    ]


def _moe_backward(device: str) -> list[Sample]:
    found = []
    for sample in _moe_forward(device):
        *problem, activation, interleaved, alpha, limit, number = sample.args
        problem[2] = problem[2].float()
        made = OPS._moe_forward(
            *problem, activation, interleaved, alpha, limit, number, **sample.kwargs
        )
        names = ("gate_up_amax", "down_amax")
        known = {n: t for n, t in zip(names, made[5:], strict=True) if t.numel() > 0}
        dy = torch.randn_like(problem[0])
        every = 63 if problem[5] is not None else 15
        for recipe in (number, GW_HP):
            for needs in (every, 1, 12):
                args = (dy, *problem, *made[1:5], activation, interleaved, alpha, limit)
                found.append(Sample(f"{sample.name} needs {needs}", (*args, recipe, needs), known))
    return found


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


_MLPS = (
    # shape of x, I, H, form (0 plain, 1 separate, 2 merged), biases
    ((32, 64), 48, 64, 1, False),
    ((2, 3, 20), 7, 9, 2, True),
    ((17, 32), 32, 16, 0, True),
    ((0, 16), 16, 16, 1, True),
)


def _mlp_tensors(
    device: str, shape: tuple[int, ...], features: int, out: int, form: int, bias: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """x, gate, up, down; the biases."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    wide = features * (2 if form == 2 else 1)
    separate = form == 1
    up = draw(features, shape[-1]) if separate else None
    tensors = [draw(*shape), draw(wide, shape[-1]), up, draw(out, features)]
    biases = [draw(wide), draw(features) if separate else None, draw(out)]
    return tensors, biases if bias else [None] * 3


def _histories(device: str, separate: bool) -> dict[str, Tensor]:
    names = ("gate", "up", "down") if separate else ("gate", "down")
    return {f"{name}_history": make_history(device) for name in names}


def _mlp(device: str) -> list[Sample]:
    found = []
    for turn, problem in enumerate(_MLPS * len(RECIPES)):
        recipe = RECIPES[turn // len(_MLPS)]
        tensors, biases = (
            [None if t is None else t.requires_grad_() for t in group]
            for group in _mlp_tensors(device, *problem)
        )
        options = dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))
        options |= {"recipe": recipe, "save": ("bf16", "recompute")[turn % 2]}
        options["activation"] = ("silu", "gelu", "relu_squared")[turn % 3]
        if recipe == "delayed":
            options |= _histories(device, problem[3] == 1)
        found.append(Sample(f"{recipe} {problem}", tuple(tensors), options))
    tensors, _ = _mlp_tensors(device, *_MLPS[0])
    found.append(Sample("defaults, no grad", tuple(tensors)))
    return found


_ALL_OF_MLP, _RECOMPUTE = 127, 128  # bits of `needs` (csrc/torch/mlp/mlp.h)


def _mlp_needs(form: int, bias: bool, needs: int) -> int:
    """Of these, what the form has."""
    up = 0 if form == 1 else 4 | 32
    return needs & ~up & ~(0 if bias else 16 | 32 | 64)


def _mlp_forward(device: str) -> list[Sample]:
    found = []
    wanted = (_ALL_OF_MLP, 8, 0, _ALL_OF_MLP | _RECOMPUTE)
    for turn, recipe in enumerate((*range(len(RECIPES)), POWER_OF_TWO)):
        # Each problem with another need, in turns: all of them are too many for opcheck.
        for place, problem in enumerate(_MLPS):
            tensors, biases = _mlp_tensors(device, *problem)
            needs = _mlp_needs(*problem[3:], wanted[(turn + place) % len(wanted)])
            activation = 4 if problem[3] == 0 else 5
            args = (*tensors, *biases, activation, False, 1.702, 7.0, recipe, needs)
            kwargs = _histories(device, problem[3] == 1) if recipe == DELAYED else {}
            found.append(Sample(f"{problem} {recipe} needs {needs}", args, kwargs))
    return found


def _mlp_backward(device: str) -> list[Sample]:
    found = []
    for sample in _mlp_forward(device):
        x, gate, up, down, gate_bias, up_bias, _, *options, recipe, needs = sample.args
        if needs == 0:
            continue
        y, gate_out, up_out, x_t, x_scale, *amaxes = OPS._mlp_forward(
            *sample.args, **deepcopy(sample.kwargs)
        )
        fp8_wgrad = fp8.RECIPES[RECIPES[recipe & 255]].wgrad == "fp8"
        again = bool(needs & _RECOMPUTE)
        saved = (x, None) if again or not fp8_wgrad else (x_t, x_scale)
        products = (None, None) if again else (gate_out, None if up is None else up_out)
        one_scale = fp8.RECIPES[RECIPES[recipe & 255]].granularity == "tensorwise"
        amaxes = [a if one_scale and a.dim() == 0 else None for a in amaxes]
        form = 1 if up is not None else 2 if gate.shape[0] == 2 * down.shape[1] else 0
        weights = (gate, up, down, gate_bias, up_bias)
        args = (torch.randn_like(y), *saved, *products, *weights, *amaxes)
        sizes = (x.shape[-1], down.shape[1], form)
        found.append(
            Sample(sample.name, (*args, *sizes, *options, recipe, needs), deepcopy(sample.kwargs))
        )
    return found


TABLE: dict[str, Callable[[str], list[Sample]]] = {
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
    "fused_linear": _fused_linear,
    "_linear_forward": _linear_forward,
    "_linear_backward": _linear_backward,
    "_fused_linear_into": _fused_linear_into,
    "_fused_linear_functional": _fused_linear_functional,
    **merged.table(Sample),
    "mlp": _mlp,
    "_mlp_forward": _mlp_forward,
    "_mlp_backward": _mlp_backward,
    "grouped_linear": _grouped_linear,
    "_grouped_forward": _grouped_forward,
    "_grouped_backward": _grouped_backward,
    "moe_experts": _moe_experts,
    "_moe_forward": _moe_forward,
    "_moe_backward": _moe_backward,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "_norm_forward": _norm_forward,
    "_norm_backward": _norm_backward,
    "rope": _rope,
    "_rope": _private_rope,
}
