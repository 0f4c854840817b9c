"""Sample calls of grouped linears and of experts."""

from __future__ import annotations

import torch
from sample import BLOCKWISE, GW_HP, OPS, POWER_OF_TWO, ROWWISE, Sample, Table
from torch import Tensor

import fp8


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


def _grouped_mm(device: str) -> list[Sample]:
    found = []
    shapes = (((17, 0, 30, 1), 64, 48, 0), ((5, 9), 130, 7, 3), ((0,), 16, 16, 0))
    for counts, k, n, spare in shapes:
        rows, groups = sum(counts) + spare, len(counts)
        x = torch.randn(rows, k, device=device)
        w = torch.randn(groups, n, k, device=device)
        offsets = torch.tensor(counts, device=device).cumsum(0).int()
        (a, row_scale), (b, stack_scale) = OPS.quantize_rowwise(x), OPS.quantize_rowwise(w)
        one = torch.tensor(0.5, device=device)
        blocks = -(-k // 128)
        in_blocks = [
            torch.rand(shape, device=device)
            for shape in ((rows, blocks), (groups, -(-n // 128), blocks))
        ]
        for name, scales in (
            ("tensorwise", (one, one)),
            ("rowwise", (row_scale, stack_scale)),
            ("in blocks", in_blocks),
        ):
            found.append(Sample(f"{counts} {name}", (a, b, *scales, offsets)))
        found.append(Sample(f"{counts} fp32", (a, b, one, one, offsets, torch.float32, False)))
    (a, _), (b, _) = (OPS.quantize_rowwise(torch.randn(n, 128, device=device)) for n in (24, 40))
    offsets = torch.tensor((64, 96), device=device).int()
    scales = [torch.rand(2, n, device=device) for n in (24, 40)]
    found.append(Sample("columns", (a, b, *scales, offsets, torch.float16, False)))
    return found


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
        for recipe in (ROWWISE, GW_HP, BLOCKWISE, ROWWISE | POWER_OF_TWO)
        for saves in (True, False)
        # Rows past the last offset have no place in x_t: nothing says what lies there.
        for problem in [_grouped_problem(device, counts, k, n, transposed)]
    ]


def _grouped_backward(device: str) -> list[Sample]:
    found = []
    for counts, k, n, transposed, spare in _GROUPED:
        x, weight, offsets, _ = _grouped_problem(device, counts, k, n, transposed, spare)
        dy = torch.randn(x.shape[0], n, device=device, dtype=torch.bfloat16)
        for recipe in (ROWWISE, GW_HP, BLOCKWISE, ROWWISE | POWER_OF_TWO):
            made = OPS._grouped_forward(x, weight, offsets, None, recipe, True, save_amax=True)
            saved = (x, None, None) if recipe in (GW_HP, BLOCKWISE) else made[1:4]
            known = {"weight_amax": made[4]} if made[4].numel() > 0 else {}
            args = (dy, *saved, weight, offsets, k, transposed, recipe)
            for needs in ((True, True, True), (True, False, False), (False, True, True)):
                found.append(Sample(f"{counts} {recipe} needs {needs}", (*args, *needs)))
            found.append(
                Sample(f"{counts} {recipe} {list(known)}", (*args, True, True, True), known)
            )
            into = {"main_grad": torch.ones(weight.shape, device=device), "overwrite": transposed}
            found.append(Sample(f"{counts} {recipe} into", (*args, False, True, False), into))
    return found


def _grouped_linear_into(device: str) -> list[Sample]:
    found = []
    for turn, (counts, k, n, transposed, spare) in enumerate(_GROUPED):
        for recipe in fp8.GROUPED_RECIPES:
            x, weight, offsets, bias = _grouped_problem(device, counts, k, n, transposed, spare)
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            buffer = torch.ones(weight.shape, device=device)
            stand_in = torch.zeros_like(weight) if turn % 2 else None
            args = (leaves[0], leaves[1], offsets, leaves[2], recipe, buffer, turn > 1, stand_in)
            found.append(Sample(f"{recipe} {counts} {k}->{n}", args))
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
        for recipe in (ROWWISE, BLOCKWISE, ROWWISE | POWER_OF_TWO)
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
            into = {
                f"{n}_main_grad": torch.ones(t.shape, device=device)
                for n, t in zip(("gate_up", "down"), problem[3:5], strict=True)
            }
            overwrites = every | 128  # gate_up's
            found.append(Sample(f"{sample.name} into", (*args, recipe, overwrites), known | into))
    return found


def _moe_experts_into(device: str) -> list[Sample]:
    found = []
    for turn, sample in enumerate(_moe_experts(device)[:-1]):
        gate_up, down = sample.args[3:5]
        buffers = [torch.ones(t.shape, device=device) for t in (gate_up, down)]
        if turn % 3 == 0:
            buffers[turn % 2] = None
        stand_ins = [torch.zeros_like(t) if turn % 2 else None for t in (gate_up, down)]
        into = (*buffers, turn % 2 == 0, turn % 4 == 0, *stand_ins)
        found.append(Sample(f"{sample.name}, turn {turn}", (*sample.args, *into)))
    return found


TABLE: Table = {
    "grouped_mm": _grouped_mm,
    "grouped_linear": _grouped_linear,
    "_grouped_forward": _grouped_forward,
    "_grouped_backward": _grouped_backward,
    "moe_experts": _moe_experts,
    "_moe_forward": _moe_forward,
    "_moe_backward": _moe_backward,
    "_grouped_linear_into": _grouped_linear_into,
    "_moe_experts_into": _moe_experts_into,
}
