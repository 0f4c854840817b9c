"""The recipe `blockwise` of grouped_linear and moe_experts: the bits of public operators, and dense
layers on the same rows."""

from __future__ import annotations

import grouped_reference as reference
import pytest
import test_moe_experts as moe
import torch
from reference import assert_same_bits, sqnr
from sample import BLOCKWISE, POWER_OF_TWO
from torch import Tensor

OPS = torch.ops.fp8
COUNTS = (37, 0, 150, 1, 64)
# Extents of whole squares, and of parts.
EXTENTS = [(256, 128), (96, 80), (144, 272), (16, 400)]


def squares(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Each matrix of a stack quantized by itself."""
    made = [
        OPS.quantize_blockwise_128x128(w.contiguous(), power_of_two=power_of_two) for w in weight
    ]
    return tuple(torch.stack(parts) for parts in zip(*made, strict=True))


def product(x: Tensor, weight: Tensor, offsets: Tensor, power_of_two: bool = False) -> Tensor:
    """x[r] · weight[g]ᵀ of the public operators."""
    a, scale_a = OPS.quantize_blockwise_1x128(x, power_of_two=power_of_two)
    b, scale_b = squares(weight, power_of_two)
    return OPS.grouped_mm(a, b, scale_a, scale_b, offsets, x.dtype)


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize(("k", "n"), EXTENTS)
def test_grouped_blockwise_is_grouped_mm_of_blocks(
    device, k, n, transposed, option, poisoned_memory
):
    """Bit for bit, forward and gradient of x: codes, scales and their places."""
    p = reference.problem(COUNTS, k, n, device=device, spare=5, transposed=transposed)
    p.x[::7] *= 300  # blocks that differ
    p.weight[:, ::5] /= 64
    actual = reference.run(p, f"blockwise{option}", with_bias=False)
    assert_same_bits(actual.y, product(p.x, p.weight, p.offsets, bool(option)))
    backward = product(p.dy, p.weight.transpose(1, 2), p.offsets, bool(option))
    assert_same_bits(actual.dx, backward)
    other = reference.run(p, "blockwise" if option else "blockwise:power_of_two", with_bias=False)
    assert not torch.equal(actual.y, other.y)


def test_grouped_blockwise_isolates_outliers(device):
    """One element of a row costs its block precision and no other: by row all else underflows."""
    p = reference.problem((40, 60), 1280, 64, torch.float32, device)
    p.x[:, 0] = 2.0**22
    p.weight[:, :, 0] = 0
    exact = torch.cat(
        [x.double() @ w.double().t() for x, w in zip(p.x.split([40, 60]), p.weight, strict=True)]
    )
    in_blocks, by_row = (
        sqnr(OPS.grouped_linear(p.x, p.weight, p.offsets, None, recipe), exact)
        for recipe in ("blockwise", "rowwise")
    )
    assert by_row < 1
    assert in_blocks > 8  # nine blocks of ten: 10 dB


@pytest.mark.parametrize(("k", "n"), EXTENTS)
def test_grouped_blockwise_against_dense_layers(device, k, n):
    """A loop of dense linears in `blockwise` on the same rows: y and dx to the bit on the CPU,
    whose sums have one order; the gradient of the weight, not quantized here, is nearer to the
    exact one."""
    p = reference.problem(COUNTS, k, n, device=device)
    actual = reference.run(p, "blockwise", with_bias=False)
    for g, rows in enumerate(reference.slices(p.offsets)):
        x, weight, dy = p.x[rows].clone(), p.weight[g].contiguous(), p.dy[rows]
        if x.shape[0] == 0:
            continue
        x, weight = x.requires_grad_(), weight.detach().requires_grad_()
        y = OPS.fused_linear(x, weight, None, "blockwise")
        dx, dw = torch.autograd.grad(y, [x, weight], dy)
        exact = dy.double().t() @ x.detach().double()
        if device == "cpu":
            assert_same_bits(actual.y[rows], y.detach(), f"y of group {g}")
            assert_same_bits(actual.dx[rows], dx, f"dx of group {g}")
        else:
            torch.testing.assert_close(actual.y[rows], y.detach(), rtol=2**-7, atol=2**-7)
            torch.testing.assert_close(actual.dx[rows], dx, rtol=2**-7, atol=2**-7)
        assert sqnr(actual.dw[g], exact) >= sqnr(dw, exact)
        assert sqnr(actual.dw[g], exact) > 40  # bf16's own rounding leaves 50 dB


def certain_gates(device: str, hidden: int = 272, features: int = 144) -> list:
    """Experts whose gates are all so large that SiLU changes nothing: h is gate · up, rounded."""
    tensors = moe.problem(hidden=hidden, features=features, top_k=1, device=device)
    x, gate_up = tensors[0], tensors[3]
    x[:, 0] = 1
    gate_up[:, :features] *= 0.25
    gate_up[:, :features, 0] = 64
    tensors[2] = torch.ones_like(tensors[2])
    return tensors


@pytest.mark.parametrize("option", ["", ":power_of_two"])
def test_moe_blockwise_is_grouped_mm_of_blocks(device, option):
    """Both products of the forward, bit for bit: x in blocks at the places of its copies, h from
    the gate in blocks, part of the last one missing."""
    tensors = certain_gates(device)
    x, index, weights, gate_up, down = tensors[:5]
    number = BLOCKWISE | (POWER_OF_TWO if option else 0)
    made = OPS._moe_forward(*tensors, 0, False, 1.702, 7.0, number)
    y, gate_up_out, offsets, place, source = made[:5]
    rows = x[source.long()]
    assert_same_bits(gate_up_out, product(rows, gate_up, offsets, bool(option)))
    gates, ups = gate_up_out.float().chunk(2, 1)
    assert gates.min() > 20  # sigmoid is 1 in fp32
    out = product((gates * ups).bfloat16(), down, offsets, bool(option))
    assert_same_bits(y, out[place.long()])
    assert_same_bits(
        y, OPS.moe_experts(x, index, weights, gate_up, down, recipe=f"blockwise{option}")
    )


@pytest.mark.parametrize("tokens", [1, 33, 200])
@pytest.mark.parametrize("top_k", [1, 3])
def test_moe_blockwise_copies_go_to_all_places(device, tokens, top_k, poisoned_memory):
    tensors = moe.problem(tokens, 144, 80, 5, top_k, device=device)
    tensors[1][::3, 0] = 5  # a sentinel
    made = OPS._moe_forward(*tensors, 0, False, 1.702, 7.0, BLOCKWISE)
    gate_up_out, offsets, source = made[1], made[2], made[4]
    last = int(offsets[-1])
    rows = tensors[0][source.long() // top_k]
    assert_same_bits(gate_up_out[:last], product(rows, tensors[3], offsets)[:last])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_moe_blockwise_gradients_equal_those_of_their_composition(device, interleaved):
    """Two grouped_linear and PyTorch's operators, as in test_moe_experts.py; gates and ups share
    blocks of the first product's gradient."""
    tensors = moe.problem(features=80, device=device)
    tensors[2] = torch.full_like(tensors[2], 0.5)
    _, dy, grads = moe.run(tensors, interleaved=interleaved, recipe="blockwise")
    x, index, weights, gate_up, down = (
        t.requires_grad_() if t.is_floating_point() else t for t in tensors[:5]
    )
    y = moe.mixture(
        x, index, weights, gate_up, down, None, None,
        lambda g: reference.gate(g.float(), "silu", interleaved), "blockwise",
    )  # fmt: skip
    composed = torch.autograd.grad(y, [x, gate_up, down], dy.to(y.dtype))
    for what, expected in zip(("x", "gate_up", "down"), composed, strict=True):
        assert sqnr(grads[what], expected.double()) >= 42, what


@pytest.mark.parametrize("recipe", ["blockwise", "blockwise:power_of_two"])
def test_moe_blockwise_frozen_weights(device, recipe):
    """Of x alone: the gradient between the products is made, and quantized, all the same."""
    tensors = moe.problem(device=device)
    _, dy, grads = moe.run(tensors, recipe=recipe)
    x = tensors[0].detach().requires_grad_()
    OPS.moe_experts(x, *tensors[1:], recipe=recipe).backward(dy)
    assert_same_bits(x.grad, grads["x"])


@pytest.mark.gpu
def test_grouped_blockwise_on_the_cpu_and_the_gpu():
    """What is quantized has the same bits, so results differ by their sums alone."""
    p = reference.problem(COUNTS, 272, 144)
    ours, theirs = (
        reference.run(reference.Problem(*(t.to(device) for t in p)), "blockwise")
        for device in ("cuda", "cpu")
    )
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert sqnr(a.cpu(), b.double()) > 45, name
