"""weight.main_grad of fp8.GroupedLinear, and main_grads of moe_experts."""

from __future__ import annotations

import grouped_reference as reference
import pytest
import test_moe_experts as moe
import torch
from grouped_reference import RECIPES
from reference import FLOAT_DTYPES, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8

OPS = torch.ops.fp8
COUNTS = (37, 0, 64, 5)


def layer_of(p: reference.Problem, recipe: str) -> fp8.GroupedLinear:
    groups, n, k = p.weight.shape
    layer = fp8.GroupedLinear(groups, k, n, device=p.x.device, dtype=p.x.dtype, recipe=recipe)
    layer.weight = nn.Parameter(p.weight.clone())
    layer.bias = nn.Parameter(p.bias.clone())
    return layer


def small(device: str, recipe: str, k: int = 64, n: int = 48, dtype=torch.bfloat16, **how):
    p = reference.problem(COUNTS, k, n, dtype, device, **how)
    return p, layer_of(p, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("buffer_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_grouped_main_grad_values(device, dtype, buffer_dtype, recipe, poisoned_memory):
    """dW is added to what was there; everything else is as without."""
    p, layer = small(device, recipe, dtype=dtype)
    plain = reference.run(p, recipe)
    before = torch.randn(p.weight.shape, device=device).to(buffer_dtype)
    layer.weight.main_grad = before.clone()
    x = p.x.clone().requires_grad_()
    y = layer(x, p.offsets)
    y.backward(p.dy)
    assert layer.weight.grad is None
    reference.check_added(p, layer.weight.main_grad, before, recipe)
    assert_same_bits(y.detach(), plain.y)
    assert_same_bits(x.grad, plain.dx)
    assert_same_bits(layer.bias.grad, plain.db)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_main_grad_overwrites(device, recipe):
    """The plain gradient to the bit, whatever was there."""
    p, layer = small(device, recipe)
    layer.weight.main_grad = torch.full_like(p.weight, float("nan"))
    layer.weight.overwrite_main_grad = True
    layer(p.x, p.offsets).backward(p.dy)
    assert_same_bits(layer.weight.main_grad, reference.run(p, recipe).dw)
    layer.weight.main_grad = torch.full(p.weight.shape, float("nan"), device=device)
    layer(p.x, p.offsets).backward(p.dy)
    zero = torch.zeros_like(layer.weight.main_grad)
    reference.check_added(p, layer.weight.main_grad, zero, recipe)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise:power_of_two"])
def test_grouped_main_grad_in_fp32_is_never_rounded_to_bf16(device, recipe):
    """Nor is a sum of 16 micro-batches."""
    p, layer = small(device, recipe)
    layer.weight.main_grad = torch.zeros(p.weight.shape, device=device)
    layer(p.x, p.offsets).backward(p.dy)
    first = layer.weight.main_grad.clone()
    assert (first != first.bfloat16().float())[0].float().mean() > 0.9
    for _ in range(15):
        layer(p.x, p.offsets).backward(p.dy)
    exact = 16 * first.double()
    assert ((layer.weight.main_grad.double() - exact).abs() <= 2.0**-20 * exact.abs()).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
@pytest.mark.parametrize("layout", ["transposed", "in a larger one", "off 16 bytes", "stepped"])
def test_grouped_main_grad_strides(device, layout, stored, overwrite, recipe):
    """Nothing around the buffer is written."""
    p, layer = small(device, recipe, transposed=stored == "transposed")
    groups, n, k = p.weight.shape
    whole = torch.randn(groups + 1, n + 8, 2 * k + 8, device=device)
    flat = torch.randn(groups * n * k + 1, device=device)
    view = {
        "transposed": torch.randn(groups, k, n, device=device).transpose(1, 2),
        "in a larger one": whole[1:, 4 : 4 + n, 4 : 4 + k],
        "off 16 bytes": flat[1:].view(groups, n, k),
        "stepped": whole[:groups, :n, : 2 * k : 2],
    }[layout]
    base = view._base
    around, before = base.clone(), view.clone()
    layer.weight.main_grad = view
    layer.weight.overwrite_main_grad = overwrite
    layer(p.x, p.offsets).backward(p.dy)
    reference.check_added(p, view, torch.zeros_like(before) if overwrite else before, recipe)
    inside = torch.zeros(base.shape, dtype=torch.bool, device=device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    assert_same_bits(base[~inside], around[~inside], "outside")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("k", "n"), [(33, 65), (7, 3), (272, 144), (20, 64)])
def test_grouped_main_grad_extents(device, k, n, recipe, poisoned_memory):
    p, layer = small(device, recipe, k, n)
    before = torch.randn(p.weight.shape, device=device)
    layer.weight.main_grad = before.clone()
    layer(p.x, p.offsets).backward(p.dy)
    reference.check_added(p, layer.weight.main_grad, before, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_main_grad_without_rows(device, recipe):
    """Nothing to add; overwriting writes zeros."""
    _, layer = small(device, recipe)
    offsets = torch.zeros(len(COUNTS), device=device, dtype=torch.int32)
    for rows in (0, 9):  # of no group
        x = torch.randn(rows, 64, device=device, dtype=torch.bfloat16)
        before = torch.randn(layer.weight.shape, device=device)
        layer.weight.main_grad = before.clone()
        for overwrite, expected in ((False, before), (True, torch.zeros_like(before))):
            layer.weight.overwrite_main_grad = overwrite
            layer(x, offsets).sum().backward()
            assert layer.weight.grad is None
            assert_same_bits(layer.weight.main_grad, expected)


def test_grouped_main_grad_is_not_touched_without_a_gradient_of_the_weight(device):
    p, layer = small(device, "rowwise")
    before = torch.randn(p.weight.shape, device=device)
    layer.weight.main_grad = before.clone()
    layer.weight.grad_added_to_main_grad = False
    version = layer.weight.main_grad._version
    x = p.x.clone().requires_grad_()
    torch.autograd.grad(layer(x, p.offsets), x, p.dy)
    layer(x, p.offsets).backward(p.dy, inputs=[x, layer.bias])
    with torch.no_grad():
        assert not layer(x, p.offsets).requires_grad
    layer.weight.requires_grad_(False)
    layer(x, p.offsets).backward(p.dy)
    assert layer.weight.grad is None
    assert layer.weight.grad_added_to_main_grad is False
    assert_same_bits(layer.weight.main_grad, before)
    assert layer.weight.main_grad._version == version, "nor does it count as written"


@pytest.mark.parametrize("zero_out", [False, True])
def test_grouped_main_grad_attributes(device, zero_out):
    """As Megatron has them: a note on the weight, and a gradient for its hooks."""
    p, layer = small(device, "rowwise")
    weight, seen = layer.weight, []
    weight.main_grad = torch.zeros(p.weight.shape, device=device)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = zero_out
    weight.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad))
    layer(p.x, p.offsets).backward(p.dy)
    assert weight.grad_added_to_main_grad
    assert [t.shape for t in seen] == [weight.shape]
    assert not seen[0].any()
    assert weight.main_grad.any()


def test_grouped_main_grad_with_checkpointing_and_cached_weights(device):
    p, layer = small(device, "rowwise_gw_hp")
    sums = []
    for use in ("plain", "checkpoint", "cached"):
        layer.weight.main_grad = torch.zeros(p.weight.shape, device=device)
        x = p.x.clone().requires_grad_()
        if use == "checkpoint":
            checkpoint(layer, x, p.offsets, use_reentrant=False).backward(p.dy)
        elif use == "cached":
            with fp8.cached_weights(layer):
                layer(x, p.offsets).backward(p.dy)
        else:
            layer(x, p.offsets).backward(p.dy)
        sums.append(layer.weight.main_grad)
    assert_same_bits(sums[1], sums[0])
    assert_same_bits(sums[2], sums[0])


def test_grouped_main_grad_under_autocast(device):
    p, layer = small(device, "rowwise", dtype=torch.float32)
    layer.weight.main_grad = torch.zeros(p.weight.shape, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(p.x, p.offsets)
    y.backward(p.dy.bfloat16())
    assert layer.weight.grad is None
    cast = p._replace(x=p.x.bfloat16(), dy=p.dy.bfloat16())
    zero = torch.zeros_like(layer.weight.main_grad)
    reference.check_added(cast, layer.weight.main_grad, zero, "rowwise")


def test_grouped_main_grad_counts_as_written(device):
    p, layer = small(device, "rowwise")
    layer.weight.main_grad = torch.zeros(p.weight.shape, device=device)
    factor = torch.ones(p.weight.shape, device=device, requires_grad=True)
    kept = factor * layer.weight.main_grad
    layer(p.x, p.offsets).backward(p.dy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize(
    ("buffer", "error", "match"),
    [
        (1.0, TypeError, "GroupedLinear: expected weight.main_grad to be a tensor or None, got fl"),
        (torch.zeros(4, 48, 63), ValueError, r"main_grad of weight's shape \[4, 48, 64\], got"),
        (torch.zeros(4, 48, 64).double(), TypeError, "grouped_linear: expected main_grad in bfl"),
        (torch.zeros(4, 48, 64, device="meta"), ValueError, "main_grad on the device of x, cpu"),
        (torch.zeros(4, 48, 64, requires_grad=True), ValueError, "main_grad without requires_grad"),
    ],
)
def test_grouped_main_grad_errors(buffer, error, match):
    p, layer = small("cpu", "rowwise")
    layer.weight.main_grad = buffer
    with pytest.raises(error, match=match):
        layer(p.x, p.offsets)


def test_grouped_main_grad_compiles(device):
    """Traced, functionalized and put back: the buffer is written as in eager."""
    p, layer = small(device, "rowwise")
    sums = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.weight.main_grad = torch.ones(p.weight.shape, device=device)
        run(p.x.clone().requires_grad_(), p.offsets).backward(p.dy)
        assert layer.weight.grad is None
        sums.append(layer.weight.main_grad)
    assert_same_bits(sums[1], sums[0])


# --- experts ---


def step_into(tensors: list, buffers: list[Tensor | None], overwrite, recipe: str):
    """Gradients of moe_experts with main_grads of gate_up and down, and what autograd got."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    y = OPS._moe_experts_into(
        *leaves, "silu", False, 1.702, 7.0, recipe, *buffers, *overwrite, None, None
    )
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    y.backward(dy)
    return y.detach(), {
        n: t.grad for n, t in zip(moe.NAMES, leaves, strict=True) if t is not None and n != "index"
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("which", ["both", "gate_up", "down"])
def test_moe_main_grads(device, which, transposed, recipe, poisoned_memory):
    """The plain gradient, added in fp32 before it is rounded: within half an ulp of bf16, which the
    plain one has lost. The others are as without."""
    tensors = moe.problem(device=device, transposed=transposed, bias=True)
    y, _, grads = moe.run(tensors, recipe=recipe)
    before = [torch.randn(tensors[i].shape, device=device) for i in (3, 4)]
    given = [
        t.clone() if which in ("both", name) else None
        for name, t in zip(("gate_up", "down"), before, strict=True)
    ]
    found, others = step_into(tensors, given, (False, False), recipe)
    assert_same_bits(found, y)
    for name, started, buffer in zip(("gate_up", "down"), before, given, strict=True):
        if buffer is None:
            assert_same_bits(others.pop(name), grads[name], name)
            continue
        assert others.pop(name) is None
        expected = started.double() + grads[name].double()
        allowed = 2.0**-8 * grads[name].double().abs() + 2.0**-22 * expected.abs() + 2.0**-30
        assert ((buffer.double() - expected).abs() <= allowed).all(), name
    for name, grad in others.items():
        assert_same_bits(grad, grads[name], name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_main_grads_overwrite(device, recipe):
    """Each by itself; in bf16 the plain gradient to the bit."""
    tensors = moe.problem(device=device)
    _, _, grads = moe.run(tensors, recipe=recipe)
    given = [torch.full_like(tensors[i], float("nan")) for i in (3, 4)]
    step_into(tensors, given, (True, True), recipe)
    assert_same_bits(given[0], grads["gate_up"])
    assert_same_bits(given[1], grads["down"])
    step_into(tensors, given, (False, True), recipe)
    torch.testing.assert_close(given[0], 2 * grads["gate_up"], rtol=2**-7, atol=0)
    assert_same_bits(given[1], grads["down"])


def test_moe_main_grads_without_tokens(device):
    tensors = moe.problem(tokens=0, device=device)
    given = [torch.ones(tensors[i].shape, device=device) for i in (3, 4)]
    step_into(tensors, given, (True, False), "rowwise")
    assert not given[0].any()
    assert (given[1] == 1).all()


def test_moe_main_grad_errors():
    tensors = moe.problem()
    for which, name in enumerate(("gate_up_main_grad", "down_main_grad")):
        buffers: list = [None, None]
        buffers[which] = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=f"moe_experts: expected {name} of weight's shape"):
            step_into(tensors, buffers, (False, False), "rowwise")
