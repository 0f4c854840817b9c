"""mixture (fp8.integrations) against a loop over experts of the same products; corner cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fp8
from fp8.integrations.transformers._experts import mixture

HIDDEN, INNER, EXPERTS = 48, 32, 5


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def loop(x, index, weights, up, down, up_bias, down_bias, gate, recipe):
    """The same in plain words, one expert after the other, each token once per choice."""
    y = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for expert in range(up.shape[0]):
        token, choice = torch.where(index == expert)
        if token.numel() == 0:
            continue
        h = fp8.ops.fused_linear(
            x[token], up[expert], None if up_bias is None else up_bias[expert], recipe
        )
        h = fp8.ops.fused_linear(
            gate(h), down[expert], None if down_bias is None else down_bias[expert], recipe
        )
        y = y.index_add(0, token, h.double() * weights[token, choice, None].double())
    return y.to(x.dtype)


class Case:
    """Leaves of one problem; calls of them."""

    def __init__(self, tokens: int, top_k: int, bias: bool = False, device: str = "cpu"):
        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape).to(device).requires_grad_()

        self.x, self.weights = leaf(tokens, HIDDEN), leaf(tokens, top_k)
        self.up, self.down = leaf(EXPERTS, 2 * INNER, HIDDEN), leaf(EXPERTS, HIDDEN, INNER)
        self.up_bias = leaf(EXPERTS, 2 * INNER) if bias else None
        self.down_bias = leaf(EXPERTS, HIDDEN) if bias else None
        scores = torch.rand(tokens, EXPERTS)
        self.index = scores.topk(top_k).indices.to(device) if tokens else None
        if self.index is None:
            self.index = torch.empty(0, top_k, dtype=torch.int64, device=device)

    def leaves(self) -> list[Tensor]:
        every = (self.x, self.weights, self.up, self.down, self.up_bias, self.down_bias)
        return [leaf for leaf in every if leaf is not None]

    def run(self, function, dy: Tensor, recipe: str = "rowwise") -> list[Tensor]:
        y = function(
            self.x, self.index, self.weights, self.up, self.down, self.up_bias, self.down_bias,
            swiglu, recipe,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, self.leaves(), dy)]


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "rowwise:power_of_two"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts_mixture_is_a_loop_of_linears(top_k, bias, recipe):
    """Same products of the same codes: what differs is the order of sums, 2^-20, which now and then
    moves a value to the next code: 2^-4 of one in thousands."""
    case, dy = Case(37, top_k, bias), torch.randn(37, HIDDEN)
    ours, expected = case.run(mixture, dy, recipe), case.run(loop, dy, recipe)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert float((a - b).norm()) < 3e-3 * float(b.norm()), i


def test_experts_mixture_with_an_expert_that_gets_nothing():
    case, dy = Case(16, 2), torch.randn(16, HIDDEN)
    case.index = case.index.clamp(max=EXPERTS - 2)
    _, _, _, d_up, d_down = case.run(mixture, dy)
    assert float(d_up[-1].abs().max()) == float(d_down[-1].abs().max()) == 0
    assert float(d_up[0].abs().max()) > 0


def sentinels(device: str) -> None:
    """Choices of experts that live elsewhere: with and without them the rest is the same, bit for
    bit, and what lies in their rows, NaN even, is not seen."""
    case, dy = Case(24, 2, bias=True, device=device), torch.randn(24, HIDDEN).to(device)
    elsewhere = torch.zeros(24, 2, dtype=torch.bool, device=device)
    elsewhere[::3, 0] = elsewhere[::5, 1] = elsewhere[4] = True
    case.index[elsewhere] = EXPERTS
    y, dx, d_weights, *others = case.run(mixture, dy)
    for grad in (y, dx, d_weights, *others):
        assert bool(grad.isfinite().all())
    assert float(y[4].abs().max()) == float(dx[4].abs().max()) == 0  # neither choice is ours
    assert float(d_weights[elsewhere].abs().max()) == 0
    with torch.no_grad():
        case.x[4] = float("nan")
    again = case.run(mixture, dy)
    for before, after in zip((y, dx, d_weights, *others), again, strict=True):
        assert torch.equal(before, after)
    case.index[case.index == EXPERTS] = EXPERTS + 7  # any id past the last
    assert torch.equal(case.run(mixture, dy)[0], y)


def test_experts_mixture_sentinels():
    sentinels("cpu")


@pytest.mark.gpu
def test_experts_mixture_sentinels_on_a_gpu():
    sentinels("cuda")


def test_experts_mixture_where_all_experts_are_elsewhere():
    case, dy = Case(8, 2), torch.randn(8, HIDDEN)
    case.index.fill_(EXPERTS)
    for result in case.run(mixture, dy):
        assert float(result.abs().max()) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_mixture_without_tokens(device):
    case = Case(0, 2, bias=True, device=device)
    y, dx, d_weights, *others = case.run(mixture, torch.empty(0, HIDDEN, device=device))
    assert (y.shape, dx.shape, d_weights.shape) == ((0, HIDDEN), (0, HIDDEN), (0, 2))
    assert all(float(grad.abs().max()) == 0 for grad in others)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_mixture_takes_any_integers(dtype):
    case, dy = Case(9, 3), torch.randn(9, HIDDEN)
    expected = case.run(mixture, dy)
    case.index = case.index.to(dtype)
    assert all(map(torch.equal, case.run(mixture, dy), expected))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_mixture_is_deterministic(device):
    case, dy = Case(200, 4, device=device), torch.randn(200, HIDDEN).to(device)
    first = case.run(mixture, dy)
    for _ in range(5):
        assert all(map(torch.equal, case.run(mixture, dy), first))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp"])
def test_experts_mixture_on_a_gpu_is_that_of_the_cpu(recipe):
    """The same codes to begin with. A GPU rounds products to bf16, d = 0.15% rms, which moves d / s
    of the values over a rounding point, by a step of s = 9%: sqrt(d·s) = 1.2% rms of what is
    quantized next, 1.6% after two such roundings. Twice that is allowed."""
    case, dy = Case(300, 2, bias=True), torch.randn(300, HIDDEN)
    expected = case.run(mixture, dy, recipe)
    for name in ("x", "weights", "up", "down", "up_bias", "down_bias"):
        setattr(case, name, getattr(case, name).detach().cuda().requires_grad_())
    case.index = case.index.cuda()
    for i, (a, b) in enumerate(zip(case.run(mixture, dy.cuda(), recipe), expected, strict=True)):
        assert float((a.cpu() - b).norm()) < 0.032 * float(b.norm()), i
