"""fp8.numerics around a model: nothing changes, everything is seen, nothing is left behind."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from reference import assert_same_bits
from torch import nn
from watched_models import (
    MODELS,
    RECIPES,
    K,
    batch,
    blocks,
    by_operand,
    modules,
    step,
    twins,
    watched_step,
)

import fp8


def names_seen(found) -> set[str]:
    return {row.layer for row in found.rows}


def all_layers(model: nn.Module) -> set[str]:
    kinds = (fp8.Linear, fp8.GroupedLinear)
    return {name for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", MODELS)
def test_numerics_changes_no_bit(recipe, kind, device):
    plain, watched = twins(MODELS[kind](recipe, device))
    inputs = [batch(device, seed=seed) for seed in (1, 2, 3)]
    expected = [step(plain, x) for x in inputs]
    with fp8.numerics(watched) as found:
        got = [step(watched, x) for x in inputs]
    for e, g in zip(expected, got, strict=True):
        assert len(e) == len(g)
        for a, b in zip(e, g, strict=True):
            assert_same_bits(a, b)
    for a, b in zip(plain.buffers(), watched.buffers(), strict=True):  # histories
        assert torch.equal(a, b)
    assert names_seen(found) == all_layers(watched)
    assert found.notes == []


@pytest.mark.parametrize("kind", MODELS)
def test_numerics_sees_every_operand_of_every_layer(kind):
    model = MODELS[kind]("rowwise")
    found = by_operand(watched_step(model, batch()))
    for layer in all_layers(model):
        assert (layer, "x", "fprop") in found
        assert (layer, "weight", "fprop") in found
        assert (layer, "dy", "dgrad") in found
        if "grouped" not in layer:
            assert {(layer, "x", "wgrad"), (layer, "dy", "wgrad")} <= found.keys()
            assert (layer, "weight", "dgrad") in found
    assert all(row.calls == 1 for row in found.values())


def test_numerics_leaves_fusions_on():
    """Products by kind: as without it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    model = blocks()
    counted = []
    for watching in (False, True):
        with Count() as count:
            count.names = []
            if watching:
                with fp8.numerics(model):
                    step(model, batch())
            else:
                step(model, batch())
        counted.append([n for n in count.names if "_forward" in n or n.endswith("_backward")])
    fp8_ops = [[n for n in names if n.startswith("fp8._m")] for names in counted]
    assert sum("fp8._mlp_forward" in n for n in fp8_ops[0]) == 2
    assert sum("fp8._merged_forward" in n for n in fp8_ops[0]) == 2
    assert fp8_ops[1] == fp8_ops[0]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_numerics_counts_a_checkpointed_call_once(recipe, reentrant):
    plain = by_operand(watched_step(blocks(recipe), batch(), batch(seed=6)))
    found = by_operand(watched_step(blocks(recipe, reentrant=reentrant), batch(), batch(seed=6)))
    assert found == plain


def test_numerics_under_autocast():
    """Weights in fp32 that the operator casts keep their names, forward and backward."""
    model = blocks(dtype=torch.float32)
    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    with fp8.numerics(model) as found, torch.autocast("cpu", torch.bfloat16):
        step(model, batch())
    assert names_seen(found) == all_layers(model)
    got = by_operand(found)
    assert {key[1] for key in got} == {"x", "weight", "dy"}
    expected = by_operand(watched_step(bf16, batch()))
    weights = [key for key in expected if key[1] == "weight"]
    assert weights
    for key in weights:
        assert got[key] == expected[key]


@pytest.mark.parametrize("reentrant", [False, True])
def test_numerics_of_autocast_under_checkpointing(reentrant):
    model = blocks("rowwise", dtype=torch.float32)
    expected = copy.deepcopy(model)
    for block in (model.first, model.second):
        block.reentrant = reentrant
    found = []
    for each in (expected, model):
        with fp8.numerics(each) as seen, torch.autocast("cpu", torch.bfloat16):
            step(each, batch())
        found.append(by_operand(seen))
    assert found[1] == found[0]


def test_numerics_inside_an_autocast_that_has_cast_already():
    model = blocks(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch())
        with fp8.numerics(model) as found:
            step(model, batch())
    rows = by_operand(found)
    for layer in all_layers(model):
        assert (layer, "weight", "fprop") in rows
        assert (layer, "dy", "dgrad") in rows


def test_numerics_of_frozen_weights():
    model = blocks("rowwise")
    model.requires_grad_(False)
    model.second.mlp.down.weight.requires_grad_(True)
    found = by_operand(watched_step(model, batch()))
    assert ("head", "dy", "dgrad") in found
    assert ("head", "dy", "wgrad") not in found
    assert ("head", "x", "wgrad") not in found
    assert ("second.mlp.down", "x", "wgrad") in found
    assert ("second.mlp.down", "dy", "wgrad") in found


def test_numerics_of_an_input_without_gradient():
    """The first layer's backward gets no weight, and is known all the same."""
    first, second = (fp8.Linear(K, K, dtype=torch.bfloat16) for _ in range(2))
    model = nn.ModuleDict({"a": first, "b": second})
    x = batch()
    with fp8.numerics(model) as found:
        (first(x) + 3 * second(x)).sum().backward()
    rows = by_operand(found)
    assert rows["b", "dy", "wgrad"].amax.max == 3 * rows["a", "dy", "wgrad"].amax.max


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", MODELS)
def test_numerics_of_inference(mode, kind):
    model = MODELS[kind]()
    with fp8.numerics(model) as found, mode():
        model(batch())
    with fp8.numerics(model) as trained:
        step(model, batch())
    rows = by_operand(found)
    assert {key[1:] for key in rows} == {("x", "fprop"), ("weight", "fprop")}
    assert names_seen(found) == all_layers(model)
    expected = by_operand(trained)
    assert all(row == expected[key] for key, row in rows.items())


def test_numerics_of_inference_and_training_together():
    layer = fp8.Linear(K, K, dtype=torch.bfloat16)
    with fp8.numerics(layer) as found:
        with torch.inference_mode():
            layer(batch())
        step(layer, batch(seed=2))
        with torch.inference_mode():
            layer(batch(seed=3))
    assert by_operand(found)["(model)", "x", "fprop"].calls == 3


def test_numerics_spreads_over_calls():
    layer = fp8.Linear(K, K, dtype=torch.bfloat16)
    xs = [torch.full((4, K), value, dtype=torch.bfloat16) for value in (1.0, 2.0, 6.0)]
    with fp8.numerics(layer) as found, torch.no_grad():
        for x in xs:
            layer(x)
    row = by_operand(found)["(model)", "x", "fprop"]
    assert (row.amax.min, row.amax.mean, row.amax.max, row.calls) == (1.0, 3.0, 6.0, 3)


def test_numerics_of_a_static_scale_counts_what_saturates():
    layer = fp8.Linear(K, K, dtype=torch.bfloat16)
    layer.input_scale = torch.tensor(1 / 448)
    x = torch.ones(10, K, dtype=torch.bfloat16)
    x[:3] = 2.0
    x[3, :8] = 1e-6
    with fp8.numerics(layer) as found, torch.no_grad():
        layer(x)
    row = by_operand(found)["(model)", "x", "fprop"]
    assert row.scaling == "static"
    assert row.saturated.mean == pytest.approx(0.3)
    assert row.flushed.mean == pytest.approx(8 / (10 * K))
    assert "x 30.00" in found.table()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_numerics_of_nan_comes_first_in_the_table(recipe):
    model = nn.Sequential(*(fp8.Linear(K, K, dtype=torch.bfloat16, recipe=recipe) for _ in "ab"))
    x = batch()
    x[0, 0, 0] = math.nan
    with fp8.numerics(model) as found, torch.no_grad():
        model[0](batch())
        model[1](x)
    rows = by_operand(found)
    assert rows["1", "x", "fprop"].nonfinite == 1
    assert rows["0", "x", "fprop"].nonfinite == 0
    assert found.table().splitlines()[1].startswith("1 ")
    if recipe == "tensorwise":
        assert math.isnan(rows["1", "x", "fprop"].sqnr_db.mean)


def test_numerics_of_zeros():
    layer = fp8.Linear(K, K, dtype=torch.bfloat16)
    with fp8.numerics(layer) as found, torch.no_grad():
        layer(torch.zeros(4, K, dtype=torch.bfloat16))
        layer(torch.zeros(0, K, dtype=torch.bfloat16))
    row = by_operand(found)["(model)", "x", "fprop"]
    assert (row.amax.max, row.calls, row.nonfinite) == (0.0, 1, 0)
    assert math.isnan(row.sqnr_db.mean)
    assert math.isnan(row.flushed.mean)
    json.dumps(found.as_dicts(), allow_nan=False)


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


def test_numerics_of_main_grad():
    model = blocks("rowwise")
    expected = by_operand(watched_step(copy.deepcopy(model), batch()))
    head = model.head.weight
    head.main_grad = torch.zeros_like(head, dtype=torch.float32)
    found = by_operand(watched_step(model, batch()))
    assert found == expected
    assert head.main_grad.abs().sum() > 0


def test_numerics_of_cached_weights():
    model = blocks()
    expected = by_operand(watched_step(copy.deepcopy(model), batch()))
    with fp8.cached_weights(model):
        assert by_operand(watched_step(model, batch())) == expected


def test_numerics_of_a_nested_input():
    layer = fp8.Linear(K, K, dtype=torch.bfloat16)
    rows = [torch.randn(n, K, dtype=torch.bfloat16) for n in (3, 5)]
    with fp8.numerics(layer) as found:
        layer(torch.nested.nested_tensor(rows, layout=torch.jagged)).values().sum().backward()
    dense = watched_step(layer, torch.cat(rows))
    assert by_operand(found)["(model)", "x", "fprop"] == by_operand(dense)["(model)", "x", "fprop"]
    assert ("(model)", "dy", "wgrad") in by_operand(found)


def test_numerics_of_compiled_code():
    """Compiled before: what it runs is watched. First called inside: it runs as it is."""
    model = nn.Sequential(*(fp8.Linear(K, K, recipe="rowwise") for _ in range(2)))
    expected = by_operand(watched_step(model, batch(dtype=torch.float32)))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        with fp8.numerics(model) as found:
            inside = step(compiled, batch(dtype=torch.float32))
        assert by_operand(found) == expected
        for a, b in zip(inside, step(compiled, batch(dtype=torch.float32)), strict=True):
            assert_same_bits(a, b)


def test_numerics_of_parameters_that_are_given_to_operators():
    """They are named as they are."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_weight = nn.Parameter(torch.randn(K, K))

        def forward(self, x):
            return fp8.ops.fused_linear(x, self.gate_weight)

    found = watched_step(nn.ModuleDict({"own": Own()})["own"], batch(dtype=torch.float32))
    assert names_seen(found) == {"gate_weight"}
    layer = fp8.Linear(K, K)
    assert names_seen(watched_step(layer, batch(dtype=torch.float32))) == {"(model)"}


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
