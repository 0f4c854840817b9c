"""The figures of fp8.numerics: what the products saw, and what is computed of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from watched_models import RECIPES, K, batch, blocks, by_operand, modules, watched_step

import fp8
from fp8.tools import _observations
from fp8.tools._numerics_sums import Sums
from fp8.tools._quantization import SUMS, Format, measure, quantize


@pytest.fixture
def seen(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Every operand that is measured, and what its codes stand for."""
    found = []

    def watch(x: Tensor, data: Tensor, scale: Tensor, *how: Any) -> Tensor:
        found.append((x, fp8.ops.dequantize(data, scale, torch.float32)))
        return measure(x, data, scale, *how)

    monkeypatch.setattr(_observations, "measure", watch)
    return found


def assert_product(result: Tensor, a: Tensor, b: Tensor) -> None:
    """result = a · bᵀ, of decoded operands: fp32 sums of K products, rounded to bfloat16 once."""
    exact = a.double() @ b.double().t()
    bound = 2**-8 * exact.abs() + 2**-24 * a.size(1) * (a.abs().double() @ b.abs().double().t())
    assert (result.double() - exact).abs().le(bound).all()


@pytest.mark.parametrize("recipe", [*RECIPES, "tensorwise:power_of_two", "rowwise:power_of_two"])
@pytest.mark.parametrize("scaling", ["own", "static"])
def test_numerics_measures_what_the_products_read(recipe, scaling, seen):
    granularity = fp8.recipe.check_recipe(recipe).granularity
    if scaling == "static" and granularity != "tensorwise":
        pytest.skip("static scales are for tensorwise")
    layer = fp8.Linear(K, 48, bias=False, dtype=torch.bfloat16, recipe=recipe)
    if scaling == "static":
        layer.input_scale = torch.tensor(2.0**-8)  # of |x| up to 1.75
    for i in range(18):  # past the window of delayed scaling
        x = (batch(seed=i) * (1 + i % 3)).flatten(0, 1).requires_grad_()
        layer.zero_grad()
        seen.clear()
        with fp8.numerics(layer) as found:
            y = layer(x)
            y.backward(torch.randn_like(y))
    decoded = {}
    assert len(seen) == len(found.rows)
    for row, (_, values) in zip(found.rows, seen, strict=True):
        decoded[row.operand, row.product] = values
    assert_product(y.detach(), decoded["x", "fprop"], decoded["weight", "fprop"])
    wt = decoded.get(("weight", "dgrad"), decoded["weight", "fprop"].t())
    assert_product(x.grad, decoded["dy", "dgrad"], wt)
    if layer.recipe.startswith("rowwise_gw_hp") or "fast_gw_hp" in layer.recipe:
        assert ("x", "wgrad") not in decoded
        return
    xt = decoded.get(("x", "wgrad"), decoded["x", "fprop"].t())
    dyt = decoded.get(("dy", "wgrad"), decoded["dy", "dgrad"].t())
    assert_product(layer.weight.grad, dyt, xt)
    assert {row.scaling for row in found.rows if row.operand == "x"} == {
        "static" if scaling == "static" else fp8.recipe.check_recipe(recipe).scaling
    }


def test_numerics_measures_a_tensor_that_comes_again_with_its_own_scale(seen):
    """The newest record of a history is another one's."""
    layer = fp8.Linear(K, 48, bias=False, dtype=torch.bfloat16, recipe="delayed")
    with torch.no_grad():
        for i in range(18):
            layer(batch(seed=i))
        first, second = batch(seed=90).flatten(0, 1), 100 * batch(seed=91).flatten(0, 1)
        for x in (first, second, first):
            seen.clear()
            with fp8.numerics(layer):
                y = layer(x)
    (_, x), (_, weight) = seen
    assert_product(y, x, weight)
    data, scale = fp8.ops.quantize_tensorwise(first)
    assert not torch.equal(x, fp8.ops.dequantize(data, scale, torch.float32))  # it is delayed


def test_numerics_adds_up_in_any_mode():
    """Totals that were begun in inference mode are written outside of it."""
    sums, key = Sums(), _observations.Key("a", "x", "fprop", "tensorwise", "e4m3", "dynamic")
    with torch.inference_mode():
        sums.add(key, torch.ones(len(SUMS), dtype=torch.float64))
    sums.add(key, torch.ones(len(SUMS), dtype=torch.float64))
    (found,) = sums.rows()
    assert found.calls == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise", "1x128", "128x128"])
def test_numerics_sums_follow_their_definitions(dtype, granularity):
    x = torch.randn(300, 200) * torch.logspace(-8, 3, 300).view(-1, 1)
    x[5, 7], x[6] = 0.0, 0.0
    data, scale = quantize(x, Format(dtype, granularity))
    (sums,) = measure(x, data, scale).tolist()
    got = dict(zip(SUMS, sums, strict=True))
    decoded = fp8.ops.dequantize(data, scale, torch.float32).double()
    assert got["amax"] == x.abs().max().item()
    assert got["signal"] == pytest.approx(x.double().square().sum().item(), rel=1e-12)
    assert got["noise"] == pytest.approx((x.double() - decoded).square().sum().item(), rel=1e-6)
    assert got["nonzero"] == (x != 0).sum().item()
    assert got["flushed"] == ((x != 0) & (decoded == 0)).sum().item()
    assert got["elements"] == x.numel()
    assert got["saturated"] == got["nonfinite"] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numerics_saturated_is_past_half_a_step(dtype):
    largest, half = (448.0, 16.0) if dtype is torch.float8_e4m3fn else (57344.0, 4096.0)
    x = torch.tensor([[1.0, largest, largest + half, -largest - 1.01 * half, math.inf, math.nan]])
    data, scale = quantize(x, Format(dtype, "tensorwise"), scale=torch.tensor(1.0))
    got = dict(zip(SUMS, measure(x, data, scale)[0].tolist(), strict=True))
    assert (got["saturated"], got["nonfinite"], got["elements"]) == (1, 2, 6)
    assert got["amax"] == pytest.approx(largest + 1.01 * half)


@pytest.mark.parametrize("dim", [0, 1])
def test_numerics_parts_are_measured_as_if_alone(dim, monkeypatch):
    """In blocks of rows as in one."""
    monkeypatch.setattr("fp8.tools._quantization._ELEMENTS", 4096)
    x = torch.randn(700, 60) * torch.logspace(-3, 1, 60)
    data, scale = quantize(x, Format(torch.float8_e4m3fn, "tensorwise"))
    sizes = [1, 130, 0, 569] if dim == 0 else [17, 0, 43]
    together = measure(x, data, scale, sizes, dim)
    start = 0
    for size, sums in zip(sizes, together, strict=True):
        alone = measure(x.narrow(dim, start, size), data.narrow(dim, start, size), scale)
        assert torch.allclose(sums, alone[0], rtol=1e-12, atol=0)
        start += size
    assert torch.allclose(together[:, 1:].sum(0), measure(x, data, scale)[0, 1:], rtol=1e-12)


def test_numerics_amax_of_a_history_gives_the_codes_of_its_scale():
    """Not those of a scale that was divided twice."""
    x = torch.randn(64, 48)
    for amax in torch.rand(50) * 4 + x.abs().max():
        data, scale = quantize(x, Format(torch.float8_e4m3fn, "tensorwise"), amax=amax)
        multiplier = torch.div(torch.tensor(448.0), amax)
        expected = (x * multiplier).to(torch.float8_e4m3fn)
        assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
        assert scale == 1 / multiplier


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("kinds", [("mlp",), ("siblings",), ("mlp", "siblings")])
def test_numerics_of_fused_layers_are_those_of_single_ones(recipe, reentrant, kinds):
    """Of an MLP as one node: h and its gradients are made on the way. Siblings share their scale
    where it is one per tensor, so those are compared with a scale per row alone."""
    if "siblings" in kinds and fp8.RECIPES[recipe].granularity != "rowwise":
        pytest.skip("siblings with a scale per row")
    fused = _first_block(blocks(recipe, fuse=kinds, reentrant=reentrant))
    single = _first_block(blocks(recipe, fuse=(), reentrant=reentrant))
    assert fused.keys() == single.keys()
    for key in fused:
        if "mlp" in kinds and key[0].startswith("attention") and key[1] == "dy":
            continue  # what reaches it went through gate and up, summed in one product
        if kinds == ("siblings",) and key[1:] not in (("x", "fprop"), ("weight", "fprop")):
            continue  # dx is contracted over all of them: with scales of its own
        if key[0] in SIBLINGS and key[1:] == ("weight", "dgrad"):
            continue  # the same
        assert fused[key] == single[key], key


SIBLINGS = ("attention.q", "attention.k", "attention.v")


def _first_block(model):
    return by_operand(watched_step(model.first, batch()))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("activation", "gated"),
    [("gelu", False), ("gelu_tanh", True), ("relu", True), ("relu_squared", False)],
)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
def test_numerics_knows_every_activation(recipe, activation, gated, save):
    """The block as one node against layer by layer, which a hook makes it."""
    found = []
    for apart in (False, True):
        torch.manual_seed(8)
        kind = fp8.GatedMLP if gated else fp8.MLP
        block = kind(K, 48, activation, recipe=recipe, save=save, dtype=torch.bfloat16)
        if apart:
            block.get_submodule("down_proj" if gated else "fc2").register_forward_hook(
                lambda module, args, result: None
            )
        found.append(by_operand(watched_step(block, batch(), batch(seed=6))))
    together, apart = found
    unreached = save == "recompute" and recipe == "delayed"
    for key in apart:
        if unreached and key[1] == "dy" and not key[0].startswith(("down", "fc2")):
            assert key not in together
            continue
        # A second tensor passes its history where the first one's scale is remembered.
        assert together[key] == apart[key], key


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
@pytest.mark.parametrize("gated", [True, False])
def test_numerics_of_products_kept_as_codes(recipe, gated, seen):
    """The forward's operands are those of save="bf16"; the backward's are made of the codes: h, of
    which down's weight gradient is made where rows have scales, and the gradients of gate and up,
    which are those of the operator."""
    torch.manual_seed(8)
    kind = fp8.GatedMLP if gated else fp8.MLP
    block = kind(K, 48, "silu", bias=True, recipe=recipe, dtype=torch.bfloat16, save="fp8")
    blocks = {"bf16": copy.deepcopy(block), "fp8": block}
    blocks["bf16"].save = "bf16"
    found, operands, grads = {}, {}, {}
    for save, twin in blocks.items():
        seen.clear()
        with fp8.numerics(twin) as watched:
            twin(batch()).square().sum().backward()
        found[save] = by_operand(watched)
        operands[save] = [t for x, _ in seen for t in (x, x.t())]
        grads[save] = {n: p.grad for n, p in twin.named_parameters()}
    for key, row in found["bf16"].items():
        if key[2] == "fprop":
            assert found["fp8"][key] == row, key
    x = batch().flatten(0, 1)
    first = (block.gate_proj, block.up_proj) if gated else (block.fc1,)
    gate, *up = (_stored(layer(x).detach()) for layer in first)
    h = F.silu(gate) * up[0] if gated else F.silu(gate)
    if recipe == "rowwise":
        assert any(torch.equal(t, h) for t in operands["fp8"])
    for name, grad in grads["fp8"].items():
        if name.endswith("bias") and not name.startswith(("down", "fc2")):
            assert any(_sums_to(t, grad) for t in operands["fp8"]), name
            assert not any(_sums_to(t, grad) for t in operands["bf16"]), name


def _sums_to(t: Tensor, grad: Tensor) -> bool:
    """Whether the columns of t, added in float32, give this bfloat16."""
    if t.shape[1:] != grad.shape:
        return False
    off = (t.double().sum(0) - grad.double()).abs()
    return bool((off <= 2**-8 * grad.double().abs() + 2**-20 * t.double().abs().sum(0)).all())


def _stored(t: Tensor) -> Tensor:
    return fp8.ops.dequantize(*fp8.ops.quantize_rowwise(t), t.dtype)


def test_numerics_of_a_clamped_gate():
    """gpt-oss': against autograd of the formula."""
    from fp8.tools import _mlp_values

    gate, up, dh = (torch.randn(40, 24, dtype=torch.bfloat16) * s for s in (6, 6, 1))
    a = {"activation": "clamped_silu", "alpha": 1.702, "limit": 7.0, "up": up, "form": 1}
    gate.requires_grad_(), up.requires_grad_()
    h = _mlp_values.hidden(a, gate, up)
    expected = torch.autograd.grad(h, (gate, up), dh)
    got = _mlp_values._unit_backward(a, gate.detach(), up.detach(), dh)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_numerics_of_siblings_share_a_scale():
    """The weights one below the other: the small one is measured with the large one's scale."""
    layers = fp8.MergedLinear(K, {"small": 16, "large": 16}, False, dtype=torch.bfloat16)
    with torch.no_grad():
        layers.large.weight.mul_(2.0**14)
    found = by_operand(watched_step(_Parts(layers), batch()))
    small = found["layers.small", "weight", "fprop"]
    data, scale = fp8.ops.quantize_tensorwise(
        torch.cat([layers.small.weight, layers.large.weight]).detach()
    )
    decoded = fp8.ops.dequantize(data, scale, torch.float32)[:16].double()
    w = layers.small.weight.detach().double()
    expected = 10 * math.log10(w.square().sum() / (w - decoded).square().sum())
    assert small.sqnr_db.mean == pytest.approx(expected, rel=1e-9)
    assert small.amax.max == layers.small.weight.abs().max().item()
    assert small.sqnr_db.mean < found["layers.large", "weight", "fprop"].sqnr_db.mean - 1


class _Parts(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        a, b = self.layers(x)
        return a + b


def test_numerics_leaves_rows_of_no_group_out():
    model = modules("rowwise").grouped
    x = batch()
    large = x.clone()
    large.view(-1, K)[-2:] = 1e4  # behind the last offset
    first, second = (by_operand(watched_step(model, v)) for v in (x, large))
    assert first["experts", "x", "fprop"] == second["experts", "x", "fprop"]
    assert first["experts", "x", "fprop"].amax.max < 100
