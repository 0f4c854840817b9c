"""Recipe `delayed`: a call is a function of its arguments, the history one of them."""

from __future__ import annotations

import copy
import threading

import pytest
import reference
import torch
from delayed_reference import OPS, WINDOW, is_delayed, layer_past_the_window, randn

import fp8
from fp8.ops import make_history


def assert_same(ours, theirs, what=None) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), what


def one_call(x, weight, bias, dy, history):
    """y, gradients and the next history."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = OPS.fused_linear(*leaves, *[None] * (3 - len(leaves)), "delayed", history=history)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), history.clone()]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_same_arguments_same_results_same_next_history(device, with_bias):
    """Whatever ran before or between, and read the same tensors."""
    history = make_history(device)
    weight, bias = randn(48, 64, device=device), randn(48, device=device) if with_bias else None
    others = [fp8.Linear(64, 48, device=device, recipe=r) for r in ("delayed", "tensorwise")]
    for call in range(WINDOW + 8):
        x = randn(32, 64, device=device) * 2.0 ** (call * 5 % 7)
        dy = randn(32, 48, device=device) * 2.0 ** (call * 3 % 5)
        before = history.clone()
        first = one_call(x, weight, bias, dy, history)
        assert not torch.equal(before, history)
        shared = x.requires_grad_() * 1  # as q, k and v read one
        for other in others:
            other(shared).sum().backward(retain_graph=True)
        assert_same(one_call(x, weight, bias, dy, before), first, call)
        twin = OPS.fused_linear(shared, weight, bias, "delayed", history=before)
        assert_same([twin], [first[0]], "remembered of another layer's")
        weight = weight * 1.01


def test_a_call_without_history_is_tensorwise(device):
    weight = randn(48, 64, device=device).requires_grad_()
    for call in range(WINDOW + 4):
        x = (randn(16, 64, device=device) * 2.0**call).requires_grad_()
        results = []
        for recipe in ("delayed", "tensorwise"):
            y = OPS.fused_linear(x, weight, None, recipe)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight])])
        assert_same(*results, call)


def test_a_history_is_written_where_it_is_said(device):
    """x's and the weight's rows by a forward, dy's by a backward; counted as writes in place."""
    history, weight = make_history(device), randn(48, 64, device=device)
    x = randn(16, 64, device=device).requires_grad_()
    version = history._version
    y = OPS.fused_linear(x, weight, None, "delayed", history=history)
    assert history[:, 192].tolist() == [1, 1, 0]
    assert history._version > version
    version = history._version
    y.sum().backward()
    assert history[:, 192].tolist() == [1, 1, 1]
    assert history._version > version
    with torch.no_grad():
        OPS.fused_linear(x + 1, weight, None, "delayed", history=history)
    assert history[:, 192].tolist() == [2, 1, 1], "the weight has not changed"
    scale = torch.tensor(0.01, device=device)
    OPS.fused_linear(x + 2, weight, None, "delayed", history=history, input_scale=scale)
    assert history[:, 192].tolist() == [2, 1, 1], "x has a scale"
    with torch.inference_mode():
        inner = make_history(device)
        OPS.fused_linear(x + 3, weight, None, "delayed", history=inner)
        assert inner[:, 192].tolist() == [1, 1, 0]


def test_history_errors(device):
    x, weight = randn(16, 64, device=device), randn(48, 64, device=device)
    good = make_history(device)

    def call(history, recipe="delayed"):
        OPS.fused_linear(x, weight, None, recipe, history=history)

    for recipe in ("tensorwise", "rowwise:power_of_two"):
        name = recipe.partition(":")[0]
        with pytest.raises(
            ValueError,
            match=f"fused_linear: expected the recipe 'delayed' with a history, got '{name}'",
        ):
            call(good, recipe)
    with pytest.raises(TypeError, match=r"expected history in int32, .*, got float32"):
        call(good.float())
    shape = r"expected history contiguous, of shape \[3, 194\], .*, got shape "
    for bad in (good[0], good[:2], good[:, :-1], good.t().contiguous().t()):
        with pytest.raises(ValueError, match=shape + r"\["):
            call(bad)
    with pytest.raises(ValueError, match=f"history on the device of x, {device}.*, got meta"):
        call(good.to("meta"))


@pytest.mark.parametrize("meta", [False, True])
def test_history_errors_of_private_operators(device, meta):
    where = "meta" if meta else device
    dy, weight = torch.zeros(16, 48, device=where), torch.zeros(48, 64, device=where)
    bad = make_history(where).float()
    recipe = list(fp8.RECIPES).index("delayed")
    args = (dy, None, None, None, None, 64, recipe, False, True, False)
    for main_grad in (None, weight):
        with pytest.raises(TypeError, match="history in int32"):
            OPS._linear_backward(*args, main_grad=main_grad, history=bad)
    with pytest.raises(TypeError, match="history in int32"):
        OPS._linear_forward(dy, dy, None, recipe, True, True, history=bad)


def test_dy_is_delayed_where_x_needs_no_gradient(device):
    layer = layer_past_the_window(device)
    layer.input_scale = torch.tensor(4 / 448, device=device)
    dynamic = fp8.Linear.from_linear(layer, "tensorwise")
    x = randn(32, 64, dtype=torch.bfloat16, device=device)
    dy = randn(32, 48, dtype=torch.bfloat16, device=device) / 3

    def dweight(layer):
        layer.zero_grad()
        layer(x).backward(dy)
        return layer.weight.grad.clone()

    assert not torch.equal(dweight(layer), dweight(dynamic))


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
    twin.recipe = "delayed"
    assert not is_delayed(twin, small)
    assert is_delayed(layer, small)


def test_an_input_that_two_calls_read_moves_both_histories(device):
    """As q and k read one, each with a history of its own."""
    x, weights = randn(32, 64, device=device), [randn(48, 64, device=device) for _ in range(2)]
    histories = [make_history(device) for _ in range(3)]
    shared = x.requires_grad_() * 1
    for weight, history in zip(weights, histories, strict=False):
        OPS.fused_linear(shared, weight, None, "delayed", history=history)
    OPS.fused_linear(x.clone(), weights[1], None, "delayed", history=histories[2])
    assert torch.equal(histories[1], histories[2]), "as if nobody had read it before"


def test_a_layer_may_be_swapped(device):
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


def test_a_history_goes_with_its_layer(device):
    layer = layer_past_the_window(device)
    small = randn(32, 64, dtype=torch.bfloat16, device=device) / 3
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    assert is_delayed(layer, small), "whatever becomes of the weight's tensor"


def test_a_weight_that_an_operator_makes_is_delayed(device):
    """A parametrization, say: the history is the layer's."""
    layer = layer_past_the_window(device)
    torch.nn.utils.parametrize.register_parametrization(
        layer, "weight", torch.nn.Identity(), unsafe=True
    )
    x = randn(32, 64, dtype=torch.bfloat16, device=device) / 3
    dynamic = OPS.fused_linear(x, layer.weight, None, "tensorwise")
    assert not torch.equal(layer(x), dynamic)


@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_autocast_scales_with_the_history(device, frozen, with_grad):
    """Its cast of an fp32 weight is another tensor in every call, and has the values that count."""
    layer = fp8.Linear(64, 48, bias=False, device=device, recipe="delayed")
    layer.requires_grad_(not frozen)
    plain = copy.deepcopy(layer).to(torch.bfloat16)
    for call in range(WINDOW + 4):
        x = randn(16, 64, device=device) * 2.0 ** (call % 3)
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(with_grad):
            y = layer(x)
        assert torch.equal(y, plain(x.bfloat16())), call
        assert torch.equal(layer.amax_history, plain.amax_history)


@pytest.mark.gpu
def test_a_weight_that_moves_past_its_module_starts_anew():
    layer = layer_past_the_window("cpu", torch.float32)
    layer.weight.data = layer.weight.data.cuda()
    assert not is_delayed(layer, randn(32, 64, device="cuda") / 3)
    assert layer.amax_history.is_cuda


@pytest.mark.gpu
def test_streams_may_share_a_history():
    """Records may be lost; no scale is wrong, and no tile has another scale than its neighbours."""
    layer = layer_past_the_window("cuda", k=1024, n=1024)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for call in range(60):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    x = randn(2048, 1024, dtype=torch.bfloat16, device="cuda") * 3.0 ** (
                        call % 3 + i
                    )
                    results.append((x, layer(x)))
        torch.cuda.synchronize()
        for x, y in results:
            exact = x.float() @ layer.weight.float().t()
            assert reference.sqnr(y, exact) > 20


@pytest.mark.gpu
def test_replays_of_a_graph_move_the_history_on():
    """They are the calls that they repeat, in a training step and without a gradient."""
    layer = layer_past_the_window("cuda")
    x = randn(32, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    dy = randn(32, 48, dtype=torch.bfloat16, device="cuda")

    def step(module):
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, [x, module.weight], dy)]

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(layer)
        torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer)
    eager = fp8.Linear(64, 48, bias=False, device="cuda", dtype=torch.bfloat16, recipe="delayed")
    eager.weight = layer.weight
    eager.amax_history.copy_(layer.amax_history)
    for call in range(2 * WINDOW):
        with torch.no_grad():
            x.copy_(randn(32, 64, dtype=torch.bfloat16, device="cuda") * 2.0 ** (call * 5 % 7))
            dy.copy_(randn(32, 48, dtype=torch.bfloat16, device="cuda"))
            layer.weight.mul_(1.01)
        graph.replay()
        assert_same([t.clone() for t in captured], step(eager), call)
        assert torch.equal(layer.amax_history, eager.amax_history)
    assert layer.amax_history[:, 192].tolist() == eager.amax_history[:, 192].tolist()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_moves_its_history_on(device, backend):
    if backend == "inductor" and device == "cpu":
        pytest.importorskip("torch._inductor")
    layer = layer_past_the_window(device)
    eager = fp8.Linear(64, 48, bias=False, device=device, dtype=torch.bfloat16, recipe="delayed")
    eager.load_state_dict(layer.state_dict())
    eager.amax_history.copy_(layer.amax_history)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for call in range(WINDOW + 2):
        results = []
        x = randn(32, 64, dtype=torch.bfloat16, device=device) * 2.0 ** (call * 5 % 7)
        dy = randn(32, 48, dtype=torch.bfloat16, device=device)
        for module in (compiled, eager):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            parameters = list(module.parameters())
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *parameters], dy)])
        assert_same(*results, call)
        assert torch.equal(layer.amax_history, eager.amax_history), call
        with torch.no_grad():
            for module in (layer, eager):
                module.weight.mul_(1.03)
    with torch.no_grad():
        assert torch.equal(compiled(x), eager(x))


def test_threads_may_use_one_layer(device):
    """Records may be lost, and none makes a wrong scale."""
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
