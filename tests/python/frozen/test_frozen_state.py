"""What may be loaded into an fp8.FrozenLinear: codes with their scale, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from frozen_models import assert_same_state
from reference import assert_same_bits
from torch import nn

import fp8


def make(recipe="rowwise") -> nn.Sequential:
    return nn.Sequential(fp8.FrozenLinear.from_linear(nn.Linear(160, 144), recipe))


def fails(model, state, match, **options):
    """Loading raises, and changes nothing."""
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.uint8])
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_frozen_state_takes_no_numbers_for_codes(dtype, options):
    state = make().state_dict()
    state["0.weight"] = torch.ones(144, 160).to(dtype)
    name = str(dtype).removeprefix("torch.")
    fails(make(), state, f"'0.weight': expected codes in float8_e4m3fn, got {name}", **options)


def test_frozen_state_of_the_model_before_says_what_to_do():
    state = nn.Sequential(nn.Linear(160, 144)).state_dict()
    fails(make(), state, r"call fp8.freeze\(model\) then", strict=False)


def test_frozen_state_takes_codes_and_scale_together():
    state = make().state_dict()
    codes = {name: value for name, value in state.items() if name != "0.weight_scale"}
    fails(make(), codes, "codes without their scale, expected '0.weight_scale'", strict=False)
    scale = {name: value for name, value in state.items() if name != "0.weight"}
    fails(make(), scale, "'0.weight': missing, beside '0.weight_scale'", strict=False)
    renamed = codes | {"0.weight_scale_inv": state["0.weight_scale"]}
    fails(make(), renamed, "found '0.weight_scale_inv'", strict=False)
    model = make()
    bias = torch.randn(144)
    model.load_state_dict({"0.bias": bias}, strict=False)
    assert torch.equal(model[0].bias, bias)


def test_frozen_state_has_the_static_scale_too():
    layer = make("tensorwise")[0]
    model = nn.Sequential(
        fp8.FrozenLinear.from_codes(layer.weight, layer.scales, layer.bias, torch.tensor(0.1))
    )
    fails(model, make("tensorwise").state_dict(), "expected '0.input_scale'", strict=False)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("assign", [False, True])
def test_frozen_state_takes_scales_in_other_forms(recipe, assign):
    """As transformers 5.17 saves them, squeezed, and in bfloat16, which float32 has exactly."""
    source, model = make(recipe), make(recipe)
    name = f"0.{source[0].scale_name}"
    source[0].scales.copy_(source[0].scales.bfloat16())
    state = source.state_dict()
    state[name] = state[name].bfloat16()
    if recipe != "blockwise":
        state[name] = state[name].reshape(-1)
    model.load_state_dict(state, assign=assign)
    assert_same_state(model, source)


def test_frozen_state_refuses_scales_of_another_kind():
    state = make("blockwise").state_dict()
    state["0.weight_scale"] = state.pop("0.weight_scale_inv")
    fails(make("rowwise"), state, r"expected \[144, 1\], of a weight scaled rowwise, got \[2, 2\]")
    state = make().state_dict()
    state["0.weight_scale"] = state["0.weight_scale"].double()
    fails(make(), state, "expected a scale in float32, bfloat16, float16, .* got float64")


@pytest.mark.parametrize("size", [(16384, 256), (256, 2)])
def test_frozen_state_tells_as_many_scales_apart(size):
    """Blocks of [256, 16384] and of [2, 256] are as many as rows."""
    k, n = size
    blocks, rows = ({"weight": torch.zeros(n, k).to(torch.float8_e4m3fn)} for _ in range(2))
    blocks["weight_scale"] = torch.ones(-(-n // 128), -(-k // 128))
    rows["weight_scale"] = torch.ones(n, 1)
    layers = {
        kind: fp8.FrozenLinear(k, n, bias=False, granularity=kind)
        for kind in ("rowwise", "blockwise")
    }
    layers["rowwise"].load_state_dict(rows)
    layers["blockwise"].load_state_dict(blocks)
    fails(layers["rowwise"], blocks, "of a weight scaled rowwise, got")
    fails(layers["blockwise"], rows, "of a weight scaled blockwise, got")


def test_frozen_state_loads_into_what_a_skeleton_was_frozen_to():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(160, 144))
    fp8.freeze(model, "blockwise")
    source = make("blockwise")
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 160)
    assert_same_bits(model(x), source(x))
