"""Which sums and norms are found in the code of a forward, and which are left alone."""

from __future__ import annotations

import linecache

import pytest
import residual_layers as layers
import torch
from residual_layers import Calls, Parts, assert_same_step, data, fuse, is_fused, pair
from torch import nn

import fp8
from fp8.nn import _fused_residuals
from fp8.nn._residual_code import ELSEWHERE, rewritten

CODE = '''
if True:
    import torch

class Layer(Parts):
    def forward(self, x):
{body}
'''
FOUND = {
    "x = x + self.mixer(x); y = x; z = y; x = self.second(z); return x + y": ["add"],
    "x = x + x; x = self.mlp(self.second(x)) + x; return x": ["add"],
    "x = x + x; return x, self.second(x)": ["add"],
    "x = torch.sin(x) + x; return self.second(x)": ["add"],
    "h: torch.Tensor = x; x = x + x; y: torch.Tensor = self.second(x); return y": ["add"],
    "for _ in range(2):\n  x = x + x\n  y = self.second(x)\nreturn y": ["add", "add"],
    "if True:\n  x = x + x\n  y = self.second(x)\nreturn y": ["add"],
    "x += 1; x = x + x; y = self.second(x); x = x + y; x *= 2; return x": ["add"],
    "y = self.first(x); return x + y": ["join"],
    "y = self.first(x); x = x + y; x *= 2; return x": ["join"],
    "y = self.first(x); x = x + y; return self.second(x)": ["join", "add"],
    "y = self.first(x); y += x; return y": ["join"],
    "y = self.first(x); z = x + y; return x + z": ["join"],
    "x = x + self.mixer(self.first(x)); return x + self.mlp(self.second(x))": ["join", "add"],
    "return x + self.mixer(self.first(x))": ["join"],
}
LEFT = {
    "x = x + x; x = x * 1 + self.mlp(self.second(x)); return x": "something before it",
    "x = x + x; torch.sin(x); y = self.second(x); return y": "something in between",
    "x = x + x; y = x.float(); y = self.second(x); return y": "something in between",
    "x = x + x; x = x; x = torch.sin(x); return self.second(x)": "another variable",
    "y = x + x; x = y; y = self.first; z = self.second(x); return z": "no copy of a variable",
    "y = x; x = x + x; z = self.second(y); return z": "another variable",
    "z = 2 * x; x = x + x; x = z; return self.second(x)": "another variable",
    "x = x - x; x = self.second(x); return x": "no sum",
    "x += x; return self.second(x)": "in place",
    "x = x + x; y = self.second(x); x += 1; return y": "in place",
    "x = x + x; y = x; z = self.second(x); y += 1; return z": "in place",
    "for _ in range(2):\n  x *= 2\n  x = x + x\n  y = self.second(x)\nreturn y": "in place",
    "x = x + x; y = self.second(x); z = x; z += 1; return y": "in place",
    "x = x + x; y = self.second(x); x.mul_(2); return y": "in place",
    "x = x + x; y = self.second(x); x[0] = 0; return y": "in place",
    "x = x + x; y = self.second(x); torch.sin(x, out=x); return y": "in place",
    "x = x + x; y = self.second(x); nn.functional.relu(x, inplace=True); return y": "in place",
    "x = x + x; return self.second(x, 1)": "another argument",
    "x = x + x; return self.second(x=x)": "by its name",
    "x = x + x; y = self.second(x); locals(); return y": "looks",
    "self = self; x = x + x; return self.second(x)": "another self",
    "global g; x = x + x; return self.second(x)": "others see its variables",
    "y = self.first(x); return x * y": "no sum",
    "y = self.first(x); return x + torch.sin(x) + y": "one use is no sum",
    "y = self.first(x); return (lambda: x + y)()": "may run more than once",
    "y = self.first(x)\nfor _ in range(2): y = x + y\nreturn y": "runs more than once",
    "y = self.first(x); x = y + y; return x": "not read later",
    "y = self.first(x); x.add_(1); return x + y": "one use is no sum",
    "y = self.first(x); z = x + y; x += y; return z": "in place",
    "z = x; y = self.first(x); return x + y + z": "read under two names",
    "y = torch.sin(x) + self.first(x); return x + y": "something before it",
}


def layer_of(tmp_path, body, name="layer"):
    """A layer whose forward has this body, of a file of its own."""
    lines = "\n".join(" " * 8 + line for line in body.replace("; ", "\n").split("\n"))
    path = tmp_path / f"{name}.py"
    path.write_text(CODE.format(body=lines))
    have = {"Parts": Parts, "nn": nn, "__name__": name}
    exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), have)
    return have["Layer"]


@pytest.mark.parametrize("body", FOUND)
def test_found(monkeypatch, tmp_path, body):
    fused, plain = pair(layer_of(tmp_path, body)())
    assert is_fused(fused)
    assert Calls(monkeypatch).during(assert_same_step, fused, plain, data()) == FOUND[body]


@pytest.mark.parametrize("body", LEFT)
def test_left_alone(tmp_path, body):
    module = fuse(layer_of(tmp_path, body)().bfloat16())
    assert not is_fused(module)
    reason = " is changed in place" in fp8.summary(fuse(nn.ModuleList([module, layers.Llamas()])))
    assert reason == (LEFT[body] == "in place" and not body.startswith("x += x"))


def test_source_that_is_not_there(tmp_path):
    kind = layer_of(tmp_path, "x = x + x; return self.second(x)", "gone")
    (tmp_path / "gone.py").unlink()
    linecache.clearcache()
    assert _fused_residuals.obstacle(kind) == "the source of its forward is not available"
    model = fuse(nn.ModuleList([kind(), layers.Llamas()]))
    assert "- (not fused: the source of its forward is not available)" in fp8.summary(model)
    assert [is_fused(m) for m in model] == [False, True]


def test_source_that_has_changed(tmp_path):
    kind = layer_of(tmp_path, "x = x + x; return self.second(x)", "changed")
    path = tmp_path / "changed.py"
    path.write_text(path.read_text().replace("x + x", "x + 2 * x"))
    linecache.clearcache()
    assert _fused_residuals.obstacle(kind) == ELSEWHERE
    path.write_text("1")
    linecache.clearcache()
    rewritten.__globals__["_rewritten"].cache_clear()
    assert _fused_residuals.obstacle(kind) == "the source of its forward is not available"


def test_code_that_was_replaced():
    """By a function of another place: its own source counts."""

    class Mine(Parts):
        def forward(self, x):
            return x

    def other(self, x):
        x = x + self.mixer(x)
        return self.second(x)

    Mine.forward = other
    assert ("second", True) in _fused_residuals.places(Mine)
    Mine.forward = eval("lambda self, x: self.second(x + x)")
    assert _fused_residuals.places(Mine) == ()


def test_equal_code_of_two_files(tmp_path):
    """Each keeps the names of its own file in tracebacks."""
    body = "x = x + x; return self.second(x)"
    kinds = [layer_of(tmp_path, body, name) for name in ("one", "two")]
    assert kinds[0].forward.__code__ == kinds[1].forward.__code__
    found = [rewritten(kind.forward.__code__).code.co_filename for kind in kinds]
    assert found == [kind.forward.__code__.co_filename for kind in kinds]


def test_decorated_by_something_else():
    class Wrapper:
        def __init__(self, function):
            self.__wrapped__ = function

        def __get__(self, instance, kind=None):
            return self if instance is None else lambda *args: self.__wrapped__(instance, *args)

    class Mine(Parts):
        @Wrapper
        def forward(self, x):
            x = x + self.mixer(x)
            return self.second(x)

    why = "its forward is decorated by more than functions"
    assert _fused_residuals.obstacle(Mine) == why
    assert not is_fused(fuse(Mine()))


def test_children_that_are_no_norms(monkeypatch):
    """The code cannot tell; a call of them is as the class has it."""

    class Mine(layers.Llamas):
        def forward(self, x):
            y = self.mixer(x)
            x = x + y
            y = self.mlp(x)
            x = x + y
            return self.second(x)

    assert [place.name for place in _fused_residuals.places(Mine)] == ["mlp", "second", "mixer"]
    fused, plain = pair(Mine())
    assert Calls(monkeypatch).during(assert_same_step, fused, plain, data()) == ["add"]
    assert "residual, second\n" in fp8.summary(fused)
