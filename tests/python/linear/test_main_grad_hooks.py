"""weight.main_grad and what surrounds it: Megatron's attributes, hooks, torch.compile, errors."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits
from test_main_grad import small

import fp8
from fp8.nn._main_grad import _stand_in

OP = r"fp8::fused_linear: expected main_grad "


def accumulate_grad_node(parameter: torch.Tensor):
    """Where DDP implementations register their hooks. Lives as long as it is held."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def test_main_grad_without_megatron_gives_no_gradient_to_hooks(device):
    """All hooks of the weight run, when main_grad has the sum; they see no gradient."""
    layer, x, dy, _ = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    seen = []
    layer.weight.register_hook(lambda gradient: seen.append(("hook", gradient)))
    layer.weight.register_post_accumulate_grad_hook(
        lambda weight: seen.append(("accumulated", weight.grad, weight.main_grad.any().item()))
    )
    node = accumulate_grad_node(layer.weight)
    node.register_hook(lambda *_: seen.append(("node", layer.weight.grad)))
    layer(x).backward(dy)
    assert seen == [("hook", None), ("accumulated", None, True), ("node", None)]
    assert not hasattr(layer.weight, "grad_added_to_main_grad")


def test_main_grad_with_megatron_gives_hooks_a_stand_in(device):
    """Zeros of the weight's shape and dtype, one for all layers of a shape, never copied."""
    layer, x, dy, _ = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    layer.weight.grad_added_to_main_grad = False
    gradients = []

    def hook(weight):
        assert weight.grad_added_to_main_grad
        gradients.append(weight.grad)
        weight.grad = None

    layer.weight.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        layer(x).backward(dy)
    stand_in = _stand_in(layer.weight.shape, layer.weight.dtype, layer.weight.device)
    assert len(gradients) == 2
    for gradient in gradients:
        assert gradient.dtype == torch.bfloat16
        assert gradient.data_ptr() == stand_in.data_ptr()
        assert not gradient.any()


class MegatronDDP:
    """Megatron's hook behind a parameter's gradient: adds it unless a layer did, drops it."""

    def __init__(self, parameter):
        self.parameter = parameter
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        self.node = accumulate_grad_node(parameter)
        self.node.register_hook(self.hook)

    def hook(self, *_):
        parameter = self.parameter
        assert parameter.grad is not None, "as with overlap_grad_reduce"
        added, zero = parameter.grad_added_to_main_grad, getattr(parameter, "zero_out_wgrad", False)
        if not added or zero:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def test_main_grad_with_megatron_ddp(device):
    """The weight's gradient arrives once, and the bias's the usual way."""
    layer, x, dy, expected = small(device, "tensorwise", torch.float32)
    ddp = [MegatronDDP(parameter) for parameter in layer.parameters()]
    for _ in range(2):
        layer(x).backward(dy)
    assert [p.parameter.grad_added_to_main_grad for p in ddp] == [True, False]
    torch.testing.assert_close(layer.weight.main_grad, 2 * expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.main_grad, 2 * dy.sum(0), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


def test_main_grad_of_a_weight_that_an_embedding_shares(device):
    """zero_out_wgrad: the embedding's gradient comes with the stand-in, and the hook adds it."""
    layer, x, dy, expected = small(device, "tensorwise", torch.float32)
    ddp = MegatronDDP(layer.weight)
    layer.weight.zero_out_wgrad = True
    tokens = torch.tensor([3, 5, 3], device=device)
    for step in (1, 2):
        embedded = torch.nn.functional.embedding(tokens, layer.weight)
        (layer(x).mul(dy).sum() + embedded.sum()).backward()
        of_embedding = torch.zeros(80, 64, device=device)
        of_embedding.index_add_(0, tokens, torch.ones(3, 64, device=device))
        torch.testing.assert_close(
            ddp.parameter.main_grad, step * (expected + of_embedding), rtol=1e-5, atol=1e-5
        )
    assert not _stand_in(layer.weight.shape, layer.weight.dtype, layer.weight.device).any()


def test_main_grad_with_megatron_under_autocast(device):
    """The stand-in takes the way of a gradient: through the cast, into the parameter's dtype."""
    layer, x, dy, _ = small(device, "tensorwise", torch.float32)
    sums = []
    for flagged in (False, True):
        layer.weight.main_grad = torch.zeros(80, 64, device=device)
        if flagged:
            MegatronDDP(layer.weight)
            _stand_in.cache_clear()
            with torch.inference_mode():  # a stand-in made here could not be used below
                layer(x)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = layer(x)
        y.backward(dy.bfloat16())
        sums.append(layer.weight.main_grad)
    assert layer.weight.grad_added_to_main_grad
    assert_same_bits(sums[1], sums[0])


def test_main_grad_flag_is_set_by_the_backward(device):
    """Megatron clears it between a forward and its backward."""
    layer, x, dy, _ = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    layer.weight.grad_added_to_main_grad = False
    y = layer(x)
    assert layer.weight.grad_added_to_main_grad is False
    y.backward(dy)
    assert layer.weight.grad_added_to_main_grad is True


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_main_grad_compiled(device, recipe):
    """One graph that adds to the buffer, overwrites it, and follows another one."""
    layer, x, dy, _ = small(device, recipe)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    sums = []
    for run in (layer, compiled):
        weight = layer.weight
        weight.main_grad = torch.ones(80, 64, device=device)
        for overwrite in (False, False, True, False):
            weight.overwrite_main_grad = overwrite
            run(x).backward(dy)
            assert weight.grad is None
            sums.append(weight.main_grad.clone())
        weight.main_grad = torch.ones(80, 64, device=device)
        run(x).backward(dy)
        sums.append(weight.main_grad.clone())
    for eager, ours in zip(sums[:5], sums[5:], strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.usefixtures("_fresh_compiler")
def test_main_grad_compiled_with_megatron(device):
    """Its hook cannot be compiled: autograd gets the gradient, and the flag says so."""
    layer, x, dy, expected = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    layer.weight.grad_added_to_main_grad = False
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).backward(dy)
    assert layer.weight.grad_added_to_main_grad is False
    assert not layer.weight.main_grad.any()
    assert_same_bits(layer.weight.grad, expected)


def test_main_grad_errors(device):
    layer, x, _, _ = small(device, "tensorwise")
    good = torch.zeros(80, 64, device=device)
    for wrong, error, message in (
        (good[1:], ValueError, OP + r"of weight's shape \[80, 64\], got \[79, 64\]"),
        (good.t(), ValueError, OP + r"of weight's shape \[80, 64\], got \[64, 80\]"),
        (good.flatten(), ValueError, OP + r"of weight's shape \[80, 64\], got \[5120\]"),
        (good.double(), TypeError, OP + "in bfloat16, float16 or float32, got float64"),
        (good.int(), TypeError, OP + "in bfloat16, float16 or float32, got int32"),
        (good.to("meta"), ValueError, OP + f"on the device of x, {device}.*, got meta"),
        (good.clone().requires_grad_(), ValueError, OP + "without requires_grad"),
        ([good], TypeError, r"fp8.Linear: expected weight.main_grad to be a tensor.*got list"),
    ):
        layer.weight.main_grad = wrong
        with pytest.raises(error, match=message):
            layer(x)


@pytest.mark.gpu
def test_main_grad_error_cpu_and_cuda():
    layer, x, _, _ = small("cuda", "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64)
    with pytest.raises(ValueError, match=OP + "on the device of x, cuda.*got cpu"):
        layer(x)
