"""torch looks at, or runs, a converted model in its own way: tracing, exporting, counting, vmap,
nested tensors, checkpointing."""

from __future__ import annotations

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from converted import (
    assert_trains_alike,
    convert,
    fp8_output,
    noticed,
    randomize,
    relative,
    step,
    twins,
)
from tiny_transformers import make
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fp8

RECIPES = tuple(fp8.RECIPES)


def net() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))


def data(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (16, 64)), generator=generator)


def loss(model: nn.Module) -> Tensor:
    return model(data()).float().square().mean()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_symbolic_trace(recipe, scaled):
    """A converted layer is a leaf, or its one operator: the traced module trains alike."""
    model = convert(net(), recipe)
    if scaled and recipe in ("tensorwise", "delayed"):
        with torch.no_grad(), fp8.calibrate(convert(model, "tensorwise")):
            model(data())
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    ours, theirs = step(traced, loss), step(model, loss)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(g, theirs.grads[n]) for n, g in ours.grads.items())
    assert not {w for w in ours.warned if "fp8" in w}
    copied = copy.deepcopy(traced)
    assert torch.equal(loss(copied), loss(model))


def test_symbolic_trace_then_convert():
    traced = torch.fx.symbolic_trace(net())
    assert_trains_alike(traced, loss)


def test_layers_replaced_in_a_traced_graph():
    """As graph passes do: find call_module nodes of linears."""
    traced = torch.fx.symbolic_trace(convert(net()))
    kinds = [type(m) for m in traced.modules() if isinstance(m, nn.Linear)]
    assert kinds
    assert all(issubclass(kind, fp8.Linear) for kind in kinds)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = convert(net().eval())
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (data(),), dynamic_shapes=({0: batch},), strict=strict)
    module = program.module()
    for rows in (16, 5):
        x = data(rows, 64)
        with torch.no_grad():
            assert relative(module(x), model(x)) < 1e-6
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        assert relative(torch.export.load(buffer).module()(data()), model(data())) < 1e-6


def test_flop_counter_counts_what_linear_counts():
    counts = []
    for model in twins(net()):
        with FlopCounterMode(display=False) as counter:
            loss(model).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[1] == counts[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "nothing"])
def test_flop_counter_counts_what_a_backward_needs(recipe, frozen):
    counts = []
    for kind in (nn.Linear, partial(fp8.Linear, recipe=recipe)):
        layer = kind(64, 96)
        if frozen in ("weight", "bias"):
            getattr(layer, frozen).requires_grad_(False)
        x = data().requires_grad_(frozen != "input")
        with FlopCounterMode(display=False) as counter:
            layer(x).square().mean().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]


def test_flop_counter_of_experts():
    """Each token goes to its experts: rows · (up + down) products, thrice for a training step."""
    model = convert(make("mixtral"))
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    index = torch.arange(32).view(16, 2) % 4
    x = data(16, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        experts(x, index, torch.full((16, 2), 0.5)).square().mean().backward()
    forward = 2 * 32 * (32 * 128 + 64 * 32)
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("recipe", RECIPES)
def test_vmap(recipe):
    """Over inputs: each its own scale, no warning of a loop that torch falls back to."""
    layer = randomize(fp8.Linear(64, 48, recipe=recipe))
    x = data(5, 8, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.vmap(layer)(x)
        one_by_one = torch.stack([fp8_output(layer, part, recipe) for part in x])
    assert y.shape == (5, 8, 48)
    whole = x @ layer.weight.T.detach() + layer.bias.detach()
    assert relative(y, whole) < 0.08
    assert relative(y, one_by_one) < 0.08


def test_vmap_over_an_ensemble_of_weights():
    layers = [randomize(fp8.Linear(64, 48), seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(p, b, x):
        return torch.func.functional_call(base, (p, b), (x,))

    x = data()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for one, layer in zip(y, layers, strict=True):
        assert relative(one, x @ layer.weight.T.detach() + layer.bias.detach()) < 0.08


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensor(layout):
    """Runs, or says in one sentence what to do; never a wrong value."""
    layer = randomize(fp8.Linear(64, 48))
    parts = [data(5, 64), data(9, 64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(parts, layout=layout)
        made: list[Tensor] = []
        if noticed(lambda: made.append(layer(nested)), "fp8.Linear: nested", Exception):
            for one, part in zip(made[0].unbind(), parts, strict=True):
                assert relative(one, part @ layer.weight.T + layer.bias) < 0.08


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoint_sequential(use_reentrant, recipe):
    """30 calls, the window of `delayed` outgrown at the 20th."""
    models = [convert(net(), recipe) for _ in range(2)]
    for index in range(30):
        size = 8.0 if index == 20 else 1.0
        x = (size * data()).requires_grad_()
        results = []
        for one, checkpointing in zip(models, (False, True), strict=True):
            one.zero_grad()
            leaf = x.detach().clone().requires_grad_()
            if checkpointing:
                y = checkpoint_sequential(one, 2, leaf, use_reentrant=use_reentrant)
            else:
                y = one(leaf)
            y.square().mean().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in one.parameters())])
        assert all(map(torch.equal, *results)), index


def test_selective_checkpointing_by_public_name():
    """A policy that saves the products of FP8 layers finds them in fp8.ops.MATMUL_OPS."""
    model = convert(net())
    heard = []

    def policy(context, op, *args, **kwargs):
        heard.append(op)
        saved = op in fp8.ops.MATMUL_OPS
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    leaf = data().requires_grad_()
    y = checkpoint(
        model,
        leaf,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
    y.square().mean().backward()
    assert fp8.ops.MATMUL_OPS & set(heard)
    plain = data().requires_grad_()
    model(plain).square().mean().backward()
    assert torch.equal(leaf.grad, plain.grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autograd_grad_of_inputs_alone(recipe):
    """As pipeline schedules split the backward: inputs first, weights later."""
    model = convert(net(), recipe)
    x = data().requires_grad_()
    y = model(x).square().mean()
    (dx,) = torch.autograd.grad(y, x, retain_graph=True)
    weights = torch.autograd.grad(y, list(model.parameters()))
    other = step(convert(net(), recipe), lambda m: m(data().requires_grad_()).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(weights, other.grads.values(), strict=True))
    assert bool(dx.isfinite().all())
