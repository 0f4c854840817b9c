"""The recipe `delayed`: scales from the amaxes of earlier calls, as a history in Python has it."""

from __future__ import annotations

import math

import linear_reference
import pytest
import reference
import torch
from delayed_reference import OPS, WINDOW, History, layer_past_the_window, randn, transposed
from linear_reference import Result
from reference import E4M3, E5M2, FLOAT_DTYPES, as_matrix, assert_same_bits

import fp8

DELAYED = list(fp8.RECIPES).index("delayed")
POWER_OF_TWO = 1 << 8


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(160, 96), (33, 50)], ids=str)
def test_codes_and_scales_follow_the_history(device, shape, dtype, power_of_two, poisoned_memory):
    """Over two turns of the ring, with magnitudes that grow, saturate, and leave the window."""
    rows, k = shape
    weight = randn(40, k, dtype=dtype, device=device)
    x_history, w_history = (History(E4M3, power_of_two) for _ in range(2))
    recipe = DELAYED | (POWER_OF_TWO if power_of_two else 0)
    saturated = 0
    for call in range(45):
        x = randn(rows, k, dtype=dtype, device=device) * 2.0 ** ((call * 7) % 11 + call // 2 - 20)
        with torch.no_grad():
            weight.mul_(0.5 if call % 5 == 4 else 1.2)
        save_x_t = call % 3 != 0  # the forward without a backward has kernels of its own
        y, x_t, x_scale, w_amax = OPS._linear_forward(x, weight, None, recipe, save_x_t, True)
        qx, sx, _ = x_history.cast(x)
        qw, sw, used = w_history.cast(weight)
        assert w_amax.item() == used, call
        assert_same_bits(y, OPS.scaled_mm(qx, qw, sx, sw, None, dtype, True), f"y of call {call}")
        if save_x_t:
            assert_same_bits(x_scale, sx, f"x's scale in call {call}")
            assert_same_bits(x_t[:k, :rows].contiguous(), transposed(qx), f"x_t of call {call}")
            assert not x_t.view(torch.uint8)[k:].any(), "padding"
            assert not x_t.view(torch.uint8)[:, rows:].any(), "padding"
        saturated += x_history.amaxes[-1] > 448 * sx.item() * 1.01
    assert saturated > 3, "no call tests what lies beyond the scale"


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
    for call in range(WINDOW + 6):
        x = (randn(*shape, dtype=dtype, device=device) * (1 + call % 4)).requires_grad_()
        dy = randn(*shape[:-1], 56, dtype=dtype, device=device) * 10.0 ** (-call % 3)
        y = OPS.fused_linear(x, weight, bias, "delayed")
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


def test_a_history_of_nothing_finite_gives_the_scale_one(device):
    layer = fp8.Linear(32, 16, bias=False, device=device, recipe="delayed")
    with torch.no_grad():
        layer.weight.fill_(1)
        for _ in range(WINDOW):
            layer(torch.full((8, 32), math.inf, device=device))
        y = layer(torch.full((8, 32), 1000.0, device=device))
        torch.testing.assert_close(y, torch.full_like(y, 32 * 448))  # the end of e4m3's range
        y = layer(torch.full((8, 32), 2000.0, device=device))
        torch.testing.assert_close(y, torch.full_like(y, 32 * 1000))  # of the call before


def test_all_products_use_one_scale_of_the_weight(device):
    """dgrad casts the weight anew in the backward: with the forward's scale, not with its own."""
    layer = layer_past_the_window(device)
    with torch.no_grad():
        layer.weight.mul_(64)  # saturates in this call
    x = randn(16, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    y = layer(x)
    y.backward(torch.eye(48, dtype=torch.bfloat16, device=device)[:16])
    largest = layer.weight.detach()[:16].abs().max()
    assert x.grad.abs().max() < largest / 32, "dgrad saw the weight's own amax"
    x = x.detach().requires_grad_()
    layer(x).backward(torch.eye(48, dtype=torch.bfloat16, device=device)[:16])
    assert x.grad.abs().max() > largest * 0.9, "the next call has it"


def test_layers_that_share_an_input_quantize_it_once(device):
    """With the first layer's history; and never for a recipe of dynamic scales, or from one."""
    q, k = (layer_past_the_window(device) for _ in range(2))
    dynamic = fp8.Linear(64, 48, bias=False, device=device, dtype=torch.bfloat16)
    x = 100 * randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    pointers = []

    def pack(tensor):
        if tensor.dtype in (E4M3, E5M2):
            pointers.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = [layer(x) for layer in (q, k, dynamic, q)]
    first, second, third, fourth = pointers
    assert first == second == fourth != third
    assert torch.equal(kept[2], dynamic(x.detach()))


def test_cached_weights_count_a_weight_once(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(5 / 448, device=device)  # the weight's history alone counts
    with torch.no_grad():
        layer.weight.mul_(64)
    x = randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    with fp8.cached_weights(layer):
        outputs = [layer(x) for _ in range(3)]
        for y in outputs:
            assert torch.equal(y, outputs[0]), "one scale, that of before, for the whole context"
            y.backward(torch.ones_like(y))
    exact = x.double() @ layer.weight.detach().double().t()
    assert reference.sqnr(outputs[0], exact) < 10, "it was too small"
    assert reference.sqnr(layer(x), exact) > 25


def test_a_static_input_scale_leaves_weight_and_gradient_delayed(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(4 / 448, device=device)
    x = randn(32, 64, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        layer.weight.mul_(64)
        assert layer(x).abs().max() < 0.1 * (x @ layer.weight.t()).abs().max()
        assert reference.sqnr(layer(x), x.double() @ layer.weight.double().t()) > 25


def test_private_backward_wants_the_amax(device):
    weight, dy = randn(8, 32, device=device), randn(16, 8, device=device)
    for recipe in ("tensorwise", "delayed"):
        index = list(fp8.RECIPES).index(recipe)
        args = (dy, None, None, weight, None, 32, index, True, False, False)
        with pytest.raises(ValueError, match=f"weight_amax, .* '{recipe}', got None"):
            OPS._linear_backward(*args)
