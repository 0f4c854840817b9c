"""merged_linear in a graph: parts that are not reached, frozen or modified, and what is kept."""

from __future__ import annotations

import merged_reference as reference
import pytest
import torch
from merged_reference import RECIPES, problem
from reference import assert_same_bits
from torch.utils.checkpoint import checkpoint

import fp8

SIZE = ((12,), 32, (16, 8, 24))


def leaves(device="cpu", recipe="tensorwise", biased=()):
    p = problem(*SIZE, biased=biased, device=device)
    x, weights = p.x.requires_grad_(), [w.requires_grad_() for w in p.weights]
    biases = None if p.biases is None else [b.requires_grad_() for b in p.biases]
    return p, x, weights, biases, fp8.ops.merged_linear(x, weights, biases, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (1, 2)])
def test_merged_parts_without_a_gradient_are_absent(device, recipe, used):
    """None for them, not zeros; the others as if they were alone, with the scale that all weights
    have."""
    p, x, weights, biases, ys = leaves(device, recipe, (True, True, True))
    torch.autograd.backward([ys[i] for i in used], [p.dys[i] for i in used])
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        assert (weight.grad is not None) == (i in used)
        assert (bias.grad is not None) == (i in used)
    few = reference.Problem(
        p.x.detach(),
        [p.weights[i].detach() for i in used],
        [p.biases[i].detach() for i in used],
        [p.dys[i] for i in used],
    )
    alone = reference.joined(few, recipe)
    for i, dw, db in zip(used, alone.dweights, alone.dbiases, strict=True):
        if fp8.RECIPES[recipe].wgrad == "fp8":
            assert_same_bits(weights[i].grad, dw.contiguous())
        else:
            torch.testing.assert_close(weights[i].grad, dw, rtol=2**-8, atol=2**-8)
        assert_same_bits(biases[i].grad, db.contiguous())
    if fp8.RECIPES[recipe].granularity != "tensorwise":
        assert_same_bits(x.grad, alone.dx)
    else:  # codes of a larger scale; as far off as codes are
        error = (x.grad - alone.dx).float().norm() / alone.dx.float().norm()
        assert float(error) < 2**-4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_merged_frozen_weights(device, recipe, frozen):
    p = problem(*SIZE, device=device)
    whole = reference.merged(p, recipe)
    x = p.x.requires_grad_()
    weights = [w.requires_grad_(i not in frozen) for i, w in enumerate(p.weights)]
    torch.autograd.backward(fp8.ops.merged_linear(x, weights, None, recipe), p.dys)
    assert_same_bits(x.grad, whole.dx)
    for i, weight in enumerate(weights):
        if i in frozen:
            assert weight.grad is None
        else:
            assert_same_bits(weight.grad, whole.dweights[i])


def test_merged_input_without_a_gradient(device):
    p = problem(*SIZE, device=device)
    whole = reference.merged(p, "tensorwise")
    weights = [w.requires_grad_() for w in p.weights]
    ys = fp8.ops.merged_linear(p.x, weights)
    torch.autograd.backward(ys, p.dys)
    for weight, expected in zip(weights, whole.dweights, strict=True):
        assert_same_bits(weight.grad, expected)


def test_merged_results_may_be_modified(device):
    """Tensors of their own to autograd: five PEFT tuners add to a layer's output in place."""
    p, _, weights, _, ys = leaves(device)
    expected = reference.merged(p, "tensorwise")
    q, k, v = ys
    saved = k.sin()  # needs k as it is
    q.add_(1).mul_(2)
    assert (q._version, k._version, v._version) == (2, 0, 0)
    assert not q._is_view()
    assert torch.equal(k.detach(), expected.ys[1])
    torch.autograd.backward([q, saved, v], [p.dys[0] / 2, p.dys[1] / k.cos().detach(), p.dys[2]])
    assert_same_bits(weights[0].grad, expected.dweights[0])


def test_merged_results_of_inference_may_be_modified(device):
    p = problem(*SIZE, device=device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            q, k, _ = fp8.ops.merged_linear(p.x, p.weights)
            before = k.clone()
            q.zero_()
            assert torch.equal(k, before)
            assert q.stride() == (48, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(96, 32, 16), (91, 30, 13)])  # rows on 16 bytes, and not
def test_merged_small_results_keep_no_memory_of_others(device, dtype, widths):
    """As k and v beside q's many heads: v lives until the backward, q and k need not."""
    x = torch.randn(32, 64, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, 64, device=device, dtype=dtype) for n in widths]
    total = 32 * sum(widths) * dtype.itemsize
    q, k, v = fp8.ops.merged_linear(x, weights)
    for small in (k, v):
        assert small.is_contiguous()
        assert small.untyped_storage().nbytes() == small.nbytes
    assert q.untyped_storage().nbytes() == total
    with torch.no_grad():  # nothing is kept
        for a, b in zip((q, k, v), fp8.ops.merged_linear(x, weights), strict=True):
            assert_same_bits(a.detach(), b)
            assert b.untyped_storage().nbytes() == total


def test_merged_gradients_are_taken_without_a_copy(device):
    p, _, weights, _, ys = leaves(device)
    torch.autograd.backward(ys, p.dys)
    start = weights[0].grad.untyped_storage().data_ptr()
    for weight in weights:
        assert weight.grad.is_contiguous()
        assert weight.grad.untyped_storage().data_ptr() == start
    again = fp8.ops.merged_linear(p.x, weights)
    first = [w.grad.clone() for w in weights]
    torch.autograd.backward(again, p.dys)
    for weight, grad in zip(weights, first, strict=True):
        assert_same_bits(weight.grad, grad + grad)


def test_merged_used_twice_and_in_part(device):
    p, x, weights, _, ys = leaves(device)
    (dx,) = torch.autograd.grad(ys, x, p.dys, retain_graph=True)
    (dw,) = torch.autograd.grad(ys, weights[1], p.dys, retain_graph=True)
    torch.autograd.backward(ys, p.dys)
    assert_same_bits(dx, x.grad)
    assert_same_bits(dw, weights[1].grad)
    for weight in (weights[0], weights[2]):
        assert weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise"])
def test_merged_recomputed(device, recipe, reentrant):
    p = problem(*SIZE, device=device)
    x, weights = p.x.requires_grad_(), [w.requires_grad_() for w in p.weights]
    history = {"history": fp8.ops.make_history(device)} if recipe == "delayed" else {}
    results = []
    for again in (False, True):

        def run(x):
            return tuple(fp8.ops.merged_linear(x, weights, None, recipe, **history))

        ys = checkpoint(run, x, use_reentrant=reentrant) if again else run(x)
        results.append(torch.autograd.grad(ys, [x, *weights], p.dys) if not reentrant else None)
        if reentrant:
            torch.autograd.backward(ys, p.dys)
            results[-1] = [t.grad for t in (x, *weights)]
            for t in (x, *weights):
                t.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def test_merged_second_derivative_is_refused():
    p, x, _, _, ys = leaves()
    (dx,) = torch.autograd.grad(ys, x, p.dys, create_graph=True)
    with pytest.raises(RuntimeError, match="_merged_backward"):
        dx.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.x.detach(), torch.ones_like(p.x))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            fp8.ops.merged_linear(dual, p.weights)


def test_merged_modified_weight_is_noticed():
    p, _, weights, _, ys = leaves()
    with torch.no_grad():
        weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, p.dys)


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise_gw_hp"])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_merged_compiled(recipe, mode, backend):
    p = problem(*SIZE, biased=(True, False, True))
    weights = [w.requires_grad_() for w in p.weights]
    histories = [fp8.ops.make_history() if recipe == "delayed" else None for _ in range(2)]

    def run(x, history):
        q, k, v = fp8.ops.merged_linear(x, weights, p.biases, recipe, history=history)
        return q.sin(), k * 2, v.add_(1)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    results = []
    for call, history in zip((run, compiled), histories, strict=True):
        x = p.x.detach().clone().requires_grad_()
        with modes[mode]():
            ys = call(x, history)
        grads = ()
        if mode == "grad":
            grads = torch.autograd.grad(ys, [x, *weights], p.dys)
        results.append([*(y.detach() for y in ys), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours.contiguous(), theirs.contiguous())
    if recipe == "delayed":
        assert torch.equal(*histories)
