"""Recipe `delayed` under activation checkpointing: a recomputation repeats the forward's bits, and
training with it is training without it."""

from __future__ import annotations

import copy

import pytest
import torch
from delayed_reference import WINDOW, is_delayed, layer_past_the_window, randn
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fp8


@pytest.fixture(autouse=True)
def _to_the_end():
    """A recomputation that stops early ends before the hooks of the last layer."""
    with set_checkpoint_early_stop(False):
        yield


KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])


class Block(nn.Module):
    """Three layers that read one tensor, as q, k and v do, and two that follow."""

    def __init__(self, device):
        super().__init__()
        new = lambda k, n: fp8.Linear(k, n, device=device, recipe="delayed", bias=n == 48)  # noqa: E731
        self.q, self.k, self.v = new(32, 32), new(32, 32), new(32, 32)
        self.up, self.down = new(32, 48), new(48, 32)

    def forward(self, x):
        h = torch.tanh(x) * 2
        h = self.q(h) * torch.sigmoid(self.k(h)) + self.v(h)
        return x + self.down(torch.relu(self.up(x + h)))


def outputs_of(model, into):
    def hook(module, args, output):
        into.setdefault(module, []).append(output.detach().clone())

    return [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, fp8.Linear)]


def jumping(step, device, tokens=24):
    """Inputs whose magnitude leaves the window in both directions, and vanishes."""
    factor = {25: 100.0, 26: 100.0, 30: 0.0, 40: 1e-3, 50: 300.0, 51: 1e-6}.get(step, 1.0)
    return (randn(tokens, 32, device=device) * factor).requires_grad_()


@KINDS
def test_training_is_that_without_checkpointing(device, reentrant):
    """Every output, recomputed ones too, every gradient and every update, bit for bit."""
    plain = nn.Sequential(Block(device), Block(device))
    checked = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (plain, checked)]
    for step in range(60):
        x = jumping(step, device)
        z = x.detach().clone().requires_grad_()
        seen, again = {}, {}
        for model, into in ((plain, seen), (checked, again)):
            model.hooks = outputs_of(model, into)
        plain(x).square().mean().backward()
        h = z
        for block in checked:
            h = checkpoint(block, h, use_reentrant=reentrant)
        h.square().mean().backward()
        for model in (plain, checked):
            for hook in model.hooks:
                hook.remove()
        for a, b in zip(plain.modules(), checked.modules(), strict=True):
            if not isinstance(a, fp8.Linear):
                continue
            assert len(again[b]) == 2, "it was recomputed"
            for output in again[b]:
                assert torch.equal(output, seen[a][0]), step
        assert torch.equal(x.grad, z.grad), step
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
            assert torch.equal(a, b), step


@KINDS
def test_micro_batches_that_wait_are_told_apart(device, reentrant):
    """Pipelines run several forwards before the first backward; backwards in either order."""
    layer = layer_past_the_window(device)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        seen = {}
        hooks = outputs_of(layer, seen)
        xs = [
            (f * randn(32, 64, dtype=torch.bfloat16, device=device)).requires_grad_()
            for f in (0.5, 100.0, 0.3, 9.0)
        ]
        ys = [checkpoint(layer, x, use_reentrant=reentrant) for x in xs]
        for i in order:
            ys[i].sum().backward()
        for hook in hooks:
            hook.remove()
        forwards, again = seen[layer][:4], seen[layer][4:]
        for i, output in zip(order, again, strict=True):
            assert torch.equal(output, forwards[i]), (order, i)


@KINDS
def test_micro_batches_of_one_amax_are_told_apart(device, reentrant):
    layer = layer_past_the_window(device)

    def batch(amax):
        x = randn(32, 64, dtype=torch.bfloat16, device=device)
        return (x.clamp(-2, 2) / 2 * amax).requires_grad_()

    seen = {}
    hooks = outputs_of(layer, seen)
    xs = [batch(amax) for amax in (3.0, 40.0, 3.0, 3.0)]  # the first: with another scale
    ys = [checkpoint(layer, x, use_reentrant=reentrant) for x in xs]
    for y in ys:
        y.sum().backward()
    for hook in hooks:
        hook.remove()
    for forward, again in zip(seen[layer][:4], seen[layer][4:], strict=True):
        assert torch.equal(forward, again)


def test_layers_share_nothing_that_a_forward_without_graph_did_not(device):
    """Under no_grad q, k and v scale one input each by a history of its own."""
    block = Block(device)
    for step in range(WINDOW + 4):  # k's and v's histories stay behind
        block(jumping(step, device) * (1 + step % 3)).sum().backward()
    for step in range(6):
        with torch.no_grad():
            block.k(torch.full((8, 32), 2.0 + step / 3, device=device))
        seen = {}
        hooks = outputs_of(block, seen)
        checkpoint(block, jumping(step, device), use_reentrant=True).sum().backward()
        for hook in hooks:
            hook.remove()
        for forward, again in seen.values():
            assert torch.equal(forward, again)


@KINDS
def test_a_recomputation_moves_no_window(device, reentrant):
    layer = layer_past_the_window(device)
    small = (randn(32, 64, dtype=torch.bfloat16, device=device) / 3).requires_grad_()
    for call in range(WINDOW - 1):
        x = small.detach().roll(call, 0).requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    x = small.detach()
    assert is_delayed(layer, x.roll(20, 0)), "the 16th call: the window has one more"
    assert not is_delayed(layer, x.roll(21, 0))


@KINDS
@pytest.mark.parametrize("calls", [3, 5, 12])
def test_a_layer_that_runs_often_in_a_step_while_its_weight_shrinks(device, calls, reentrant):
    """The same weight in each, though the window of amaxes moves on between the calls."""
    plain = fp8.Linear(32, 32, bias=False, device=device, recipe="delayed")
    checked = copy.deepcopy(plain)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=1e-2, weight_decay=4.0) for m in (plain, checked)
    ]
    for step in range(12):
        x = randn(24, 32, device=device)
        for layer, optimizer in zip((plain, checked), optimizers, strict=True):
            y = (x * 1).requires_grad_()
            for _ in range(calls):
                if layer is plain:
                    y = torch.tanh(plain(y * 2))
                else:
                    y = checkpoint(lambda z: torch.tanh(checked(z * 2)), y, use_reentrant=reentrant)
            y.square().mean().backward()
            optimizer.step()
        assert torch.equal(plain.weight.grad, checked.weight.grad), step
        for optimizer in optimizers:
            optimizer.zero_grad()


@KINDS
@pytest.mark.parametrize("waiting", [3, 5])
def test_pipelined_micro_batches_while_the_weight_shrinks(device, waiting, reentrant):
    plain = fp8.Linear(32, 32, bias=False, device=device, recipe="delayed")
    checked = copy.deepcopy(plain)
    for step in range(14):
        xs = [randn(24, 32, device=device) * 2.0 ** (i % 3) for i in range(waiting)]
        grads = []
        for layer in (plain, checked):
            leaves = [x.clone().requires_grad_() for x in xs]
            run = (
                layer
                if layer is plain
                else lambda x: checkpoint(checked, x, use_reentrant=reentrant)
            )
            outputs = [run(x) for x in leaves]
            for y in outputs:
                y.square().mean().backward()
            grads.append([layer.weight.grad.clone(), *(x.grad for x in leaves)])
            layer.zero_grad()
            with torch.no_grad():
                layer.weight.mul_(0.95)
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b), step


def test_a_layer_that_is_used_three_times_in_a_region(device):
    layer = layer_past_the_window(device, k=64, n=64)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    x = randn(32, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    seen = {}
    hooks = outputs_of(layer, seen)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    for hook in hooks:
        hook.remove()
    for forward, again in zip(seen[layer][:3], seen[layer][3:], strict=True):
        assert torch.equal(forward, again)


def test_a_forward_within_a_backward_that_repeats_nothing(device):
    """A hook may run a model: it has good scales, though it is taken for a recomputation."""
    layer = layer_past_the_window(device)
    results = []

    def run(grad):
        for factor in (1e-5, 1.0, 1e5):
            x = factor * randn(32, 64, dtype=torch.bfloat16, device=device)
            with torch.no_grad():
                results.append((layer(x), x.double() @ layer.weight.double().t()))

    x = randn(4, device=device).requires_grad_()
    y = x * 2
    y.register_hook(run)
    y.sum().backward()
    for found, exact in results:
        assert (found - exact).norm() < 0.05 * exact.norm()
