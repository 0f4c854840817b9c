"""The recipe `delayed`: scales from the amaxes of earlier calls, as a history in Python has it."""

from __future__ import annotations

import gc
import math
import threading

import linear_reference
import numpy as np
import pytest
import reference
import torch
import torch.utils.checkpoint
from linear_reference import Result
from reference import E4M3, E5M2, FLOAT_DTYPES, as_matrix, assert_same_bits

import fp8

OPS = torch.ops.fp8
WINDOW = 16
DELAYED = list(fp8.RECIPES).index("delayed")
POWER_OF_TWO = 1 << 8


class History:
    """What delayed scaling is, with nothing of the library in it."""

    def __init__(self, dtype: torch.dtype, power_of_two: bool = False) -> None:
        self.amaxes: list[float] = []
        self.dtype, self.power_of_two = dtype, power_of_two

    def amax(self, x: torch.Tensor) -> float:
        """That which makes the scale of this call."""
        own = float(np.abs(x.detach().cpu().float().numpy()).max(initial=0))  # propagates NaN
        before = [a for a in self.amaxes[-WINDOW:] if math.isfinite(a)]
        self.amaxes.append(own)
        return own if len(self.amaxes) <= WINDOW else max(before, default=0.0)

    def cast(self, x: torch.Tensor, own: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
        """data, scale and the amax. own: the tensor is read for another reason, too."""
        used = self.amax(x)
        if own:
            used = self.amaxes[-1]
        values = x.detach().cpu().float().numpy()
        if len(self.amaxes) > WINDOW and not own:
            values = np.where(np.isinf(values), np.float32("nan"), values)
        code, scale = reference._quantize(
            values, np.asarray(used, dtype=np.float32), self.dtype, self.power_of_two
        )
        data = reference.from_codes(torch.from_numpy(code), self.dtype).to(x.device)
        return data, torch.from_numpy(np.asarray(scale)).to(x.device), used


def randn(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(device)


def transposed(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8).t().contiguous().view(data.dtype)


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


def layer_past_the_window(device, dtype=torch.bfloat16, k=64, n=48, **kwargs):
    """An fp8.Linear whose scales are delayed from the next call on, x and dy of amax about 4."""
    layer = fp8.Linear(k, n, bias=False, device=device, dtype=dtype, recipe="delayed", **kwargs)
    for _ in range(WINDOW):
        x = randn(32, k, dtype=dtype, device=device).requires_grad_()
        layer(x).backward(randn(32, n, dtype=dtype, device=device))
    layer.zero_grad()
    return layer


def is_delayed(layer, x) -> bool:
    """Whether x, larger than all before, is cast with an earlier scale: it saturates then."""
    with torch.no_grad():
        y = layer(x)
        dynamic = OPS.fused_linear(x, layer.weight.detach().clone(), None, "tensorwise")
    return not torch.equal(y, dynamic)


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


def test_dy_is_dynamic_where_x_needs_no_gradient(device):
    """The backward knows the layer by its weight, which it does not need then."""
    layer = layer_past_the_window(device)
    x = randn(32, 64, dtype=torch.bfloat16, device=device) / 8
    dy = 100 * randn(32, 48, dtype=torch.bfloat16, device=device)
    layer(x).backward(dy)
    exact = dy.double().t() @ x.double()
    assert reference.sqnr(layer.weight.grad, exact) > 22
    layer.zero_grad()
    layer(x.requires_grad_()).backward(dy)
    assert reference.sqnr(layer.weight.grad, exact) < 10, "delayed where it is known"


def test_dy_is_dynamic_where_hooks_hand_over_another_weight(device):
    layer = layer_past_the_window(device)
    x = randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    dy = 100 * randn(32, 48, dtype=torch.bfloat16, device=device)

    def unpack(tensor):
        return tensor.detach().clone() if tensor is layer.weight else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = layer(x)
    y.backward(dy)
    assert reference.sqnr(layer.weight.grad, dy.double().t() @ x.detach().double()) > 22
    assert reference.sqnr(x.grad, dy.double() @ layer.weight.detach().double()) > 22


def test_evaluation_moves_the_window_along(device):
    layer = layer_past_the_window(device)
    large = 100 * randn(32, 64, dtype=torch.bfloat16, device=device)
    exact = large.double() @ layer.weight.detach().double().t()
    with torch.no_grad():
        assert reference.sqnr(layer(large), exact) < 10
        assert reference.sqnr(layer(large), exact) > 25


def test_layers_have_histories_of_their_own(device):
    layer = layer_past_the_window(device)
    large = 100 * randn(32, 64, dtype=torch.bfloat16, device=device)
    twin = fp8.Linear.from_linear(layer)
    twin.weight = torch.nn.Parameter(layer.weight.detach().clone())
    twin.recipe = "delayed"
    assert not is_delayed(twin, large)
    assert is_delayed(layer, large)


def test_a_history_goes_with_its_weight(device):
    """No new weight inherits one, whatever its address."""
    for _ in range(5):
        layer = layer_past_the_window(device)
        large = 100 * randn(32, 64, dtype=torch.bfloat16, device=device)
        assert is_delayed(layer, large)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        gc.collect()
        assert not is_delayed(layer, large)
        del layer


def test_a_weight_that_an_operator_makes_has_no_history(device):
    base = torch.nn.Parameter(randn(48, 64, device=device))
    for call in range(WINDOW + 4):
        x = randn(16, 64, device=device) * 2.0**call
        ours = OPS.fused_linear(x, base * 1, None, "delayed")
        assert torch.equal(ours, OPS.fused_linear(x, base * 1, None, "tensorwise")), call


def test_autocast_scales_dynamically(device):
    """Its cast of an fp32 weight is another tensor in every step."""
    layer = fp8.Linear(64, 48, bias=False, device=device, recipe="delayed")
    for call in range(WINDOW + 4):
        x = randn(16, 64, device=device) * 2.0**call
        with torch.autocast(device, torch.bfloat16):
            y = layer(x)
            expected = OPS.fused_linear(x, layer.weight, None, "tensorwise")
        assert torch.equal(y, expected), call


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


@pytest.mark.gpu
def test_a_weight_that_moves_to_the_gpu_starts_anew():
    layer = layer_past_the_window("cpu", torch.float32)
    layer.weight.data = layer.weight.data.cuda()
    assert not is_delayed(layer, 100 * randn(32, 64, device="cuda"))


@pytest.mark.gpu
def test_a_captured_graph_scales_dynamically():
    layer = layer_past_the_window("cuda")
    x = randn(32, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for factor in (1.0, 64.0, 64.0):
            x.mul_(factor)
            graph.replay()
            assert torch.equal(y, OPS.fused_linear(x, layer.weight.detach().clone()))
    assert is_delayed(layer, 64 * x)


def test_a_compiled_layer_keeps_its_history(device):
    """What torch.compile calls it with is the parameter itself."""
    layer = layer_past_the_window(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    x = (100 * randn(32, 64, dtype=torch.bfloat16, device=device)).requires_grad_()
    exact = x.detach().double() @ layer.weight.detach().double().t()
    y = compiled(x)
    assert reference.sqnr(y.detach(), exact) < 10
    y.backward(torch.ones_like(y))
    assert layer.weight.grad.isfinite().all()
    assert reference.sqnr(compiled(x).detach(), exact) > 25


def test_recomputation_moves_the_window_along(device):
    """Checkpointing calls a layer twice, the second time with the amax of the first."""
    layer = layer_past_the_window(device)
    x = (100 * randn(32, 64, dtype=torch.bfloat16, device=device)).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    dy = randn(32, 48, dtype=torch.bfloat16, device=device)
    y.backward(dy)
    assert reference.sqnr(layer.weight.grad, dy.double().t() @ x.detach().double()) > 22
    exact = x.detach().double() @ layer.weight.detach().double().t()
    assert reference.sqnr(y.detach(), exact) < 10, "the first call saturated"


def test_threads_may_use_one_layer(device):
    """The order of their calls is theirs, but every amax is kept."""
    layer = layer_past_the_window(device)
    xs = [2.0**i * randn(32, 64, dtype=torch.bfloat16, device=device) for i in range(4)]

    def work(x):
        with torch.no_grad():
            for _ in range(4):
                layer(x)
        if device == "cuda":
            torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        y = layer(xs[3])
    assert reference.sqnr(y, xs[3].double() @ layer.weight.detach().double().t()) > 25


def test_private_backward_wants_the_amax(device):
    weight, dy = randn(8, 32, device=device), randn(16, 8, device=device)
    for recipe in ("tensorwise", "delayed"):
        index = list(fp8.RECIPES).index(recipe)
        args = (dy, None, None, weight, None, 32, index, True, False, False)
        with pytest.raises(ValueError, match=f"weight_amax, .* '{recipe}', got None"):
            OPS._linear_backward(*args)
