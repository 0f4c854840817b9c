"""The fusion `siblings` of fp8.convert: found, applied by default, described, undone."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import sibling_models as models
import torch
from reference import assert_same_bits
from sibling_models import (
    Attention,
    Block,
    assert_close_step,
    convert,
    data,
    is_fused,
    pair,
    products,
)
from torch import nn

import fp8


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_siblings_are_one_product(recipe):
    fused, plain = pair(Block(), recipe)
    assert products(fused, data()) == ([3, 2], 2)
    assert products(plain, data()) == ([], 7)
    ours, theirs = models.step(fused, data()), models.step(plain, data())
    for name, value in ours.items():
        error = (value.float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert float(error) < 2**-3, name  # two roundings to fp8 in a row


@pytest.mark.parametrize("bias", [(True,) * 4, (True, False, True, False), (False,) * 4])
def test_siblings_rowwise_have_the_bits_of_their_own_products(bias):
    fused, plain = pair(Attention(bias))
    assert products(fused, data()) == ([3], 1)
    assert_close_step(fused, plain, data())


def test_siblings_tensorwise_are_the_joined_layer():
    """The values are those of merged_linear, and the same in every call."""
    fused, _ = pair(Attention(), "tensorwise")
    x = data()
    first = fused(x)
    shape = (2, 9, -1, 8)
    parts = fp8.ops.merged_linear(x, [fused.a.weight, fused.b.weight, fused.c.weight])
    q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
    assert_same_bits(first, fused.attend(q, k, v))
    assert_same_bits(first, fused(x))


def test_siblings_are_fused_by_default():
    model = Block().bfloat16()
    fp8.convert(model, filter=lambda *_: True)
    assert is_fused(model)
    assert is_fused(model.attention)
    assert isinstance(model.attention, Attention)
    assert type(model.attention).__name__ == "Attention"


@pytest.mark.parametrize("kinds", [False, ("norms",), ("mlp",), ()])
def test_siblings_turned_off(kinds):
    model = convert(Block(), kinds=kinds)
    assert not is_fused(model.attention)
    model = convert(convert(Block()), kinds=kinds)  # undone
    assert not is_fused(model)
    assert not is_fused(model.attention)
    assert products(model, data(dtype=torch.float32)) == ([], 7)


def test_siblings_of_an_mlp_that_is_one_node():
    """It is left to that; in either order."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    both = convert(Gated(), kinds=("mlp", "siblings"))
    later = convert(convert(Gated(), kinds=("siblings",)), kinds=("mlp", "siblings"))
    for model in (both, later):
        assert products(model, data(dtype=torch.float32)) == ([], 0)
        assert "fused: mlp, gated, silu" in fp8.summary(model)
        assert "siblings fused" not in fp8.summary(model)
        fp8.revert(model)
        assert type(model) is Gated
    only = convert(both, kinds=("siblings",))
    assert products(only, data(dtype=torch.float32)) == ([2], 1)


def test_siblings_in_the_summary():
    model = convert(Block())
    text = fp8.summary(model)
    assert "32 -> 32 + 16 + 16  float32  fused: siblings, a, b, c as one" in text
    assert "fused: siblings, gate, up as one" in text
    assert "2 siblings fused" in text
    model.attention.b.register_forward_hook(lambda *_: None)
    text = fp8.summary(model)
    assert "- (not fused: b has hooks)" in text
    assert "1 siblings fused" in text
    fp8.revert(model)
    assert "siblings" not in fp8.summary(model)


def test_siblings_partly_in_fp8():
    """Those that are in FP8 are computed together, if they are two."""
    model = Attention().bfloat16()
    fp8.convert(model, filter=lambda m, name: name != "a", fuse=("siblings",))
    assert products(model, data()) == ([2], 1)
    assert "siblings, b, c as one" in fp8.summary(model)
    model = nn.ModuleList([Attention(), Attention()]).bfloat16()
    fp8.convert(model, filter=lambda m, name: name not in ("0.b", "0.c"), fuse=("siblings",))
    assert not is_fused(model[0])
    assert "- (not fused: no two of a, b, c are in FP8)" in fp8.summary(model)


def test_siblings_revert_and_convert_again():
    model = Block().bfloat16()
    before = copy.deepcopy(model)
    keys = list(model.state_dict())
    convert(model)
    convert(model, "rowwise")
    assert products(model, data()) == ([3, 2], 2)
    assert list(model.state_dict()) == keys
    fp8.revert(model)
    assert type(model) is Block
    assert type(model.attention) is Attention
    assert vars(model.attention).keys() == vars(before.attention).keys()
    assert_same_bits(model(data()), before(data()))


def test_siblings_conversion_that_fails_changes_nothing(monkeypatch):
    model = Block()

    def fail(module):
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8.conversion._sibling_fusion.fused_class", lambda kind: fail(kind))
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert type(model) is Block
    assert type(model.attention.a) is nn.Linear


def test_siblings_copies():
    fused, _ = pair(Block(), "tensorwise")
    expected = fused(data())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (
        copy.deepcopy(fused),
        copy.copy(fused),
        pickle.loads(pickle.dumps(fused)),
        loaded,
    ):
        assert is_fused(other.attention)
        assert products(other, data()) == ([3, 2], 2)
        assert_same_bits(other(data()), expected)
    fp8.revert(loaded)
    assert type(loaded.attention) is Attention
    assert products(fused, data()) == ([3, 2], 2)


def test_siblings_a_copy_uses_its_own_weights():
    fused, _ = pair(Attention(), "tensorwise")
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other.c.weight.zero_()
    assert not bool(other(data()).any())
    assert bool(fused(data()).any())


def test_siblings_in_threads():
    """One model, several threads, inputs of their own."""
    fused, _ = pair(Block(), "tensorwise")
    inputs = [data() * (i + 1) for i in range(4)]
    expected = [fused(x) for x in inputs]
    failed = []

    def run(i: int) -> None:
        for _ in range(20):
            if not torch.equal(fused(inputs[i]), expected[i]):
                failed.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class Waits(Attention):
    """Two threads are between the calls of their first layer and of the others at a time."""

    barrier = threading.Barrier(2, timeout=60)

    def forward(self, hidden_states):
        q = self.a(hidden_states)
        self.barrier.wait()
        y = q[..., :16] + self.b(hidden_states) + self.c(hidden_states)
        self.barrier.wait()
        return y


def test_siblings_of_threads_that_take_turns():
    """What one computes for its layers is not the other's, and nothing is computed in vain."""
    fused, plain = pair(Waits())
    inputs = [data(), 2 * data()]
    results: dict[int, torch.Tensor] = {}

    def run(module: nn.Module, i: int) -> None:
        results[i] = module(inputs[i])

    found = []
    for module in (fused, plain):
        threads = [threading.Thread(target=run, args=(module, i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append([results.pop(i) for i in range(2)])
    for ours, theirs in zip(*found, strict=True):
        assert_same_bits(ours, theirs)
    assert "the others' input" not in fp8.summary(fused)


def test_siblings_train():
    """A step with an optimizer changes what the next computes."""
    fused, _ = pair(Block(), "tensorwise", torch.float32)
    x = data(dtype=torch.float32)
    optimizer = torch.optim.AdamW(fused.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (fused(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
