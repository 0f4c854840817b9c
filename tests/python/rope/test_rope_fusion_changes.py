"""What changes after fp8.convert fused a rotation, or was changed before: the function, what it
calls, the forward, the instance. Other modules of the class, and revert."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings

import pytest
import rope_modules as modules
import torch
from reference import assert_same_bits
from rope_modules import MODULES, calls_of, fuse, inputs, is_fused
from torch import nn

import fp8
from fp8.nn import _fused_rope


def line_of(model):
    return next(line for line in fp8.summary(model).splitlines() if line.startswith("0 "))


def counted(monkeypatch, name="llamas"):
    """Puts a function that counts in place of one of the file's; returns it and its calls."""
    seen, original = [], getattr(modules, name)

    def other(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(modules, name, other)
    return seen


def test_other_modules_of_the_class_keep_their_function(monkeypatch):
    others = [modules.Llamas(), modules.Inherited()]
    fused = fuse(modules.Llamas())
    assert modules.Llamas.forward.__code__.co_names.count("llamas") == 1
    assert type(others[0]) is modules.Llamas
    assert type(fused) is not modules.Llamas
    assert modules.llamas.__module__ == "rope_modules"
    seen = calls_of(monkeypatch)
    original, called = modules.llamas.__code__, []

    def spy(frame, event, arg):
        if event == "call" and frame.f_code is original:
            called.append(frame)

    given = inputs(torch.float32)
    for module, fused_calls in ((fused, 1), *((other, 0) for other in others)):
        del seen[:], called[:]
        sys.setprofile(spy)
        try:
            module(*given)
        finally:
            sys.setprofile(None)
        assert (len(seen), len(called)) == (fused_calls, 1 - fused_calls)


def test_a_function_that_is_patched_later_is_called(monkeypatch):
    model = fuse(nn.ModuleList([modules.Llamas()]))
    given, seen = inputs(torch.float32), calls_of(monkeypatch)
    assert line_of(model).endswith("fused: rope, halves")
    with monkeypatch.context() as patch:
        called = counted(patch)
        model[0](*given)
        assert (len(called), len(seen)) == (1, 0)
        assert line_of(model).endswith("- (not fused: llamas was replaced)")
    model[0](*given)
    assert (len(called), len(seen)) == (1, 1)
    assert line_of(model).endswith("fused: rope, halves")


def test_what_the_function_calls_is_patched_later(monkeypatch):
    model = fuse(nn.ModuleList([modules.Llamas()]))
    given, seen = inputs(torch.float32), calls_of(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "rotate_half", lambda x: 2 * x)
        ours = model[0](*given)
        assert not seen
        assert_same_bits(ours, modules.Llamas.forward(model[0], *given), "patched")
        assert "what llamas calls was replaced" in line_of(model)
    del seen[:]  # what the summary asked
    model[0](*given)
    assert len(seen) == 1


def test_code_of_the_function_is_replaced(monkeypatch):
    module = fuse(modules.Llamas())
    given, seen = inputs(torch.float32), calls_of(monkeypatch)
    monkeypatch.setattr(modules.llamas, "__code__", modules.backwards.__code__)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "llamas", modules.llamas)
        with pytest.raises(RecursionError):  # backwards calls it
            module(*given)
    assert not seen


def test_a_function_that_was_patched_before_is_asked_itself(monkeypatch):
    monkeypatch.setattr(modules, "llamas", modules.cats)
    module = fuse(modules.Llamas())
    assert is_fused(module)
    plain, seen, given = modules.Llamas(), calls_of(monkeypatch), inputs(torch.float32)
    plain.load_state_dict(module.state_dict())
    assert_same_bits(module(*given), plain(*given), "cats")
    assert len(seen) == 1
    monkeypatch.setattr(modules, "llamas", modules.noisy)
    model = nn.ModuleList([modules.Llamas(), module])
    fuse(model)
    assert not is_fused(model[0])
    assert "not fused: llamas computes no rotation that is known" in line_of(model)


def test_forward_replaced_in_the_class(monkeypatch):
    model = fuse(nn.ModuleList([modules.Llamas()]))
    monkeypatch.setattr(modules.Llamas, "forward", lambda self, x, cos, sin: x + 1)
    x, *angles = inputs(torch.float32)
    assert_same_bits(model[0](x, *angles), x + 1, "other forward")
    assert "its class's forward was replaced" in line_of(model)
    fuse(model)
    fp8.revert(model)
    assert type(model[0]) is modules.Llamas


def test_forward_on_the_instance():
    module = modules.Llamas()
    module.forward = types.MethodType(lambda self, x, cos, sin: x, module)
    model = nn.ModuleList([module, modules.Llamas()])
    fuse(model)
    assert not is_fused(module)
    assert is_fused(model[1])
    assert "its forward was replaced on the instance; convert before that" in line_of(model)
    model[1].forward = types.MethodType(lambda self, x, cos, sin: x, model[1])
    lines = fp8.summary(model)
    assert "not fused: its forward was replaced on the instance" in lines
    x, *angles = inputs(torch.float32)
    assert model[1](x, *angles) is x


def test_forward_decorated_by_an_object_is_left_alone():
    class Decorator:
        def __init__(self, function):
            self.function = self.__wrapped__ = function

        def __call__(self, *args, **kwargs):
            return self.function(*args, **kwargs)

        def __get__(self, module, kind=None):
            return self if module is None else types.MethodType(self, module)

    class Wrapped(modules.Llamas):
        forward = Decorator(modules.Llamas.forward)

    model = nn.ModuleList([Wrapped(), modules.Llamas()])
    fuse(model)
    assert [is_fused(m) for m in model] == [False, True]
    assert "its forward is decorated by more than functions" in line_of(model)


def test_decorators_still_run():
    module = fuse(modules.Decorated())
    result = module(*inputs(torch.float32))
    assert module.calls == 1
    assert not result.requires_grad  # by torch.no_grad()


def test_attribute_of_the_functions_name_is_left_alone():
    """The code would read the attribute under the other name too."""

    class Both(modules.Attention):
        llamas = 3

        def forward(self, x, cos, sin):
            q, k, v = self.heads(x)
            q, k = modules_llamas(q, k, cos, sin)  # noqa: F821
            return self.attend(q, k, v)

    code = Both.forward.__code__
    names = tuple("llamas" if n == "modules_llamas" else n for n in code.co_names)
    Both.forward = types.FunctionType(code.replace(co_names=names), vars(modules))
    assert is_fused(fuse(Both()))

    def reads(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = llamas(q, k, cos, sin)  # noqa: F821
        return self.attend(q, k, v) * self.llamas

    Both.forward = types.FunctionType(reads.__code__, vars(modules))
    assert not is_fused(fuse(Both()))


@pytest.mark.parametrize("name", MODULES)
def test_revert_gives_the_class_back(name):
    module = MODULES[name]()
    before, kind = dict(vars(module)), type(module)
    fuse(module)
    fuse(module)  # again
    assert vars(module).keys() == before.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8.revert(module)
    assert type(module) is kind
    assert vars(module).keys() == before.keys()


@pytest.mark.parametrize("name", ["Llamas", "Decorated", "Supers"])
def test_copies_and_pickles_are_fused(monkeypatch, name):
    module = fuse(MODULES[name]())
    given, seen = inputs(torch.float32), calls_of(monkeypatch)
    expected = module(*given)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        del seen[:]
        assert_same_bits(other(*given), expected, "copy")
        assert len(seen) == 1
        fp8.revert(other)
        assert type(other) is MODULES[name]


def test_a_pickle_names_the_class_itself():
    text = pickle.dumps(fuse(modules.Llamas()), protocol=2)
    assert b"_rotating_module" in text
    assert b"Llamas" in text
    assert b"_fp8_rope_" not in text


def test_pickle_is_read_where_nothing_was_fused(monkeypatch):
    text = pickle.dumps(fuse(modules.Llamas()))
    monkeypatch.delattr(modules, "_fp8_rope_llamas")
    _fused_rope._classes.clear()
    given, seen = inputs(torch.float32), calls_of(monkeypatch)
    pickle.loads(text)(*given)
    assert len(seen) == 1


def test_convert_that_fails_leaves_the_class(monkeypatch):
    model = nn.ModuleList([modules.Llamas(), modules.Cats()])
    real = fp8.conversion._rope_fusion.with_stand_ins

    def fails(kind):
        if kind is modules.Cats:
            raise RuntimeError("as if")
        return real(kind)

    monkeypatch.setattr(fp8.conversion._rope_fusion, "with_stand_ins", fails)
    with pytest.raises(RuntimeError, match="as if"):
        fuse(model)
    assert [type(m) for m in model] == [modules.Llamas, modules.Cats]


def test_a_parametrized_module_stays_fused():
    module = fuse(modules.Llamas())
    kind = type("Made", (type(module),), {})
    module.__class__ = kind
    with pytest.warns(UserWarning, match="stays fused: its class is Made, made of a fused one"):
        fp8.revert(module)
