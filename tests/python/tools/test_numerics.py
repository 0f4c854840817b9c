"""fp8.numerics around a model: nothing changes, and everything is seen, however the model runs."""

from __future__ import annotations

import copy
import json
import math

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
