"""fused_linear's autograd: what needs a gradient, what the backward keeps, what is refused."""

from __future__ import annotations

import itertools

import linear_reference
import pytest
import torch
from linear_reference import RECIPES
from reference import assert_same_bits
from test_linear_values import problem
from torch.autograd import forward_ad

OPS = torch.ops.fp8


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_fused_linear_only_wanted_gradients(device, needed, recipe):
    """Frozen weight, x without grad, only the bias: the others' gradients do not change."""
    x, weight, bias, dy = problem((48, 64), 80, torch.bfloat16, device)
    full = linear_reference.run(x, weight, bias, dy, recipe)
    leaves = [t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)]
    y = OPS.fused_linear(*leaves, recipe)
    assert y.requires_grad == any(needed)
    assert_same_bits(y, full.y, "y")
    if not any(needed):
        return
    y.backward(dy)
    for leaf, wanted, expected in zip(leaves, needed, full[1:], strict=True):
        assert (leaf.grad is not None) == wanted
        if wanted:
            assert_same_bits(leaf.grad, expected)


def kept_for_backward(x, weight, bias, recipe) -> list[torch.Tensor]:
    """What fused_linear saves, without the parameters themselves, which cost no memory."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = OPS.fused_linear(x, weight, bias, recipe)
    del y
    owners = {weight.untyped_storage().data_ptr(), bias.untyped_storage().data_ptr()}
    return [t for t in kept if t.untyped_storage().data_ptr() not in owners]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "needed", [n for n in itertools.product([True, False], repeat=3) if any(n)], ids=str
)
def test_fused_linear_keeps_fp8_not_the_activation(device, needed, recipe):
    """At most xᵀ for dW and Wᵀ for dx, at a byte an element, and their scales."""
    m, k, n = 256, 128, 192
    x, weight, bias, _ = problem((m, k), n, torch.bfloat16, device)
    for tensor, wanted in zip((x, weight, bias), needed, strict=True):
        tensor.requires_grad_(wanted)
    x = x.clone()  # not a leaf, as an activation
    kept = kept_for_backward(x, weight, bias, recipe)
    needs_x, needs_w, _ = needed
    scales = 4 * (m + n + 2 * k) + m * k // 32 + 1024  # blockwise: four bytes for 128 elements
    if linear_reference.high_precision_wgrad(recipe):
        allowed = needs_w * 2 * m * k + needs_x * n * k + scales
        assert needs_w or storage_bytes(kept) <= n * k + scales
    else:
        allowed = needs_w * m * k + needs_x * n * k + scales
        activation = x.untyped_storage().data_ptr()
        assert all(t.untyped_storage().data_ptr() != activation for t in kept), "keeps x itself"
        assert all(t.dtype not in (torch.bfloat16, torch.float16) for t in kept)
    assert storage_bytes(kept) <= allowed, [(t.dtype, tuple(t.shape)) for t in kept]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_fused_linear_memory_after_forward(recipe):
    """Whatever hooks see: after a forward the allocator holds y and FP8 copies only."""
    m, k, n = 4096, 2048, 1024
    x, weight, bias, _ = problem((m, k), n, torch.bfloat16, "cuda")
    weight.requires_grad_()
    x.requires_grad_()
    OPS.fused_linear(x * 1, weight, bias, recipe)  # plans exist after this
    before = torch.cuda.memory_allocated()
    y = OPS.fused_linear(x * 1, weight, bias, recipe)  # nobody else holds this input
    held = torch.cuda.memory_allocated() - before
    # y, xᵀ, at most Wᵀ, at most the input in FP8 as well, and scales.
    scales = 8 * (m + n + 2 * k) + m * k // 16
    assert held <= 2 * m * n + 2 * m * k + n * k + scales + 2**16, held
    del y


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_double_backward_is_refused(device, recipe):
    x, weight, bias, _ = problem((32, 48), 64, torch.float32, device)
    for second in ("x", "weight"):
        leaves = {"x": x.clone().requires_grad_(), "weight": weight.clone().requires_grad_()}
        y = OPS.fused_linear(leaves["x"], leaves["weight"], bias, recipe)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaves[second], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"fp8::fused_linear: .*double backward"):
            gradient.sum().backward()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_fused_linear_forward_mode_is_refused(device, position):
    """A tangent must not vanish in silence: that would be a derivative of zero."""
    tensors = list(problem((32, 48), 64, torch.float32, device)[:3])
    with forward_ad.dual_level():
        tangent = torch.ones_like(tensors[position])
        tensors[position] = forward_ad.make_dual(tensors[position], tangent)
        with pytest.raises(
            (NotImplementedError, RuntimeError), match=r"(?i)forward.?(mode|AD)|jvp"
        ):
            OPS.fused_linear(*tensors)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_backward_twice(device, recipe):
    """retain_graph works; without it the second backward raises autograd's usual error."""
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    x.requires_grad_()
    y = OPS.fused_linear(x, weight, bias, recipe)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_input_changed_in_place(device, recipe):
    """Between forward and backward: either harmless (x is kept in FP8) or autograd's error."""
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    expected = linear_reference.run(x, weight, bias, dy, recipe)
    leaf, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    activation = leaf * 1
    y = OPS.fused_linear(activation, weight, bias, recipe)
    activation.mul_(3)
    if linear_reference.high_precision_wgrad(recipe):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)
    else:
        y.backward(dy)
        assert_same_bits(weight.grad, expected.dw)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_weight_changed_in_place(device, recipe):
    """A gradient of the old weight must not be returned in silence for the new one."""
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    x.requires_grad_()
    weight.requires_grad_()
    y = OPS.fused_linear(x, weight, bias, recipe)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_sees_changed_weights(device, recipe):
    """Every way to change a parameter, also those that no version counter sees."""
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    parameter = torch.nn.Parameter(weight.clone())
    OPS.fused_linear(x, parameter, bias, recipe)
    changes = [
        lambda p: p.data.mul_(2),
        lambda p: p.data.copy_(torch.randn_like(p)),
        lambda p: p.detach().add_(1),
        lambda p: setattr(p, "data", torch.randn_like(p)),
        lambda p: torch.optim.SGD([p], lr=0.5).step(),
    ]
    for change in changes:
        parameter.grad = torch.randn_like(parameter)
        change(parameter)
        ours = OPS.fused_linear(x, parameter, bias, recipe)
        expected = linear_reference.linear(x, parameter.detach(), bias, dy, recipe).y
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_sees_changed_input(device, recipe):
    """The same tensor object, changed in place or through .data, is quantized anew."""
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    parameter = weight.clone().requires_grad_()
    for change in (
        lambda: x.mul_(2),
        lambda: x.copy_(torch.randn_like(x)),
        lambda: x.detach().add_(1),
    ):
        OPS.fused_linear(x, parameter, bias, recipe)
        change()
        ours = OPS.fused_linear(x, parameter, bias, recipe)
        assert_same_bits(ours, linear_reference.linear(x, weight, bias, dy, recipe).y)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_builds_no_graph_without_grad(device, recipe):
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    expected = linear_reference.linear(x, weight, bias, dy, recipe).y
    parameter = weight.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = OPS.fused_linear(x, parameter, bias, recipe)
        assert not y.requires_grad
        assert y.grad_fn is None
        assert_same_bits(y, expected)
    with torch.inference_mode():
        inside = [t.clone() for t in (x, weight, bias)]
        assert_same_bits(OPS.fused_linear(*inside, recipe).clone(), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_accumulates_into_grad(device, recipe):
    x, weight, bias, dy = problem((32, 48), 64, torch.bfloat16, device)
    once = linear_reference.run(x, weight, bias, dy, recipe)
    leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    for _ in range(2):
        OPS.fused_linear(x, *leaves, recipe).backward(dy)
    assert_same_bits(leaves[0].grad, once.dw + once.dw)
    assert_same_bits(leaves[1].grad, once.db + once.db)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_one_weight_used_twice(device, recipe):
    """Tied weights: the gradients of both uses add up."""
    x, weight, bias, _ = problem((32, 64), 64, torch.float32, device)
    weight.requires_grad_()
    hidden = OPS.fused_linear(x, weight, bias, recipe)
    OPS.fused_linear(hidden, weight, bias, recipe).sum().backward()
    copies = [weight.detach().clone().requires_grad_() for _ in range(2)]
    hidden = OPS.fused_linear(x, copies[0], bias, recipe)
    OPS.fused_linear(hidden, copies[1], bias, recipe).sum().backward()
    torch.testing.assert_close(weight.grad, copies[0].grad + copies[1].grad, rtol=1e-6, atol=1e-6)
