"""The maxima of a weight's columns: the forward's pass over its rows leaves them, and the backward
quantizes the weight's columns with them in one pass, with the bits of two passes."""

from __future__ import annotations

import grouped_reference as reference
import pytest
import test_moe_experts as moe
import torch
from grouped_reference import OPS, ROUTINGS
from reference import assert_same_bits
from sample import GW_HP, POWER_OF_TWO, ROWWISE

import fp8


def kept(weight):
    """What the forward keeps of weight [E, N, K]."""
    x = torch.randn(24, weight.shape[2], device=weight.device).to(weight.dtype)
    offsets = torch.full((len(weight),), 24, dtype=torch.int32, device=weight.device)
    made = OPS._grouped_forward(x, weight, offsets, None, ROWWISE, False, save_amax=True)
    plain = OPS._grouped_forward(x, weight, offsets, None, ROWWISE, False)
    assert_same_bits(made[0], plain[0], "y")
    assert plain[4].numel() == 0
    return made[4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k"),
    # Rows that share a block, several blocks to a group, the longest row, and a group's last part.
    [(16, 16), (48, 208), (1040, 256), (333, 2048), (40, 4096), (24, 8192)],
)
def test_forward_leaves_the_maxima_of_columns(device, n, k, dtype, poisoned_memory):
    weight = torch.randn(3, n, k, device=device).to(dtype)
    weight[1] *= 1000
    weight[2, :, 3] = 0
    weight[0, n // 2, 5] = float("inf")
    weight[0, n - 1, 7] = float("nan")
    amax = kept(weight)
    assert amax.shape == (3, -(-k // 16) * 16)
    assert_same_bits(
        amax[:, :k].nan_to_num(nan=-1), weight.float().abs().amax(1).nan_to_num(nan=-1)
    )
    assert not amax[:, k:].any()


def test_forward_leaves_nothing_where_it_cannot(device):
    """Stored transposed, whose columns it reads first, and rows of more than 32 KB."""
    assert kept(torch.randn(2, 32, 16, device=device).transpose(1, 2)).numel() == 0
    longest = torch.randn(2, 16, 16384, device=device, dtype=torch.bfloat16)
    assert_same_bits(kept(longest), longest.float().abs().amax(1))
    assert kept(longest.float()).numel() == 0
    assert kept(torch.randn(2, 16, 16400, device=device).bfloat16()).numel() == 0


def test_forward_leaves_maxima_of_rows_off_16_bytes(device):
    """A weight that begins anywhere."""
    weight = torch.randn(1 + 2 * 48 * 208, device=device).bfloat16()[1:].view(2, 48, 208)
    assert_same_bits(kept(weight), weight.float().abs().amax(1))


@pytest.mark.parametrize("recipe", [ROWWISE, GW_HP, ROWWISE | POWER_OF_TWO])
@pytest.mark.parametrize(("k", "n"), [(208, 96), (40, 24), (1024, 272)])
def test_grouped_backward_has_the_bits_of_two_passes(device, k, n, recipe):
    p = reference.problem(ROUTINGS["random"], k, n, device=device)
    amax = kept(p.weight)
    args = (p.dy, p.x, None, None, p.weight, p.offsets, k, False, recipe, True, False, False)
    one, two = (OPS._grouped_backward(*args, weight_amax=known)[0] for known in (amax, None))
    assert_same_bits(one, two, "dx")
    # It reads them: with smaller ones codes saturate.
    other = OPS._grouped_backward(*args, weight_amax=amax / 8)[0]
    assert not torch.equal(other, two)


@pytest.mark.parametrize("recipe", [ROWWISE, GW_HP])
def test_moe_backward_has_the_bits_of_two_passes(device, recipe):
    tensors = moe.problem(device=device, bias=True)
    tensors[2] = tensors[2].float()
    options = (0, False, 1.702, 7.0, recipe)
    made = OPS._moe_forward(*tensors, *options, save_amax=True)
    assert_same_bits(made[5], tensors[3].float().abs().amax(1), "gate_up")
    assert_same_bits(made[6], tensors[4].float().abs().amax(1), "down")
    dy = torch.randn_like(made[0])
    args = (dy, *tensors, *made[1:5], *options, 63)
    one = OPS._moe_backward(*args, gate_up_amax=made[5], down_amax=made[6])
    for a, b in zip(one, OPS._moe_backward(*args), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("first", ["no grad", "grad"])
def test_cached_weights_keep_the_maxima(device, first):
    """Whether or not the first forward in the context expected a backward."""
    p = reference.problem(ROUTINGS["random"], 64, 48, device=device)
    layer = fp8.GroupedLinear(len(p.weight), 64, 48, bias=False, device=device).bfloat16()
    x = p.x.requires_grad_()

    def step():
        (dx,) = torch.autograd.grad(layer(x, p.offsets), x, p.dy)
        return dx

    expected = step()
    with fp8.cached_weights(layer):
        if first == "no grad":
            with torch.no_grad():
                layer(x, p.offsets)
        for _ in range(2):
            assert_same_bits(step(), expected)


def test_a_weight_that_changed_since_the_forward_is_refused(device):
    """Its maxima are those of the forward: the version counter, which nn.Linear heeds too."""
    p = reference.problem(ROUTINGS["random"], 64, 48, device=device)
    x, weight = p.x.requires_grad_(), p.weight.requires_grad_()
    y = OPS.grouped_linear(x, weight, p.offsets)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)
