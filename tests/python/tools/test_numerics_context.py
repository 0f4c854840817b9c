"""The context of fp8.numerics: where it begins and ends, several at once, what it leaves behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from watched_models import K, batch, blocks, by_operand, modules, step, watched_step

import fp8


def test_numerics_ends_with_its_body():
    model = blocks()
    with pytest.raises(RuntimeError, match="stop"), fp8.numerics(model) as found:  # noqa: PT012
        step(model, batch())
        raise RuntimeError("stop")
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    count = len(found.rows)
    assert count
    step(model, batch())
    assert len(found.rows) == count
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_numerics_backward_after_the_context_is_not_seen():
    model = blocks()
    with fp8.numerics(model) as found:
        y = model(batch().requires_grad_())
    before = [*found.rows]
    y.sum().backward()
    assert found.rows == before
    assert {row.operand for row in before} == {"x", "weight"}


def test_numerics_keeps_nothing():
    model = blocks()
    x = batch()
    with fp8.numerics(model) as found:
        y = model(x)
        y.sum().backward()
    gone = [weakref.ref(t) for t in (x, y, *model.parameters(), model)]
    del model, x, y
    gc.collect()
    assert [ref() for ref in gone if ref() is not None] == []
    assert found.rows


def test_numerics_keeps_no_graph_that_lives_on():
    """What stays on the nodes of a graph are names."""
    model = blocks()
    with fp8.numerics(model):
        y = model(batch())
    parameters = [weakref.ref(p) for p in model.head.parameters()]
    assert y.grad_fn is not None
    model.head = nn.Identity()
    y = y.detach()
    gc.collect()
    assert [ref() for ref in parameters if ref() is not None] == []


def test_numerics_of_another_model_is_not_mixed_in():
    student, teacher = blocks(), blocks("rowwise")
    with fp8.numerics(student) as found:
        with torch.no_grad():
            teacher(batch())
        step(student, batch())
        step(teacher, batch())
    assert {row.recipe for row in found.rows} == {"tensorwise"}
    assert all(row.calls == 1 for row in found.rows)


def test_numerics_of_two_models_at_once():
    a, b = blocks(), blocks("rowwise")
    expected = [by_operand(watched_step(copy.deepcopy(m), batch())) for m in (a, b)]
    with fp8.numerics(a) as first, fp8.numerics(b) as second:
        step(a, batch())
        step(b, batch())
    assert [by_operand(first), by_operand(second)] == expected


def test_numerics_twice_around_one_model():
    """The inner one makes products of an MLP again, which are no calls of a layer."""
    model = fp8.GatedMLP(K, 48, dtype=torch.bfloat16)
    with fp8.numerics(model) as outer, fp8.numerics(model) as inner:
        step(model, batch())
        with torch.no_grad():
            model(batch())
    assert by_operand(outer) == by_operand(inner)
    assert outer.rows[0].calls == 2


def test_numerics_says_what_was_not_seen():
    model = modules()
    with fp8.numerics(model) as found, torch.no_grad():
        model.last(batch())
    (note,) = found.notes
    assert note.startswith("not seen: gated.gate_proj, gated.up_proj")
    assert note.endswith("and 3 more")
    with fp8.numerics(model) as nothing:
        pass
    assert nothing.table().startswith("no layer in FP8 was called")


def test_numerics_wants_a_module():
    with pytest.raises(TypeError, match=r"fp8\.numerics: expected a torch\.nn\.Module, got list"):
        fp8.numerics([]).__enter__()


def test_numerics_does_not_wait_inside(monkeypatch):
    """Nothing is read from the device before the end."""
    model = blocks("delayed")
    read = []
    for name in ("item", "tolist", "cpu", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, m=method, n=name, **k: read.append(n) or m(t, *a, **k)
        )
    with fp8.numerics(model):
        step(model, batch())
        step(model, batch(seed=2))
        assert read == []
    assert read


@pytest.mark.gpu
def test_numerics_does_not_synchronize_inside():
    model = blocks("delayed", "cuda")
    x = batch("cuda")
    step(model, x)
    with fp8.numerics(model):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
