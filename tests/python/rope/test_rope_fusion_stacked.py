"""A module of which something else is fused too: in either order, and each undone by itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import rope_modules as modules
import torch
from reference import assert_same_bits
from rope_modules import calls_of, fuse, inputs
from torch import nn

import fp8
from fp8.conversion import _rope_fusion
from fp8.nn import _fused_classes, _fused_rope

MARK = "_test_from"
_made: dict[type, type[nn.Module]] = {}


def doubled(base: type[nn.Module]) -> type[nn.Module]:
    """As another fusion has it: its forward calls that of the class that it is made of."""
    if base not in _made:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * base.forward(self, *args, **kwargs)

        _made[base] = _fused_classes.subclass(base, MARK, forward, doubled_module)
    return _made[base]


def doubled_module(base: type[nn.Module], *args: Any) -> nn.Module:
    kind: Any = doubled(base)
    return kind.__new__(kind, *args)


def stack(kind: type) -> list[str]:
    """What is fused, from the outside."""
    found = []
    while (base := _fused_classes.base_of(kind)) is not None:
        found.append("doubled" if MARK in vars(kind) else "rope")
        kind = base
    return [*found, kind.__name__]


def both(rope_first: bool) -> nn.Module:
    module = modules.Llamas()
    if rope_first:
        fuse(module)
    module.__class__ = doubled(type(module))
    return fuse(module)


@pytest.mark.parametrize("rope_first", [True, False])
def test_rope_is_below_what_else_is_fused(monkeypatch, rope_first):
    module = both(rope_first)
    assert stack(type(module)) == ["doubled", "rope", "Llamas"]
    plain = modules.Llamas()
    plain.load_state_dict(module.state_dict())
    seen, given = calls_of(monkeypatch), inputs(torch.float32)
    assert_same_bits(module(*given), 2 * plain(*given), "both")
    assert len(seen) == 1


@pytest.mark.parametrize("rope_first", [True, False])
def test_each_is_undone_by_itself(rope_first):
    module = both(rope_first)
    assert _rope_fusion.undo(module) is None
    assert type(module) is doubled(modules.Llamas)
    assert _rope_fusion.undo(module) is not None  # it is not there
    module = both(rope_first)
    module.__class__ = _fused_classes.made_from(type(module), MARK)
    assert type(module) is _fused_rope.rotating_class(modules.Llamas)
    fp8.revert(module)
    assert type(module) is modules.Llamas


def test_copies_and_pickles_of_both(monkeypatch):
    module, given, seen = both(True), inputs(torch.float32), calls_of(monkeypatch)
    expected = module(*given)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        del seen[:]
        assert_same_bits(other(*given), expected, "copy")
        assert len(seen) == 1


def test_what_is_made_of_another_fused_class_is_left_alone():
    module = modules.Llamas()
    module.__class__ = type("Made", (doubled(modules.Llamas),), {})
    fuse(module)
    assert type(module).__name__ == "Made"
    assert not _rope_fusion.is_fused(module)
