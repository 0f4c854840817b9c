"""ops.mlp has the bits of fused_linear and eager activations composed, forward and backward."""

from __future__ import annotations

import mlp_reference
import pytest
import torch
from mlp_reference import FORMS, RECIPES, Problem, problem, run
from reference import assert_same_bits

import fp8

GATED_ACTIVATIONS = (*mlp_reference.ACTIVATIONS, "clamped_silu")


def assert_same(case: Problem, needed: set[str] | None = None, **options) -> None:
    """Bits of y and every gradient; dx of two weights within its one rounding more or less."""
    fused = run(case.fused, case.fresh(needed), case.dy, **options)
    composed = run(case.composed, case.fresh(needed), case.dy)
    assert_same_bits(fused.y, composed.y, "y")
    for name, expected in composed.grads.items():
        found = fused.grads[name]
        assert (found is None) == (expected is None), name
        if expected is None:
            continue
        if name == "x" and case.form == "separate":
            assert_dx_close(case, found, expected)
        else:
            assert_same_bits(found, expected, name)


def assert_dx_close(case: Problem, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Composed: T(T(p) + T(q)), p through gate and q through up. Fused: T(T(p) + q). So the two
    differ by the rounding of q, and by that of the sum once each: a unit u is at most eps times the
    value, and its half what a rounding changes."""
    leaves = case.fresh()
    twin = dict(leaves, x=leaves["x"].detach().clone().requires_grad_())
    linear = fp8.ops.fused_linear
    recipe = case.options.get("recipe", "tensorwise")
    gate = linear(leaves["x"], leaves["gate"], leaves["gate_bias"], recipe)
    up = linear(twin["x"], leaves["up"], leaves["up_bias"], recipe)
    h = mlp_reference.activate(case.options.get("activation", "silu"), gate, up)
    linear(h, leaves["down"], leaves["down_bias"], recipe).backward(case.dy)
    q = twin["x"].grad.double().abs()
    half = torch.finfo(expected.dtype).eps / 2
    accumulated = 2.0**-20  # sums in fp32, whose order may differ where the product is added
    p = leaves["x"].grad.double().abs()
    bound = half * (q + 2 * expected.double().abs() + 2 * half * q) + accumulated * (p + q) + 1e-30
    assert bool(((found.double() - expected.double()).abs() <= bound * (1 + 2 * half)).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_mlp_recipes(device, recipe, form):
    assert_same(problem(device, form=form, recipe=recipe))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("recipe", "features"), [("tensorwise", 96), ("blockwise", 128)])
def test_mlp_activations(device, recipe, features, activation, form, dtype):
    if form == "plain" and activation == "clamped_silu":
        pytest.skip("needs a gate")
    options = {"activation": activation, "dtype": dtype, "recipe": recipe}
    assert_same(problem(device, features=features, form=form, **options))


def test_mlp_clamped_rounds_both_products_of_a_sum(device):
    """One row and a scale per row: gradients of the gate's weights are those of its product, which
    nearly cancel here and there; fp32 has room for what a fused multiply-add keeps."""
    options = {"activation": "clamped_silu", "recipe": "rowwise", "dtype": torch.float32}
    assert_same(problem(device, (1,), 2048, 1, **options))


SHAPES = (  # x, I, H
    ((1, 32), 16, 8),
    ((130, 64), 208, 40),
    ((2, 3, 20), 24, 9),
    ((7, 20), 33, 17),
    ((300, 128), 1040, 64),
    ((140, 32), 256, 24),
    ((16,), 32, 16),
    ((0, 32), 48, 16),
    ((2, 0, 32), 48, 16),
    ((4, 0), 16, 16),
    ((4, 16), 16, 0),
    ((257, 48), 272, 16),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "features", "out"), SHAPES, ids=str)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_mlp_shapes(device, recipe, shape, features, out, form, poisoned_memory):
    assert_same(problem(device, shape, features, out, form, recipe=recipe))


def test_mlp_without_features(device):
    assert_same(problem(device, (4, 16), 0, 16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_mlp_biases(device, recipe, form):
    assert_same(problem(device, form=form, bias=True, recipe=recipe))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", [*RECIPES, "tensorwise:power_of_two"])
def test_mlp_recompute(device, recipe, form):
    assert_same(problem(device, form=form, bias=True, recipe=recipe), save="recompute")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize(("form", "features"), [("separate", 96), ("merged", 128)])
def test_mlp_power_of_two(device, recipe, form, features):
    recipe = f"{recipe}:power_of_two"
    assert_same(problem(device, features=features, form=form, recipe=recipe))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
def test_mlp_delayed(device, form, save):
    """More steps than a window has, each with other values of other sizes, through histories of
    their own: scales of the steps before, and own ones where those would saturate. A fingerprint is
    one of tiles of 64 columns: that of a merged gradient, which is made in halves, is the
    composition's where a half is whole tiles."""
    names = ("gate", "up", "down") if form == "separate" else ("gate", "down")
    histories = [
        {f"{name}_history": fp8.ops.make_history(device) for name in names} for _ in range(2)
    ]
    for step in range(22):
        case = problem(device, features=128, form=form, recipe="delayed")
        case.leaves["x"] *= 1 + step % 5
        case.dy *= 4 ** (step % 3)
        fused = run(case.fused, case.fresh(), case.dy, save=save, **histories[0])
        composed = run(case.composed, case.fresh(), case.dy, **histories[1])
        assert_same_bits(fused.y, composed.y, f"y of step {step}")
        for name, expected in composed.grads.items():
            if expected is not None and not (name == "x" and form == "separate"):
                assert_same_bits(fused.grads[name], expected, f"{name} of step {step}")
    for name in names:
        rows = slice(1, None) if name == "up" else slice(None)  # x is quantized with gate's
        found, expected = (h[f"{name}_history"][rows] for h in histories)
        assert_same_bits(found, expected, f"history of {name}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_mlp_strides(device, recipe):
    """Sliced, transposed and expanded arguments."""
    case = problem(device, (40, 64), 96, 48, recipe=recipe)
    wide = torch.randn(40, 100, device=device, dtype=torch.bfloat16)
    case.leaves["x"] = wide[:, 3:67]
    case.leaves["gate"] = case.leaves["gate"].t().contiguous().t()
    case.dy = torch.randn(1, 48, device=device, dtype=torch.bfloat16).expand(40, 48)
    tensors = {n: t for n, t in case.leaves.items() if t is not None}

    def leaves():
        return {
            n: tensors[n].detach().requires_grad_() if n in tensors else None for n in case.leaves
        }

    fused = run(case.fused, leaves(), case.dy)
    composed = run(case.composed, leaves(), case.dy)
    assert_same_bits(fused.y, composed.y, "y")
    for name in ("gate", "up", "down"):
        assert_same_bits(fused.grads[name], composed.grads[name], name)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_mlp_special_values(device, activation, recipe):
    """Gates from -Inf to Inf, NaN, zeros of both signs, subnormal: as eager activations have them.
    Static values of gate: x is one column of ones, so that gate(x) is the weight times a power of
    two, and up(x) is 1."""
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-38, 2, 400)])
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0])]).bfloat16().to(device)
    features = values.numel() // 16 * 16
    case = problem(device, (32, 16), features, 16, activation=activation, recipe=recipe)
    x = torch.zeros(32, 16, device=device, dtype=torch.bfloat16)
    x[:, 0] = 1
    case.leaves["x"] = x
    gate = torch.zeros_like(case.leaves["gate"])
    gate[:, 0] = values[:features]
    case.leaves["gate"] = gate
    assert_same(case)
    case.options["recipe"] = "tensorwise"
    case.leaves["gate"][3, 0] = float("nan")
    fused = run(case.fused, case.fresh(), case.dy)
    composed = run(case.composed, case.fresh(), case.dy)
    assert_same_bits(fused.y, composed.y, "y")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["separate", "plain"])
def test_mlp_accuracy(device, recipe, form):
    """Errors against float64 are the composition's, to within noise (5%)."""
    case = problem(device, (256, 128), 256, 128, form=form, recipe=recipe)
    exact = {n: None if t is None else t.double().requires_grad_() for n, t in case.leaves.items()}
    gate = exact["x"] @ exact["gate"].t()
    up = None if exact["up"] is None else exact["x"] @ exact["up"].t()
    y = mlp_reference.activate("silu", gate, up) @ exact["down"].t()
    y.backward(case.dy.double())
    fused = run(case.fused, case.fresh(), case.dy)
    composed = run(case.composed, case.fresh(), case.dy)
    for name, t in exact.items():
        if t is not None:
            error, reference = (
                (run_.grads[name].double() - t.grad).norm() for run_ in (fused, composed)
            )
            assert error <= 1.05 * reference, name
