"""The recipe `delayed`: scales from the amaxes of earlier calls, as a history in Python has it."""

from __future__ import annotations

import math

import linear_reference
import pytest
import reference
import torch
from delayed_reference import (
    OPS,
    SLACK,
    WINDOW,
    History,
    layer_past_the_window,
    randn,
    transposed,
)
from linear_reference import Result
from reference import E4M3, E5M2, FLOAT_DTYPES, as_matrix, assert_same_bits

import fp8
from fp8.ops import make_history

DELAYED = list(fp8.RECIPES).index("delayed")
POWER_OF_TWO = 1 << 8


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(160, 96), (33, 50)], ids=str)
def test_codes_and_scales_follow_the_history(device, shape, dtype, power_of_two, poisoned_memory):
    """With magnitudes that grow, shrink, leave the window; over more than a turn of the ring."""
    rows, k = shape
    weight = randn(40, k, dtype=dtype, device=device)
    x_history, w_history = (History(E4M3, power_of_two) for _ in range(2))
    recipe = DELAYED | (POWER_OF_TWO if power_of_two else 0)
    history = make_history(device)
    calls = 70
    for call in range(calls):
        x = randn(rows, k, dtype=dtype, device=device) * 2.0 ** ((call * 7) % 11 + call // 4 - 20)
        if call % 13 == 5:
            x.zero_()
        with torch.no_grad():
            weight.mul_(0.5 if call % 5 == 4 else 1.2)
        save_x_t = call % 3 != 0  # the forward without a backward has kernels of its own
        args = (x, weight, None, recipe, save_x_t, True)
        y, x_t, x_scale, w_amax = OPS._linear_forward(*args, history=history)
        qx, sx, _ = x_history.cast(x)
        qw, sw, used = w_history.cast(weight)
        assert w_amax.item() == used, call
        assert_same_bits(y, OPS.scaled_mm(qx, qw, sx, sw, None, dtype, True), f"y of call {call}")
        if save_x_t:
            assert_same_bits(x_scale, sx, f"x's scale in call {call}")
            assert_same_bits(x_t[:k, :rows].contiguous(), transposed(qx), f"x_t of call {call}")
            assert not x_t.view(torch.uint8)[k:].any(), "padding"
            assert not x_t.view(torch.uint8)[:, rows:].any(), "padding"
    assert 10 < x_history.from_window < calls - WINDOW - 10, "both ways are taken"


@pytest.mark.parametrize("calls", [63, 64])
def test_a_tensor_keeps_its_scale_for_63_records(device, calls):
    x = randn(32, 64, device=device)
    scale_of_x = scales(device)

    def scale_of(factor: float, shift: int = 0) -> float:
        return scale_of_x((x * factor).roll(shift, 0))

    for call in range(WINDOW):
        scale_of(2.0, call)
    scale = scale_of(1.0)
    for call in range(1, calls):
        scale_of(1.25 + 0.001 * call)
    assert (scale_of(1.0) == scale) == (calls == 63)


def scales(device):
    """x -> its scale, in the calls of one history."""
    history = make_history(device)

    def scale_of(x: torch.Tensor) -> float:
        weight = x.new_ones(8, x.shape[-1])
        args = (x, weight, None, DELAYED, True, True)
        return OPS._linear_forward(*args, history=history)[2].item()

    scale_of.history = history[0]
    return scale_of


@pytest.mark.parametrize("word", ["used", "own", "guess", "count"])
@pytest.mark.parametrize("value", [0.0, 1e-6, 1e6, math.inf, math.nan])
def test_torn_words_make_no_wrong_scale(device, word, value):
    """What two streams or threads that share a history may leave."""
    x = randn(32, 64, device=device)
    own = x.abs().max().item() / 448
    for torn in (x, x.roll(1, 0), torch.zeros_like(x)):  # with a record; of its amax; zeros
        scale_of = scales(device)
        for call in range(WINDOW + 1):
            scale_of(x * 1.5 if call == WINDOW - 1 else x.roll(call, 1))
        scale_of(x)
        place = {"own": 0, "used": 64, "guess": 193, "count": 192}[word]
        count = 1 if word in ("guess", "count") else 64
        bits = torch.tensor(value).view(torch.int32)
        scale_of.history[place : place + count] = bits.to(device)
        scale = scale_of(torn)
        assert math.isfinite(scale)
        if torn.any():
            assert own * (1 - 1e-6) <= scale <= SLACK * own * (1 + 1e-6)


def test_calls_with_column_sums_take_their_own_amax(device):
    """A bias gradient: read for its sums, dy tells its amax, and nothing more."""
    weight = randn(48, 64, device=device)
    history = make_history(device)
    none = (None, None, weight, torch.ones((), device=device), 64, DELAYED, True, False)

    def scale_of(dy, sums) -> float:
        dx, _, _ = OPS._linear_backward(dy, *none, sums, history=history)
        own, _, _ = OPS._linear_backward(dy, *none, False)
        return torch.equal(dx, own)

    dy = randn(32, 48, device=device)
    for call in range(WINDOW):
        scale_of(1.7 * dy.roll(call, 0), False)
    small = dy / 3
    assert not scale_of(dy, False), "the window's"
    assert scale_of(small, True)
    assert history[2, 192] == WINDOW + 2
    assert history[2, 128 + WINDOW + 1] == 0, "no fingerprint"
    assert scale_of(small, True)
    assert history[2, 192] == WINDOW + 3, "it is not recognized"
    assert scale_of(small, False), "as one of those may have been"
    assert scale_of(small, False)
    assert history[2, 192] == WINDOW + 4, "now it is"


def expected_of(x, weight, bias, dy, histories) -> Result:
    qx, sx, _ = histories[0].cast(as_matrix(x))
    qw, sw, _ = histories[1].cast(weight)
    qdy, sdy, _ = histories[2].cast(as_matrix(dy), own=bias is not None)
    y = OPS.scaled_mm(qx, qw, sx, sw, bias, x.dtype, True)
    dx = OPS.scaled_mm(qdy, transposed(qw), sdy, sw, None, x.dtype, False)
    dw = OPS.scaled_mm(transposed(qdy), transposed(qx), sdy, sx, None, weight.dtype, False)
    return Result(
        y.reshape(*x.shape[:-1], -1), dx.reshape(x.shape), dw, as_matrix(dy).double().sum(0)
    )


@pytest.mark.parametrize("shape", [(128, 96), (2, 9, 48), (1, 96), (40,)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_follow_three_histories(device, dtype, with_bias, shape):
    """With a bias gradient dy is read for its sums, and its scale is its own."""
    weight = randn(56, shape[-1], dtype=dtype, device=device).requires_grad_()
    bias = randn(56, dtype=dtype, device=device).requires_grad_() if with_bias else None
    histories = [History(E4M3), History(E4M3), History(E5M2)]
    history = make_history(device)
    for call in range(WINDOW + 6):
        x = (randn(*shape, dtype=dtype, device=device) * (1 + call % 4)).requires_grad_()
        dy = randn(*shape[:-1], 56, dtype=dtype, device=device) * 10.0 ** (-call % 5)
        y = OPS.fused_linear(x, weight, bias, "delayed", history=history)
        inputs = [x, weight] if bias is None else [x, weight, bias]
        dx, dw, *db = torch.autograd.grad(y, inputs, dy)
        plain = [None if t is None else t.detach() for t in (x, weight, bias, dy)]
        expected = expected_of(*plain, histories)
        actual = Result(y.detach(), dx, dw, db[0] if db else None)
        linear_reference.assert_matches(actual, expected, x.detach(), dy, "delayed")
        with torch.no_grad():
            weight.add_(randn(*weight.shape, dtype=dtype, device=device) * 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_non_finite_values_are_seen_and_forgotten(device, bad, dtype):
    """The row of x, the column of its gradient; and later calls are as if it had not been."""
    layer = layer_past_the_window(device, dtype)
    x = randn(32, 64, dtype=dtype, device=device)
    dy = randn(32, 48, dtype=dtype, device=device)
    x[5, 7] = bad
    y = layer(x)
    y.backward(dy)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [5]
    bad_columns = (~layer.weight.grad.isfinite()).any(0).nonzero().flatten().tolist()
    assert bad_columns == [7]
    layer.zero_grad()
    dy[3, 4] = bad
    x = randn(32, 64, dtype=dtype, device=device).requires_grad_()
    layer(x).backward(dy)
    assert (~x.grad.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    assert (~layer.weight.grad.isfinite()).any(1).nonzero().flatten().tolist() == [4]
    for _ in range(3):
        x = randn(32, 64, dtype=dtype, device=device)
        exact = x.double() @ layer.weight.detach().double().t()
        with torch.no_grad():
            assert reference.sqnr(layer(x), exact) > 25
    with torch.no_grad():
        layer.weight[2, 3] = bad
        assert (~layer(x).isfinite()).any(0).nonzero().flatten().tolist() == [2]


def test_non_finite_values_beside_finite_ones_of_another_magnitude(device):
    """The scale is made for what is finite, though the window says nothing of it."""
    layer = layer_past_the_window(device)
    for magnitude in (1e-6, 1e5):
        x = magnitude * randn(32, 64, dtype=torch.bfloat16, device=device)
        x[5, 7], x[9, 1] = math.nan, -math.inf
        with torch.no_grad():
            y = layer(x)
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [5, 9]
        clean = [row for row in range(32) if row not in (5, 9)]
        exact = x[clean].double() @ layer.weight.detach().double().t()
        assert reference.sqnr(y[clean], exact) > 25


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_calls_without_values_make_no_scale(device, nothing, magnitude):
    layer = fp8.Linear(32, 16, bias=False, device=device, recipe="delayed")
    with torch.no_grad():
        for _ in range(40):
            layer(torch.full((8, 32), nothing, device=device))
        x = magnitude * randn(8, 32, device=device)
        assert reference.sqnr(layer(x), x.double() @ layer.weight.double().t()) > 25


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_gradient_after_zeros_is_not_lost(device, dtype):
    """A head whose loss is on in every 18th step learns."""
    layer = fp8.Linear(64, 64, bias=False, device=device, dtype=dtype, recipe="delayed")
    x = randn(32, 64, dtype=dtype, device=device).requires_grad_()
    small = 1e-3 if dtype == torch.float16 else 1e-6

    def gradients(size):
        dy = randn(32, 64, dtype=dtype, device=device) * size
        return dy, *torch.autograd.grad(layer(x), [x, layer.weight], dy)

    for size in [small] * 20 + [0.0] * 16:
        gradients(size)
    for size in (small, 1000 * small, small, small / 16):
        dy, dx, dw = gradients(size)
        exact = dy.double().t() @ x.detach().double()
        assert reference.sqnr(dw, exact) > 20, size
        assert reference.sqnr(dx, dy.double() @ layer.weight.detach().double()) > 20, size


def test_a_scale_is_within_the_stated_bound(device):
    """Of the dynamic one: never smaller, at most 64 times as large; so nothing saturates, and an
    element is off by at most half a step of its code, or 64 times what underflow costs dynamically.
    """
    weight = randn(24, 48, device=device)
    generator = torch.Generator().manual_seed(5)
    again, exponent, history = 0, 0.0, make_history(device)
    for call in range(200):
        exponent += 0.2 * torch.randn((), generator=generator).item()  # it wanders, and jumps
        if call % 20 == 19:
            exponent = 30 * torch.rand((), generator=generator).item() - 15
        x = randn(64, 48, device=device) * 10.0**exponent
        x[torch.rand(64, 48, generator=generator).to(device) < 0.5] = 0
        args = (x, weight, None, DELAYED, True, False)
        _, x_t, scale, _ = OPS._linear_forward(*args, history=history)
        dynamic = x.abs().max().item() / 448
        assert dynamic * (1 - 1e-6) <= scale.item() <= SLACK * dynamic * (1 + 1e-6)
        again += scale.item() < 1.0001 * dynamic
        decoded = transposed(x_t)[:64, :48].double() * scale.double()
        bound = torch.maximum(x.double().abs() / 16, SLACK * dynamic * 2.0**-10 + 0 * x.double())
        assert ((decoded - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert 20 < again < 180


def test_all_products_use_one_scale_of_the_weight(device):
    """dgrad casts the weight anew in the backward: with the forward's scale, not with its own."""
    layer = layer_past_the_window(device)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.div_(3)  # the window's scale serves still
    x = randn(16, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    dy = torch.eye(48, dtype=torch.bfloat16, device=device)[:16]
    layer(x).backward(dy)
    used = before.abs().max().double() / 448
    codes = (layer.weight.detach().double() / used).to(E4M3)
    own, _ = OPS.quantize_tensorwise(layer.weight.detach())

    def off(codes):  # but for the one value that dy has in FP8; a step of bf16 is 1/256
        dx = dy.double() @ codes.double()
        found = x.grad.double()
        return (found / found.norm() - dx / dx.norm()).norm()

    assert off(codes) < 0.004
    assert off(own) > 0.01, "dgrad saw the weight's own amax"


def test_cached_weights_keep_the_scale_of_a_weight(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(5 / 448, device=device)  # the weight's history alone counts
    with torch.no_grad():
        layer.weight.div_(3)
    x = randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    with fp8.cached_weights(layer):
        outputs = [layer(x) for _ in range(WINDOW + 1)]
        for y in outputs:
            assert torch.equal(y, outputs[0]), "one scale, that of before, for the whole context"
        outputs[0].backward(torch.ones_like(y))
    assert torch.equal(layer(x), outputs[0])


def test_a_static_input_scale_leaves_weight_and_gradient_delayed(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(4 / 448, device=device)
    x = randn(32, 64, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        layer.weight.div_(3)
        weight = layer.weight.detach().clone()
        dynamic = OPS.fused_linear(x, weight, None, "tensorwise", input_scale=layer.input_scale)
        y = layer(x)
        assert not torch.equal(y, dynamic), "the weight's scale is that of before"
        for _ in range(WINDOW):
            assert not torch.equal(layer(x), dynamic), "one tensor keeps its scale"
            layer.weight.copy_(layer.weight.roll(1, 0))  # another one, of the same amax
        dynamic = dynamic.roll(WINDOW, 1)
        assert torch.equal(layer(x), dynamic)


def test_private_backward_wants_the_amax(device):
    weight, dy = randn(8, 32, device=device), randn(16, 8, device=device)
    for recipe in ("tensorwise", "delayed"):
        index = list(fp8.RECIPES).index(recipe)
        args = (dy, None, None, weight, None, 32, index, True, False, False)
        with pytest.raises(ValueError, match=f"weight_amax, .* '{recipe}', got None"):
            OPS._linear_backward(*args)
