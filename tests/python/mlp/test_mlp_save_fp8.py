"""ops.mlp with save="fp8": the forward has the bits of save="bf16", and so has the backward where
the products of gate and up are replaced by what their codes stand for."""

from __future__ import annotations

import mlp_reference
import pytest
import torch
from mlp_reference import FORMS, RECIPES, Problem, of_stored, problem, run, stored
from reference import assert_same_bits
from test_mlp_autograd import SUBSETS, _names, kept_bytes
from test_mlp_values import GATED_ACTIVATIONS, SHAPES

import fp8


def assert_same_as_stored(case: Problem, needed: set[str] | None = None) -> None:
    found = run(case.fused, case.fresh(needed), case.dy, save="fp8")
    expected = of_stored(case, needed)
    assert_same_bits(found.y, expected.y, "y")
    for name, grad in expected.grads.items():
        assert (found.grads[name] is None) == (grad is None), name
        if grad is not None:
            assert_same_bits(found.grads[name], grad, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", [*RECIPES, "tensorwise:power_of_two"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_mlp_save_fp8(device, recipe, form, bias):
    assert_same_as_stored(problem(device, form=form, recipe=recipe, bias=bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlp_save_fp8_activations(device, activation, form, dtype):
    if form == "plain" and activation == "clamped_silu":
        pytest.skip("needs a gate")
    assert_same_as_stored(problem(device, form=form, activation=activation, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "features", "out"), [s for s in SHAPES if s[0][-1]], ids=str)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "delayed"])
def test_mlp_save_fp8_shapes(device, recipe, shape, features, out, form, poisoned_memory):
    assert_same_as_stored(problem(device, shape, features, out, form, recipe=recipe))


@pytest.mark.parametrize("needed", SUBSETS, ids=_names)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_mlp_save_fp8_frozen_parts(device, needed, recipe):
    assert_same_as_stored(problem(device, bias=True, recipe=recipe), needed)


@pytest.mark.parametrize("form", FORMS)
def test_mlp_save_fp8_delayed(device, form):
    """Histories move on as those of save="bf16" do with the same gradients."""
    names = ("gate", "up", "down") if form == "separate" else ("gate", "down")
    histories = [
        {f"{name}_history": fp8.ops.make_history(device) for name in names} for _ in range(2)
    ]
    for step in range(5):
        case = problem(device, features=128, form=form, recipe="delayed")
        case.leaves["x"] *= 1 + step % 3
        case.dy *= 16 ** (step % 2)
        found = run(case.fused, case.fresh(), case.dy, save="fp8", **histories[0])
        expected = of_stored(case, **histories[1])
        assert_same_bits(found.y, expected.y, f"y of step {step}")
        for name, grad in expected.grads.items():
            if grad is not None:
                assert_same_bits(found.grads[name], grad, f"{name} of step {step}")
    for name in histories[0]:
        assert_same_bits(histories[0][name], histories[1][name], name)


def test_mlp_save_fp8_keeps_half(device):
    """2 bytes a feature and one an input; a scale a row of each product; amaxes in some words."""
    m, k, features = 256, 128, 512
    case = problem(device, (m, k), features, k)
    some = 2048 + 2 * 4 * m
    assert kept_bytes(case, None, save="fp8") <= m * (2 * features + k) + some
    assert kept_bytes(case, {"down"}, save="fp8") <= m * 2 * features + some
    assert kept_bytes(case, {"down_bias"}, save="fp8") == 0


def test_mlp_save_fp8_again(device):
    """The graph kept, and part of the gradients at a time."""
    case = problem(device)
    whole = run(case.fused, case.fresh(), case.dy, save="fp8")
    leaves = case.fresh()
    y = case.fused(leaves, save="fp8")
    for name in ("x", "gate", "up", "down", "x"):
        (grad,) = torch.autograd.grad(y, [leaves[name]], case.dy, retain_graph=True)
        assert_same_bits(grad, whole.grads[name], name)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_gw_hp"])
@pytest.mark.parametrize("form", FORMS)
def test_mlp_save_fp8_compiles(device, form, recipe):
    case = problem(device, form=form, recipe=recipe)
    eager = run(case.fused, case.fresh(), case.dy, save="fp8")
    leaves = case.fresh()
    compiled = torch.compile(
        lambda leaves: case.fused(leaves, save="fp8"), backend="aot_eager", fullgraph=True
    )
    found = run(compiled, leaves, case.dy)
    for name, grad in eager.grads.items():
        if grad is not None:
            assert_same_bits(found.grads[name], grad, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_mlp_save_fp8_recomputed(device, reentrant):
    case = problem(device)
    expected = run(case.fused, case.fresh(), case.dy, save="fp8")

    def call(leaves):
        names = [name for name, t in leaves.items() if t is not None]

        def block(*tensors):
            inner = dict.fromkeys(leaves) | dict(zip(names, tensors, strict=True))
            return case.fused(inner, save="fp8")

        tensors = [leaves[name] for name in names]
        return torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=reentrant)

    found = run(call, case.fresh(), case.dy)
    for name, grad in expected.grads.items():
        if grad is not None:
            assert_same_bits(found.grads[name], grad, name)


def test_mlp_save_fp8_autocast(device):
    case = problem(device, dtype=torch.float32)
    leaves = case.fresh()
    with torch.autocast(device, torch.bfloat16):
        y = case.fused(leaves, save="fp8")
    y.backward(case.dy.bfloat16())
    low = problem(device)
    low.leaves = {n: None if t is None else t.bfloat16() for n, t in case.leaves.items()}
    low.dy = case.dy.bfloat16()
    expected = run(low.fused, low.fresh(), low.dy, save="fp8")
    for name, grad in expected.grads.items():
        if grad is not None:
            assert_same_bits(leaves[name].grad, grad.float(), name)


def one_row(device: str, activation: str) -> tuple[Problem, dict[str, torch.Tensor]]:
    """A token whose gradients at the biases are those of gate and up, and whose weight gradient of
    down is h, all of them in float32 before any FP8; gate, up and dh in float64."""
    features = 4096
    case = problem(
        device, (1, 32), features, 16, bias=True, recipe="rowwise_gw_hp", activation=activation
    )
    case.leaves = {n: t.float() for n, t in case.leaves.items()}
    for name in ("gate", "up"):
        case.leaves[f"{name}_bias"] *= torch.logspace(-6, 2, features, device=device)
    case.dy = torch.zeros(1, 16, device=device)
    case.dy[0, 0] = 1
    leaves = case.fresh()
    linear = fp8.ops.fused_linear
    gate, up = (
        linear(leaves["x"], leaves[n], leaves[f"{n}_bias"], "rowwise_gw_hp").detach()
        for n in ("gate", "up")
    )
    h = mlp_reference.activate(activation, gate, up).requires_grad_()
    linear(h, leaves["down"], leaves["down_bias"], "rowwise_gw_hp").backward(case.dy)
    exact = {"gate": gate, "up": up, "dh": h.grad}
    return case, {name: t.double()[0] for name, t in exact.items()}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_mlp_save_fp8_error(device, activation):
    """Derived: a code stands for g' with |g' - g| <= d(g) = max(|g| / 17, s 2^-10), s = amax / 448
    of its row: half of e4m3's distance from one number to the next, 2^-3 of a power of two, or 2^-9
    for the smallest. a = act has |a'| <= 1.14 and |a''| <= 0.81 (gelu's; silu's are
    1.10 and 0.5), so by the mean value theorem, with d_a = 1.14 d(g):
        dup = dh a(g)         is off by at most |dh| d_a
        dgate = dh u a'(g)    by |dh| (d(u) 1.14 + |u| 0.81 d(g))
        h = a(g) u            by (|a(g)| + d_a) d(u) + |u| d_a
    and float32, which computes them, adds 2^-20 of the magnitudes."""
    case, exact = one_row(device, activation)
    found = run(case.fused, case.fresh(), case.dy, save="fp8")
    gate, up, dh = (exact[name].clone().requires_grad_() for name in ("gate", "up", "dh"))
    h = mlp_reference.activate(activation, gate, up)
    dgate, dup = torch.autograd.grad((h * dh.detach()).sum(), (gate, up))
    g, u, dh = gate.detach(), up.detach(), dh.detach().abs()

    def error(t: torch.Tensor) -> torch.Tensor:
        return torch.maximum(t.abs() / 17, t.abs().max() / 448 * 2.0**-10)

    a, d_a = mlp_reference.ACTIVATIONS[activation](g).abs(), 1.14 * error(g)
    u_most = u.abs() + error(u)
    tiny = 2.0**-20
    bounds = {
        "up_bias": (dup, dh * (d_a + tiny * (a + d_a))),
        "gate_bias": (
            dgate,
            dh * (1.14 * error(u) + u_most * 0.81 * error(g) + tiny * 1.14 * u_most),
        ),
        "down": (h.detach(), (a + d_a) * error(u) + u.abs() * d_a + tiny * (a + d_a) * u_most),
    }
    for name, (value, bound) in bounds.items():
        grad = found.grads[name]
        off = ((grad[0] if name == "down" else grad).double() - value).abs()
        assert bool((off <= bound).all()), (name, (off / bound).max().item())
        assert bool((off > bound / 64).any()), name  # of the codes: what bf16 keeps is closer


@pytest.mark.parametrize("recipe", RECIPES)
def test_mlp_save_fp8_accuracy(device, recipe):
    """Errors against float64, beside those of save="bf16". Operands of e4m3, the finest there are,
    are rounded once each, with a relative variance v: a product has 2 v. The codes of g add v to
    dup, those of g and u about 2 v to dgate and h: 4 v at most, sqrt(2) times the error; 1.6 leaves
    room for the curvature of silu."""
    case = problem(device, (256, 128), 256, 128, recipe=recipe)
    exact = {n: None if t is None else t.double().requires_grad_() for n, t in case.leaves.items()}
    gate, up = (exact["x"] @ exact[n].t() for n in ("gate", "up"))
    (mlp_reference.activate("silu", gate, up) @ exact["down"].t()).backward(case.dy.double())
    kept = {save: run(case.fused, case.fresh(), case.dy, save=save) for save in ("bf16", "fp8")}
    for name in ("x", "gate", "up", "down"):
        errors = {
            save: (found.grads[name].double() - exact[name].grad).norm()
            for save, found in kept.items()
        }
        assert errors["fp8"] <= 1.6 * errors["bf16"], (name, errors["fp8"] / errors["bf16"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bias", ["gate_bias", "up_bias"])
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_mlp_save_fp8_what_is_not_finite_stays_so(device, bias, value, recipe):
    case = problem(device, bias=True, recipe=recipe)
    case.leaves[bias][5] = value
    found = run(case.fused, case.fresh(), case.dy, save="fp8").grads
    assert not found["x"].isfinite().any()
    assert not found["down"][:, 5].isfinite().any()


def test_mlp_save_fp8_other_rows_are_as_they_were(device):
    """A token that is not finite spoils its own row's codes alone."""
    case = problem(device, recipe="rowwise")
    clean = run(case.fused, case.fresh(), case.dy, save="fp8").grads["x"]
    case.leaves["x"][3, 7] = float("nan")
    found = run(case.fused, case.fresh(), case.dy, save="fp8").grads["x"]
    assert not found[3].isfinite().any()
    others = torch.arange(len(clean)) != 3
    assert_same_bits(found[others], clean[others])


def test_mlp_save_fp8_keeps_h_within_its_scale(device):
    """17.125 is kept as 18, in a row whose scale is 1, and was the largest h of the forward: with
    the scale of then, 18 saturates where 17.125 lies."""
    case = problem(device, (16, 16), 16, 16, form="plain", bias=True, activation="relu")
    case.leaves["gate"].zero_()
    bias = case.leaves["gate_bias"].zero_()
    bias[0], bias[1] = -448.0, 17.125
    assert stored(bias[None])[0, 1] == 18
    case.dy.zero_()
    case.dy[0] = 1
    for save in ("bf16", "fp8"):
        found = run(case.fused, case.fresh(), case.dy, save=save).grads["down"]
        assert bool((found[:, 1] == 17.125).all()), save
        assert not found[:, 0].any()
