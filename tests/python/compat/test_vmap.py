"""torch.vmap: the results of a loop, bit for bit, and no warning of a missing batching rule."""

from __future__ import annotations

import pytest
import samples
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_flatten, tree_unflatten

import fp8
from fp8._native import operators as _operators

pytestmark = pytest.mark.filterwarnings("error")
RECIPES = sorted(fp8.RECIPES)
SIZE = 3


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert torch.equal(a.float(), b.float())


def test_vmap_knows_every_operator():
    assert sorted(_operators.NAMES) == samples.namespace()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_inputs(recipe, dim):
    layer = fp8.Linear(32, 16, recipe=recipe)
    xs = torch.randn(SIZE, 5, 2, 32) * torch.tensor([1.0, 100.0, 1e-3]).view(-1, 1, 1, 1)
    results = []
    for run in (
        lambda x: torch.vmap(layer, dim)(x.movedim(0, dim)),
        lambda x: torch.stack([layer(part) for part in x]),
    ):
        leaf = xs.clone().requires_grad_()
        layer.zero_grad()
        y = run(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad])
    assert_same(*results)
    with torch.no_grad():
        assert_same([torch.vmap(layer)(xs)], [results[0][0]])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("batched_x", [False, True])
def test_vmap_over_an_ensemble(recipe, batched_x):
    """functional_call of stacked parameters, as torch.func's tutorial has it."""
    layers = [fp8.Linear(32, 16, recipe=recipe) for _ in range(SIZE)]
    xs = torch.randn(SIZE, 5, 32) if batched_x else torch.randn(5, 32)
    parameters, _ = stack_module_state(layers)

    def call(values, x):
        return functional_call(layers[0], values, (x,))

    y = torch.vmap(call, (0, 0 if batched_x else None))(parameters, xs)
    y.square().sum().backward()
    loop = [layer(xs[i] if batched_x else xs) for i, layer in enumerate(layers)]
    torch.stack(loop).square().sum().backward()
    assert_same([y], [torch.stack(loop)])
    for name, stacked in parameters.items():
        assert_same(stacked.grad, [layer.get_parameter(name).grad for layer in layers])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_vmap_of_vmap(recipe):
    layers = [fp8.Linear(32, 16, recipe=recipe) for _ in range(SIZE)]
    xs = torch.randn(4, 5, 32)
    parameters, _ = stack_module_state(layers)
    call = torch.vmap(lambda values, x: functional_call(layers[0], values, (x,)), (None, 0))
    got = torch.vmap(call, (0, None))(parameters, xs)
    assert_same([got], [torch.stack([torch.stack([m(x) for x in xs]) for m in layers])])


def test_vmap_static_scale_autocast_and_nothing():
    layer, xs = fp8.Linear(32, 16), torch.randn(SIZE, 5, 32)
    layer.input_scale = torch.tensor(0.003)
    assert_same(torch.vmap(layer)(xs), [layer(x) for x in xs])
    scales = torch.tensor([0.01, 0.1, 1.0])
    got = torch.vmap(lambda x, s: fp8.ops.fused_linear(x, layer.weight, input_scale=s))(xs, scales)
    assert_same(
        got,
        [
            fp8.ops.fused_linear(x, layer.weight, input_scale=s)
            for x, s in zip(xs, scales, strict=True)
        ],
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(torch.vmap(layer)(xs), [layer(x) for x in xs])
    assert torch.vmap(layer)(xs[:0]).shape == (0, 5, 16)


def test_vmap_moves_a_history_on_as_a_loop_does():
    weight, xs = torch.randn(16, 32), torch.randn(20, 5, 32)

    def call(x, history):
        return fp8.ops.fused_linear(x, weight, None, "delayed", history=history)

    ours, theirs = (fp8.ops.make_history() for _ in range(2))
    assert_same(torch.vmap(call, (0, None))(xs, ours), [call(x, theirs) for x in xs])
    assert torch.equal(ours, theirs)
    torch.vmap(call, (0, None))(xs[:0], ours)
    assert torch.equal(ours, theirs)
    each = torch.stack([theirs, fp8.ops.make_history()])
    loop = each.clone()
    one_by_one = [call(x, h) for x, h in zip(xs[:2], loop, strict=True)]
    assert_same(torch.vmap(call)(xs[:2], each), one_by_one)
    assert torch.equal(each, loop)


@pytest.mark.parametrize("recipe", RECIPES)
def test_vmap_over_gradients(recipe):
    """torch.autograd.grad(is_grads_batched=True) and vectorized jacobians: the backward ops."""
    layer, x = fp8.Linear(32, 16, recipe=recipe), torch.randn(5, 32, requires_grad=True)
    y, vectors = layer(x), torch.randn(SIZE, 5, 16)
    inputs = [x, layer.weight, layer.bias]

    def backward(vector):
        return torch.autograd.grad(y, inputs, vector, retain_graph=True)

    got = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True, retain_graph=True)
    assert_same(torch.vmap(backward)(vectors), got)
    loop = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in vectors]
    assert_same(got, [torch.stack(parts) for parts in zip(*loop, strict=True)])


@pytest.mark.parametrize("recipe", fp8.GROUPED_RECIPES)
def test_vmap_over_gradients_of_groups(recipe):
    layer = fp8.GroupedLinear(3, 32, 16, recipe=recipe)
    x = torch.randn(9, 32, requires_grad=True)
    offsets = torch.tensor([2, 2, 9], dtype=torch.int32)
    y, vectors = layer(x, offsets), torch.randn(SIZE, 9, 16)
    inputs = [x, layer.weight, layer.bias]
    got = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in vectors]
    assert_same(got, [torch.stack(parts) for parts in zip(*loop, strict=True)])
    layer.weight.main_grad = torch.zeros(3, 16, 32)
    y = layer(x, offsets)
    with pytest.raises(NotImplementedError, match="with main_grad, got a batch of them"):
        torch.autograd.grad(y, layer.weight, vectors, is_grads_batched=True)


def test_vmap_into_main_grad():
    layer, xs = fp8.Linear(32, 16), torch.randn(SIZE, 5, 32)
    layer.weight.main_grad = torch.zeros(16, 32)
    torch.vmap(layer)(xs).sum().backward()
    got, layer.weight.main_grad = layer.weight.main_grad, torch.zeros(16, 32)
    torch.stack([layer(x) for x in xs]).sum().backward()
    assert torch.equal(got, layer.weight.main_grad)
    x = xs[0].clone().requires_grad_()
    y = layer(x)
    with pytest.raises(RuntimeError, match="writes main_grad, which has no batch dimension"):
        torch.vmap(lambda v: torch.autograd.grad(y, [x, layer.weight], v, allow_unused=True))(
            torch.randn(2, 5, 16)
        )
    with pytest.raises(NotImplementedError, match="with main_grad, got a batch of them"):
        torch.autograd.grad(y, layer.weight, torch.randn(2, 5, 16), is_grads_batched=True)


CASES = [
    pytest.param(name, index, id=f"{name}-{index}")
    for name in samples.namespace()
    for index in range(min(len(samples.samples(name, "cpu")), 4))
    if not name.endswith("_into")  # above
]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_vmap_of_every_operator(name, index):
    """Every floating-point tensor batched, each example other values."""
    op = getattr(torch.ops.fp8, name).default
    chosen = samples.samples(name, "cpu")[index]
    written = [a.name for a in op._schema.arguments if a.is_write]

    def batch(value):
        if not isinstance(value, Tensor) or value.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            return value
        return torch.stack([value.detach(), value.detach() * 3])

    given, spec = tree_flatten((chosen.args, chosen.kwargs))
    values = [batch(value) for value in given]
    batched = [0 if v is not g else None for v, g in zip(values, given, strict=True)]
    if not any(dim == 0 for dim in batched):
        pytest.skip("has no tensor to batch")

    def call(*leaves):
        args, kwargs = tree_unflatten(leaves, spec)
        return op(*args, **kwargs)

    examples = [
        [v if d is None else v[i].clone() for v, d in zip(values, batched, strict=True)]
        for i in range(2)
    ]
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]

    def over_tensors(*given):
        full = list(values)
        for i, value in zip(tensors, given, strict=True):
            full[i] = value
        return call(*full)

    got = torch.vmap(over_tensors, tuple(batched[i] for i in tensors))(
        *(values[i] for i in tensors)
    )
    loop = [call(*example) for example in examples]
    if isinstance(got, Tensor):
        got, loop = (got,), [(result,) for result in loop]
    buffers = {"out", "main_grad", "gate_up_main_grad", "down_main_grad"}
    assert {name for name in written if not name.endswith("history")} <= buffers
    assert_same(got, [torch.stack(parts) for parts in zip(*loop, strict=True)])
