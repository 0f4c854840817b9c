"""fp8.convert's fusion of rotary position embedding: what is recognized, what is left alone, and
what a call needs."""

from __future__ import annotations

import copy

import pytest
import rope_modules as modules
import torch
from reference import assert_same_bits
from rope_modules import MODULES, POSITIONS, SIZE, Attention, calls_of, fuse, inputs, is_fused, step
from torch import nn

import fp8
from fp8.nn import _rope_probe, _rotations

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_same_step(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b, f"result or gradient {i}")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_fused_with_the_same_bits(monkeypatch, device, name, dtype):
    module = MODULES[name]().to(device, dtype)
    plain, kind, state = copy.deepcopy(module), type(module), module.state_dict()
    parameters = dict(module.named_parameters())
    assert fuse(module) is module
    assert is_fused(module)
    assert isinstance(module, kind)
    assert type(module).__name__ == kind.__name__
    assert list(module.state_dict()) == list(state)
    assert all(p is parameters[n] for n, p in module.named_parameters())
    given = inputs(dtype, device)
    seen = calls_of(monkeypatch)
    ours = step(module, given)
    assert len(seen) == {"Single": 2, "Supers": 1}.get(name, 1)
    assert_same_step(ours, step(plain, given))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [modules.llamas, modules.cats, modules.wide, modules.single])
def test_function_of_wide_angles_is_replaced(monkeypatch, device, x_dtype, function):
    """As in autocast, where q and k are narrow and cos and sin are not."""
    q, k = (torch.randn(2, 5, n, 16, device=device).to(x_dtype).transpose(1, 2) for n in (3, 1))
    cos, sin = torch.randn(2, 2, 5, 16, device=device)
    spec = _rope_probe.probe(function)
    tensors = (q, k) if spec.k else (q,)
    call = _rotations._call_of(function, _rotations.rotation_of(function))
    results, seen = [], calls_of(monkeypatch)
    for run in (lambda *args: call(function, *args), function):
        leaves = [x.detach().requires_grad_() for x in tensors]
        made = run(*leaves, cos, sin)
        made = made if isinstance(made, tuple) else (made,)
        assert len(seen) == 1
        torch.manual_seed(3)
        grads = [torch.randn(y.shape, device=device).to(y.dtype) for y in made]
        results.append([*made, *torch.autograd.grad(made, leaves, grads)])
    assert_same_step(*results)
    for a, b, _ in zip(*results, tensors, strict=False):
        assert a.stride() == b.stride()


@pytest.mark.parametrize(
    "name", ["backwards", "detached", "in_place", "listed", "noisy", "rotate_half", "rotate_pairs"]
)
def test_other_functions_are_not_taken_for_one(name):
    function = getattr(modules, name)
    state = torch.get_rng_state()
    assert not _rope_probe.may_rotate(function) or _rope_probe.probe(function) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_probe_finds():
    def spec(function):
        return _rope_probe.probe(function)

    assert spec(modules.llamas).layout == "halves"
    assert not spec(modules.llamas).contiguous
    assert spec(modules.llamas).partial is None
    assert spec(modules.cats).contiguous
    assert spec(modules.cats).partial
    assert (spec(modules.glms).layout, spec(modules.glms).columns) == ("interleaved", "first half")
    assert (spec(modules.swapped).cos, spec(modules.swapped).sin) == ("cosines", "sines")
    assert spec(modules.single).k is None
    assert {form for *_, form in spec(modules.wide).forms} == {0, 4}  # rounded at the end
    assert spec(modules.wide).axis == "unsqueeze_dim"


def test_module_without_a_rotation_is_left_alone():
    class Plain(Attention):
        def forward(self, x, cos, sin):
            return self.attend(*self.heads(x))

    model = nn.ModuleList([Plain(), modules.Llamas()])
    fuse(model)
    assert [is_fused(m) for m in model] == [False, True]


FALLS_BACK = {
    "a dtype that was not seen": lambda x, cos, sin: (x, cos.double(), sin.double()),
    "angles that need gradients": lambda x, cos, sin: (x, cos.requires_grad_(), sin),
    "positions that broadcast": lambda x, cos, sin: (x, cos[:, :1], sin[:, :1]),
    "angles of another rank": lambda x, cos, sin: (x, cos[0, 0, None], sin[0, 0, None]),
    "angles of a subclass": lambda x, cos, sin: (x, nn.Buffer(cos), nn.Parameter(sin, False)),
}


@pytest.mark.parametrize("why", FALLS_BACK)
def test_call_falls_back(monkeypatch, why):
    module = modules.Llamas()
    plain = copy.deepcopy(module)
    fuse(module)
    seen = calls_of(monkeypatch)
    given = FALLS_BACK[why](*inputs(torch.float32))
    if "double" in why or why == "a dtype that was not seen":
        q = torch.randn(2, 4, POSITIONS, SIZE)
        stand_in = vars(modules)["_fp8_rope_llamas"]
        ours, theirs = stand_in(q, q, *given[1:]), modules.llamas(q, q, *given[1:])
        assert_same_step(list(ours), list(theirs))
    else:
        assert_same_step(step(module, given), step(plain, given))
    assert not seen


@pytest.mark.parametrize(
    ("args", "kwargs", "fused"),
    [
        ("qkcs", {}, True),
        ("qk", {"sin": "s", "cos": "c"}, True),
        ("qkcs1", {}, True),
        ("qkcs", {"unsqueeze_dim": 1}, True),
        ("qkcs", {"unsqueeze_dim": -3}, False),
    ],
)
def test_arguments_by_place_and_name(monkeypatch, args, kwargs, fused):
    fuse(modules.Llamas())
    q, cos, sin = torch.randn(2, 4, 6, 16), *torch.randn(2, 2, 6, 16)
    values = {"q": q, "k": q + 1, "c": cos, "s": sin, "1": 1}
    given = [values[a] for a in args]
    named = {name: values.get(a, a) for name, a in kwargs.items()}
    seen = calls_of(monkeypatch)
    ours = vars(modules)["_fp8_rope_llamas"](*given, **named)
    assert_same_step(list(ours), list(modules.llamas(*given, **named)))
    assert len(seen) == fused


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), (("q",), {"k": 1}), (("q", "k", "c", "s", 1, 2), {}), (("q",), {"q": 1})],
)
def test_errors_are_the_functions_own(args, kwargs):
    fuse(modules.Llamas())
    with pytest.raises(TypeError) as theirs:
        modules.llamas(*args, **kwargs)
    with pytest.raises(TypeError) as ours:
        vars(modules)["_fp8_rope_llamas"](*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_position_ids_that_are_given_take_the_function(monkeypatch):
    fuse(modules.Wide())
    q, angles = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    seen = calls_of(monkeypatch)
    vars(modules)["_fp8_rope_wide"](q, q, *angles, torch.arange(6))
    assert not seen
    vars(modules)["_fp8_rope_wide"](q, q, *angles, None)
    assert len(seen) == 1


def test_one_batch_of_angles_serves_all(monkeypatch):
    module = modules.Llamas()
    plain = copy.deepcopy(module)
    fuse(module)
    seen = calls_of(monkeypatch)
    x, cos, sin = inputs(torch.float32)
    assert_same_step(step(module, [x, cos[:1], sin[:1]]), step(plain, [x, cos[:1], sin[:1]]))
    assert len(seen) == 1


def test_default_of_convert_fuses_rope(monkeypatch):
    model = nn.Sequential(modules.Llamas())
    every = {"filter": lambda *_: True}
    fp8.convert(model, **every)
    assert is_fused(model[0])
    fp8.convert(model, **every, fuse=False)
    assert type(model[0]) is modules.Llamas
    fp8.convert(model, **every, fuse={"norms"})
    assert type(model[0]) is modules.Llamas
