"""fp8.convert fuses residual sums with the norms that read them: same bits, fewer passes, and the
class's own code where something is in the way."""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest
import residual_layers as layers
import torch
from reference import assert_same_bits
from residual_layers import Calls, assert_same_step, data, fuse, is_fused, line_of, pair, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.conversion import _residual_fusion
from fp8.nn import _fused_classes, _fused_norms, _fused_residuals

CALLS = {
    layers.Llamas: ["join", "add"],
    layers.Short: ["join", "add"],
    layers.Dropped: ["join", "add"],
    layers.Layers: ["join", "join"],
    layers.Thirds: ["add"],
    layers.Decorated: ["join", "add"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", CALLS)
def test_bits_are_those_of_fused_norms(monkeypatch, device, kind, dtype):
    fused, plain = pair(kind(), dtype, device)
    calls, x = Calls(monkeypatch), data(device, dtype)
    assert calls.during(assert_same_step, fused, plain, x) == CALLS[kind]
    assert is_fused(fused)
    assert not is_fused(plain)


@pytest.mark.parametrize("kind", [layers.Llamas, layers.Layers])
def test_without_gradients(monkeypatch, kind):
    fused, plain = pair(kind())
    calls, x = Calls(monkeypatch), data()
    expected = [] if kind is layers.Layers else ["add"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits(fused(x), plain(x), "y")
            assert calls.during(fused, x) == expected
    for parameter in (*fused.parameters(), *plain.parameters()):
        parameter.requires_grad_(False)
    assert calls.during(fused, x) == expected  # nothing joins what no gradient reaches


@pytest.mark.parametrize("frozen", ["first.weight", "second.weight", "mixer.weight", "all"])
def test_frozen_parts(frozen):
    fused, plain = pair(layers.Llamas())
    for module in (fused, plain):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in (name, "all"))
    assert_same_step(fused, plain, data())


def test_a_weight_that_is_wider(monkeypatch):
    """y has the wider dtype, and the sum that of its terms."""
    fused, plain = (m.bfloat16() for m in pair(layers.Llamas(), torch.float32))
    for module in (fused, plain):
        for norm in (module.first, module.second):
            norm.float()
        module.mixer.float()
        module.mlp.float()
    calls = Calls(monkeypatch)
    assert calls.during(assert_same_step, fused, plain, data()) == ["join"]  # the sum is float32


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [layers.Llamas, layers.Dropped, layers.Layers])
def test_checkpointed(kind, reentrant):
    fused, plain = pair(kind())
    expected = step(plain, data())
    ours = step(_Checkpointed(fused, reentrant), data())
    for name, value in expected.items():
        assert_same_bits(ours[name if name in ours else f"layer.{name}"], value, name)


class _Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def test_autocast(device):
    fused, plain = pair(layers.Llamas(), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        assert_same_step(fused, plain, data(device, torch.float32))
    fused, plain = pair(layers.Layers(), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        assert_same_step(fused, plain, data(device))


def test_compiled():
    fused, plain = pair(layers.Llamas(), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    ours, theirs = step(compiled, data(dtype=torch.float32)), step(plain, data(dtype=torch.float32))
    assert_same_bits(ours["y0"], theirs["y0"], "y")
    assert_same_bits(ours["dx"], theirs["dx"], "dx")


def test_summary_and_revert():
    model = nn.ModuleList([layers.Llamas(), layers.Layers(), layers.Thirds()])
    kinds = [type(m) for m in model.modules()]
    names, first = dict(model.named_parameters()), model[0]
    fuse(model)
    assert model[0] is first
    assert all(p is names[n] for n, p in model.named_parameters())
    assert type(first).__name__ == "Llamas"
    *lines, last = fp8.summary(model).splitlines()
    rows = [line.split("fused: ")[1] for line in lines if "residual" in line]
    assert rows == ["residual, second, first", "residual, second, first", "residual, second"]
    assert last == "3 residual fused"
    fuse(model, {"norms"})
    assert not any(map(is_fused, model))
    fuse(model)
    fp8.revert(model)
    assert [type(m) for m in model.modules()] == kinds


def test_norms_that_are_not_fused():
    """The fusion is of norms that run fused; alone it finds none."""
    model = fuse(nn.ModuleList([layers.Llamas()]), {"residual"})
    assert not is_fused(model[0])
    model = fuse(nn.ModuleList([layers.Llamas(), layers.Llamas()]))
    fp8.revert(model[0].second)
    fp8.revert(model[1].first)
    fp8.revert(model[1].second)
    text = fp8.summary(model)
    assert "fused: residual, second (not: second is not fused), first" in text
    assert "- (not fused: second is not fused)" in text
    assert "1 residual fused" in text


def test_default_is_all_of_them():
    model = fp8.convert(layers.Llamas(), filter=lambda *_: True)
    assert is_fused(model)
    fp8.convert(model, filter=lambda *_: True, fuse=False)
    assert type(model) is layers.Llamas


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(monkeypatch, how):
    fused, plain = pair(layers.Llamas())
    made = pickle.loads(pickle.dumps(fused)) if how == "pickle" else copy.deepcopy(fused)
    assert type(made) is type(fused)
    assert b"fp8" in pickle.dumps(fused)
    assert Calls(monkeypatch).during(assert_same_step, made, plain, data()) == ["join", "add"]


def test_class_whose_forward_is_replaced(monkeypatch):
    class Mine(layers.Llamas):
        pass

    fused, _ = pair(Mine())
    assert is_fused(fused)
    with monkeypatch.context() as patch:
        patch.setattr(layers.Llamas, "forward", lambda self, x: x + 1)
        assert_same_bits(fused(data()), data() + 1, "y")
        assert "- (not fused: its class's forward was replaced)" in fp8.summary(fused)
    calls = Calls(monkeypatch)
    assert calls.during(fused, data().requires_grad_()) == ["join", "add"]
    with monkeypatch.context() as patch:
        patch.setattr(layers.Llamas.forward, "__code__", (lambda self, x: x + 2).__code__)
        patch.setattr(layers.Llamas.forward, "__defaults__", ())
        assert_same_bits(fused(data()), data() + 2, "y")


def test_forward_of_the_instance():
    module = layers.Llamas()
    module.forward = lambda x: x
    fuse(module)
    assert not is_fused(module)
    fused, _ = pair(layers.Llamas())
    fused.forward = lambda x: x
    assert_same_bits(fused(data()), data(), "y")
    assert "its forward was replaced on the instance" in fp8.summary(fused)


def test_other_layers_of_the_class_keep_theirs(monkeypatch):
    _, other = pair(layers.Llamas()), layers.Llamas().bfloat16()
    assert Calls(monkeypatch).during(other, data()) == []


def test_made_of_a_fused_class(monkeypatch):
    """A class of FSDP2's, or one that a program derives."""
    fused, plain = pair(layers.Llamas())
    fused.__class__ = type("Sharded", (type(fused),), {})
    assert Calls(monkeypatch).during(assert_same_step, fused, plain, data()) == ["join", "add"]
    fuse(fused)
    assert type(fused).__name__ == "Sharded"
    with pytest.warns(UserWarning, match="made of a fused one"):
        fp8.revert(fused)


def test_tracebacks_show_the_classes_own_lines():
    fused, _ = pair(layers.Llamas())
    with pytest.raises(RuntimeError) as caught:
        fused(data()[..., :7])
    fused.mlp = nn.Linear(3, 3)
    with pytest.raises(RuntimeError) as later:
        fused(data())
    own = layers.Llamas.forward
    for error, text in ((caught, "self.first("), (later, "self.mlp(")):
        frames = traceback.extract_tb(error.value.__traceback__)
        lines = [f.lineno for f in frames if f.filename == own.__code__.co_filename]
        assert line_of(own, text) in lines


def test_below_what_else_is_fused(monkeypatch):
    """Whatever came first; each undone by itself."""
    mark, made = "_test_from", {}

    def doubled(base):
        def forward(self, *args, **kwargs):
            return 2 * base.forward(self, *args, **kwargs)

        if base not in made:
            begin = lambda base: doubled(base).__new__(doubled(base))  # noqa: E731
            made[base] = _fused_classes.subclass(base, mark, forward, begin)
        return made[base]

    for first in (True, False):
        module = layers.Llamas().bfloat16()
        if first:
            fuse(module)
        else:
            fuse(module, {"norms"})
        module.__class__ = doubled(type(module))
        fuse(module)
        base = _fused_classes.made_from(type(module), mark)
        assert _fused_residuals.original(base) is layers.Llamas
        assert Calls(monkeypatch).during(module, data().requires_grad_()) == ["join", "add"]
        assert _residual_fusion.undo(module) is None
        assert type(module) is doubled(layers.Llamas)


def test_sums_of_a_stream_that_others_read(monkeypatch):
    """The sum's gradient from elsewhere counts, and one without gradient too."""
    fused, plain = pair(layers.Llamas())
    results = []
    for module in (fused, plain):
        x = data().requires_grad_()
        hidden = 1 * x
        y = module(hidden)
        (y.float().square().mean() + hidden.float().square().sum() * 0).backward()
        results.append(x.grad)
    assert_same_bits(*results, "dx")
    norm = fused.second
    a, b = (data().requires_grad_() for _ in range(2))
    (y,), total = fused._fp8_add_norm("second", a, b)
    assert torch.autograd.grad(total.sum(), [a, norm.weight], allow_unused=True)[1] is None
    assert _fused_norms.SPEC in vars(norm)


def rotate(q, k, cos, sin):
    """As Llama's apply_rotary_pos_emb."""

    def half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


class Rotates(layers.Llamas):
    """Whose own forward rotates too."""

    def forward(self, x, cos, sin):
        y = self.first(x).view(2, 1, 9, layers.K)
        q, k = rotate(y, y + 1, cos, sin)
        x = x + (q * k).view(2, 9, layers.K)
        y = self.second(x)
        return x + y


@pytest.mark.parametrize("first", ["rope", "residual", "both"])
def test_layer_that_rotates(first):
    """Another fusion has its forward, whichever came first: no sum is fused, and all is right."""
    module = Rotates().bfloat16()
    plain = fuse(copy.deepcopy(module), {"norms"})
    model = nn.ModuleList([module, layers.Llamas()])
    if first != "both":
        fuse(model, {"norms", first})
    fuse(model, {"norms", "residual", "rope"})
    line = fp8.summary(model).splitlines()[1]
    assert "fused: rope, halves; - (not fused: its " in line
    cos, sin = (torch.randn(2, 1, 9, layers.K).bfloat16() for _ in range(2))
    assert_same_bits(module(data(), cos, sin), plain(data(), cos, sin), "y")
    fp8.revert(model)
    assert type(module) is Rotates
