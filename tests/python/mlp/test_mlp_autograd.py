"""ops.mlp as a node of the graph: what needs a gradient, what is kept, what tools make of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from mlp_reference import NAMES, problem, run
from reference import assert_same_bits
from test_mlp_values import assert_same

import fp8

SUBSETS = [
    set(names)
    for count in (1, 2)
    for names in itertools.combinations(("x", "gate", "up", "down", "gate_bias"), count)
]


def _names(subset: set[str]) -> str:
    """The same in every process."""
    return "+".join(sorted(subset))


@pytest.mark.parametrize("needed", SUBSETS, ids=_names)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
def test_mlp_frozen_parts(device, needed, save):
    assert_same(problem(device, bias=True), needed, save=save)


@pytest.mark.parametrize("recipe", ["rowwise_gw_hp", "blockwise", "delayed"])
@pytest.mark.parametrize("needed", [{"gate"}, {"up", "down"}, {"x"}, {"down"}], ids=_names)
def test_mlp_frozen_parts_of_recipes(device, needed, recipe):
    assert_same(problem(device, recipe=recipe), needed)


def kept_bytes(case, needed, **options) -> int:
    """Bytes that the node keeps beside the parameters and x."""
    leaves = case.fresh(needed)
    owners = {t.untyped_storage().data_ptr() for t in leaves.values() if t is not None}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = case.fused(leaves, **options)
    del y
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in owners)


def test_mlp_keeps_the_products_and_x_in_fp8(device):
    """4 bytes a feature and one an input; amaxes in some words. CPU allocations are exact."""
    m, k, features = 256, 128, 512
    case = problem(device, (m, k), features, k)
    some = 2048  # amaxes, each in a block of the allocator
    assert kept_bytes(case, None) <= m * (4 * features + k) + some
    assert kept_bytes(case, None, save="recompute") <= some
    assert kept_bytes(case, {"down_bias"}) == 0
    assert kept_bytes(case, {"down"}) <= m * 4 * features + some


def test_mlp_retain_graph(device):
    case = problem(device)
    leaves = case.fresh()
    y = case.fused(leaves)
    names = [n for n in NAMES if leaves[n] is not None]
    first = torch.autograd.grad(y, [leaves[n] for n in names], case.dy, retain_graph=True)
    second = torch.autograd.grad(y, [leaves[n] for n in names], case.dy)
    for name, a, b in zip(names, first, second, strict=True):
        assert_same_bits(a, b, name)


def test_mlp_split_backward(device):
    """Part of the gradients at a time, as pipelines take them."""
    case = problem(device)
    whole = run(case.fused, case.fresh(), case.dy)
    leaves = case.fresh()
    y = case.fused(leaves)
    (dx,) = torch.autograd.grad(y, [leaves["x"]], case.dy, retain_graph=True)
    rest = [leaves[n] for n in ("gate", "up", "down")]
    dgate, dup, ddown = torch.autograd.grad(y, rest, case.dy)
    found = {"x": dx, "gate": dgate, "up": dup, "down": ddown}
    for name, grad in found.items():
        assert_same_bits(grad, whole.grads[name], name)


def test_mlp_double_backward_is_refused(device):
    case = problem(device)
    leaves = case.fresh()
    y = case.fused(leaves)
    dy = case.dy.clone().requires_grad_()
    (dx,) = torch.autograd.grad(y, leaves["x"], dy, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"mlp|derivative"):
        dx.sum().backward()


def test_mlp_no_grad_and_inference(device):
    case = problem(device)
    expected = case.fused(case.fresh()).detach()
    with torch.no_grad():
        assert_same_bits(case.fused(case.leaves), expected)
    with torch.inference_mode():
        assert_same_bits(case.fused(case.leaves), expected)


def test_mlp_autocast(device):
    case = problem(device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = case.fused(case.fresh())
    assert y.dtype == torch.bfloat16
    low = {n: None if t is None else t.bfloat16() for n, t in case.leaves.items()}
    assert_same_bits(y.detach(), case.fused(low))


def test_mlp_compile(device):
    case = problem(device)
    eager = run(case.fused, case.fresh(), case.dy)
    leaves = case.fresh()
    compiled = torch.compile(lambda leaves: case.fused(leaves), backend="aot_eager", fullgraph=True)
    found = run(compiled, leaves, case.dy)
    assert_same_bits(found.y, eager.y, "y")
    for name, grad in eager.grads.items():
        if grad is not None:
            assert_same_bits(found.grads[name], grad, name)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_mlp_shares_the_input_of_other_layers(device, recipe):
    """x that another layer has quantized is not quantized again, with the same bits."""
    case = problem(device, recipe=recipe)
    leaves = case.fresh()
    x = leaves["x"] * 1
    other = fp8.ops.fused_linear(x, leaves["gate"].detach(), None, recipe)
    y = case.fused(dict(leaves, x=x))
    assert_same_bits(y.detach(), case.composed(case.leaves))
    assert other.shape == (48, 96)
    fp8.ops.fused_linear(x * 1, leaves["gate"], None, recipe).sum().backward()  # drops the memory


def test_mlp_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    m, k, features, h = 48, 64, 96, 64
    case = problem(device)
    products = 2 * m * features * (2 * k + h)
    for save in ("bf16", "fp8"):
        with FlopCounterMode(display=False) as counter:
            case.fused(case.fresh(), save=save).backward(case.dy)
        assert counter.get_total_flops() == 3 * products
    with FlopCounterMode(display=False) as counter:
        case.fused(case.fresh({"down"}), save="recompute").backward(case.dy)
    assert counter.get_total_flops() == products + 2 * m * features * (2 * k + h)
