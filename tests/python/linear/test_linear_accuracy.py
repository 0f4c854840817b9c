"""Accuracy at a real layer's size on the GPU, and no worse than torchao's for the same recipe."""

from __future__ import annotations

import linear_reference
import pytest
import torch
from linear_reference import RECIPES
from reference import sqnr

pytestmark = pytest.mark.gpu
M, K, N = 8192, 4096, 4096

# torchao's name of each recipe that it has. Its rowwise scales are powers of two, ours are not.
TORCHAO_RECIPES = {
    "tensorwise": "tensorwise",
    "rowwise": "rowwise",
    "rowwise_gw_hp": "rowwise_with_gw_hp",
}


@pytest.fixture(scope="module")
def problem():
    """randn x, weight, dy in bf16 and the exact products, in fp64 on the GPU."""
    generator = torch.Generator("cuda").manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weight, dy = randn(M, K), randn(N, K), randn(M, N)
    x64, w64, dy64 = x.double(), weight.double(), dy.double()
    exact = {"y": x64 @ w64.t(), "dx": dy64 @ w64, "dw": dy64.t() @ x64}
    yield x, weight, dy, exact
    torch.cuda.empty_cache()


def ours(x, weight, dy, exact, recipe) -> dict[str, float]:
    result = linear_reference.run(x, weight, None, dy, recipe)._asdict()
    return {name: sqnr(result[name], value) for name, value in exact.items()}


def torchao(x, weight, dy, exact, recipe) -> dict[str, float]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(TORCHAO_RECIPES[recipe])
    linear = torch.nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    # The root module itself is not replaced in place, hence the container.
    model = convert_to_float8_training(torch.nn.Sequential(linear), config=config)
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    dx, dw = torch.autograd.grad(y, [leaf, model[0].weight], dy)
    actual = {"y": y.detach(), "dx": dx, "dw": dw}
    return {name: sqnr(actual[name], value) for name, value in exact.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_accuracy_of_y(problem, recipe, record_property):
    found = ours(*problem, recipe)
    record_property("sqnr_db", found)
    print(f"{recipe}: {found}")
    assert found["y"] >= 28.0, found


@pytest.mark.parametrize("recipe", list(TORCHAO_RECIPES))
def test_linear_accuracy_against_torchao(problem, recipe, record_property):
    pytest.importorskip("torchao", reason="torchao is not importable")
    found, theirs = ours(*problem, recipe), torchao(*problem, recipe)
    record_property("sqnr_db", {"fp8": found, "torchao": theirs})
    print(f"{recipe}: fp8 {found}, torchao {theirs}")
    for name in ("dx", "dw"):
        assert found[name] >= theirs[name] - 0.3, (name, found, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_of_a_real_size_composes_the_public_ops(problem, recipe):
    x, weight, dy, _ = problem
    bias = torch.randn(N, device="cuda", dtype=torch.bfloat16)
    actual = linear_reference.run(x, weight, bias, dy, recipe)
    expected = linear_reference.linear(x, weight, bias, dy, recipe)
    linear_reference.assert_matches(actual, expected, x, dy, recipe)
