"""Recipe `delayed`: which calls have a history, whose it is, and how long it lasts."""

from __future__ import annotations

import gc
import threading

import pytest
import reference
import torch
from delayed_reference import OPS, WINDOW, is_delayed, layer_past_the_window, randn
from torch.profiler import ProfilerActivity, profile

import fp8


def test_dy_is_dynamic_where_x_needs_no_gradient(device):
    """The backward knows the layer by its weight, which it does not need then."""
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(4 / 448, device=device)
    dynamic = fp8.Linear.from_linear(layer, "tensorwise")
    x = randn(32, 64, dtype=torch.bfloat16, device=device)
    dy = randn(32, 48, dtype=torch.bfloat16, device=device) / 3

    def dweight(layer, x):
        layer.zero_grad()
        layer(x).backward(dy)
        return layer.weight.grad.clone()

    expected = dweight(dynamic, x)
    assert torch.equal(dweight(layer, x), expected)
    x.requires_grad_()
    assert torch.equal(dweight(dynamic, x), expected)
    assert not torch.equal(dweight(layer, x), expected), "delayed where it is known"


def test_dy_is_dynamic_where_hooks_hand_over_another_weight(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(4 / 448, device=device)
    x = randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    dy = randn(32, 48, dtype=torch.bfloat16, device=device) / 3

    def unpack(tensor):
        return tensor.detach().clone() if tensor is layer.weight else tensor

    fp8.Linear.from_linear(layer, "tensorwise")(x).backward(dy)
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = layer(x)
    y.backward(dy)
    assert torch.equal(layer.weight.grad, expected)


def test_evaluation_moves_the_window_along(device):
    layer = layer_past_the_window(device)
    small = randn(32, 64, dtype=torch.bfloat16, device=device) / 3
    with torch.no_grad():
        for call in range(WINDOW):
            assert is_delayed(layer, small.roll(call, 0))
        assert not is_delayed(layer, small.roll(WINDOW, 0)), "the window holds no other amax"
        assert is_delayed(layer, small), "what was seen keeps its scale"


def test_layers_have_histories_of_their_own(device):
    layer = layer_past_the_window(device)
    small = randn(32, 64, dtype=torch.bfloat16, device=device) / 3
    twin = fp8.Linear.from_linear(layer)
    twin.weight = torch.nn.Parameter(layer.weight.detach().clone())
    twin.recipe = "delayed"
    assert not is_delayed(twin, small)
    assert is_delayed(layer, small)


def test_parts_of_one_memory_have_histories_of_their_own(device):
    """Parameters that are views of a flat buffer, as Megatron and FSDP1 make them."""
    flat = randn(2, 48, 64, device=device)
    first, second = torch.nn.Parameter(flat[0]), torch.nn.Parameter(flat[1])
    x = randn(16, 64, device=device)
    small = x / 3
    for call in range(WINDOW):
        OPS.fused_linear(x.roll(call, 0), first, None, "delayed")
    y = OPS.fused_linear(small, second, None, "delayed")
    dynamic = OPS.fused_linear(small, second, None, "tensorwise")
    assert torch.equal(y, dynamic)
    assert not torch.equal(
        OPS.fused_linear(small, first, None, "delayed"),
        OPS.fused_linear(small, first, None, "tensorwise"),
    )


def test_a_layer_may_be_swapped(device):
    """A history holds no reference to the weight's tensor, which swap_tensors would refuse."""
    layer = layer_past_the_window(device)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.float32)
        layer.load_state_dict(fp8.Linear(64, 48, bias=False).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    x = randn(32, 64, device=device)
    exact = x.double() @ layer.weight.detach().double().t()
    assert reference.sqnr(layer(x).detach(), exact) > 25


def test_a_history_goes_with_its_weight(device):
    """No new weight inherits one, whatever its address."""
    for _ in range(5):
        layer = layer_past_the_window(device)
        small = randn(32, 64, dtype=torch.bfloat16, device=device) / 3
        assert is_delayed(layer, small)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        gc.collect()
        assert not is_delayed(layer, small)
        del layer


def test_a_weight_that_an_operator_makes_has_no_history(device):
    base = torch.nn.Parameter(randn(48, 64, device=device))
    for call in range(WINDOW + 4):
        x = randn(16, 64, device=device) * 2.0**call
        ours = OPS.fused_linear(x, base * 1, None, "delayed")
        assert torch.equal(ours, OPS.fused_linear(x, base * 1, None, "tensorwise")), call


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_autocast_scales_dynamically(device, frozen, with_grad, option):
    """Its cast of an fp32 weight is another tensor in every call: no history is made for it."""
    layer = fp8.Linear(64, 48, bias=False, device=device, recipe=f"delayed{option}")
    layer.requires_grad_(not frozen)  # the cast of a frozen weight looks like a parameter
    for call in range(WINDOW + 4):
        x = randn(16, 64, device=device) * 2.0**call
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(with_grad):
            expected = OPS.fused_linear(x, layer.weight, None, f"tensorwise{option}")
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                y = layer(x)
        assert torch.equal(y, expected), call
        assert "aten::zeros" not in {event.name for event in recorded.events()}


def test_autocast_leaves_a_weight_of_its_dtype_delayed(device):
    layer = layer_past_the_window(device)
    with torch.autocast(device, torch.bfloat16):
        assert is_delayed(layer, randn(32, 64, dtype=torch.bfloat16, device=device) / 3)


@pytest.mark.gpu
def test_a_weight_that_moves_to_the_gpu_starts_anew():
    layer = layer_past_the_window("cpu", torch.float32)
    layer.weight.data = layer.weight.data.cuda()
    assert not is_delayed(layer, randn(32, 64, device="cuda") / 3)


@pytest.mark.gpu
def test_streams_have_histories_of_their_own():
    """Calls with one history must follow each other on the device."""
    layer = layer_past_the_window("cuda")
    small = randn(32, 64, dtype=torch.bfloat16, device="cuda") / 3
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not is_delayed(layer, small)
        torch.cuda.current_stream().synchronize()
    assert is_delayed(layer, small)


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
    assert is_delayed(layer, x / 64 / 64 / 3)


def test_a_compiled_layer_keeps_its_history(device):
    """What torch.compile calls it with is the parameter itself."""
    layer = layer_past_the_window(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    x = (randn(32, 64, dtype=torch.bfloat16, device=device) / 3).requires_grad_()

    def is_dynamic(x, y):
        weight = layer.weight.detach().clone()
        return torch.equal(OPS.fused_linear(x.detach(), weight, None, "tensorwise"), y)

    for call in range(WINDOW):
        other = x.roll(call, 0)
        y = compiled(other)
        assert not is_dynamic(other, y)
    y.backward(torch.ones_like(y))
    assert layer.weight.grad.isfinite().all()
    other = x.roll(WINDOW, 0)
    assert is_dynamic(other, compiled(other))


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
