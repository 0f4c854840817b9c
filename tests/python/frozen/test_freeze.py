"""fp8.freeze: the bits of the converted model's forward, and the memory of FP8."""

from __future__ import annotations

import copy

import pytest
import torch
from frozen_models import ODD, assert_same_state, convert, every, frozen_layers, language_model
from reference import assert_same_bits
from torch import nn

import fp8
from fp8.nn import _fused_mlps, _fused_siblings

RECIPES = tuple(
    f"{recipe}{option}"
    for recipe in ("tensorwise", "rowwise", "blockwise")
    for option in ("", ":power_of_two")
)


@torch.no_grad()
def frozen_and_before(model, x, **options):
    before = model(x)
    fp8.freeze(model, **options)
    return model(x), before


@pytest.mark.parametrize("recipe", [*RECIPES, "rowwise_gw_hp", "rowwise_fast"])
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_layer_has_the_bits_of_the_converted_one(recipe, shape, dtype, device):
    model = convert(nn.Sequential(nn.Linear(*shape)).to(device, dtype), recipe)
    x = torch.randn(3, 5, shape[0], dtype=dtype, device=device)
    actual, expected = frozen_and_before(model, x)
    assert type(model[0]) is fp8.FrozenLinear
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fuse", [True, False])
def test_frozen_model_has_the_logits_of_the_converted_one(recipe, fuse):
    model = language_model()
    convert(model, recipe, fuse=fuse)
    tokens = torch.randint(48, (2, 7))
    actual, expected = frozen_and_before(model, tokens)
    assert len(frozen_layers(model)) == 2 * 7 + 1
    if fuse and recipe.startswith("blockwise"):
        # q, k and v together have blocks across two layers, which no layer can have alone.
        assert (actual - expected).float().norm() < 0.1 * expected.float().norm()
    else:
        assert_same_bits(actual, expected)


def test_frozen_model_has_the_logits_where_blocks_end_with_the_layers():
    model = nn.Sequential(Siblings()).bfloat16()
    convert(model, "blockwise")
    assert _fused_siblings.joint_layers(model[0])
    actual, expected = frozen_and_before(model, torch.randn(4, 160).bfloat16())
    assert_same_bits(actual, expected)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(160, 256), nn.Linear(160, 128)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


def test_frozen_siblings_keep_the_scale_that_they_share():
    """With one scale per tensor a fused parent has one for all: the largest."""
    model = nn.Sequential(Siblings())
    model[0].k.weight.data *= 100
    fp8.freeze(convert(model, "tensorwise"))
    assert torch.equal(model[0].q.scales, model[0].k.scales)
    assert model[0].q.scales.data_ptr() != model[0].k.scales.data_ptr()
    assert model[0].q.weight.untyped_storage().nbytes() == 160 * 256
    model = nn.Sequential(Siblings())
    model[0].k.weight.data *= 100
    fp8.freeze(convert(model, "tensorwise", fuse=False))
    assert not torch.equal(model[0].q.scales, model[0].k.scales)


def test_frozen_model_has_the_logits_of_a_calibrated_one():
    model = convert(language_model(), "tensorwise")
    tokens = torch.randint(48, (2, 7))
    with fp8.calibrate(model):
        model(tokens)
    scales = {n: m.input_scale.clone() for n, m in model.named_modules() if type(m) is fp8.Linear}
    actual, expected = frozen_and_before(model, tokens)
    assert_same_bits(actual, expected)
    for name, scale in scales.items():
        layer = model.get_submodule(name)
        assert "input_scale" in layer._parameters
        assert_same_bits(layer.static_scale.detach(), scale.reshape(1))
        assert layer.describe() == "tensorwise, static input_scale"


def test_frozen_delayed_is_dynamic():
    """A history is of calls gone by; without one `delayed` is tensorwise."""
    linear = nn.Linear(64, 32)
    model = convert(nn.Sequential(copy.deepcopy(linear)), "delayed")
    model(torch.randn(4, 64))
    fp8.freeze(model)
    same = fp8.freeze(convert(nn.Sequential(linear), "tensorwise"))
    assert "amax_history" not in model[0]._buffers
    assert_same_state(model, same)
    assert model[0].describe() == "tensorwise"


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_freeze_stores_what_the_quantize_operators_give(recipe):
    linear = nn.Linear(300, 130).bfloat16()
    weight = linear.weight.detach().clone()
    fp8.freeze(linear, recipe)
    quantize = {
        "tensorwise": fp8.ops.quantize_tensorwise,
        "rowwise": fp8.ops.quantize_rowwise,
        "blockwise": fp8.ops.quantize_blockwise_128x128,
    }[recipe]
    codes, scale = quantize(weight)
    assert_same_bits(linear.weight.detach(), codes)
    assert_same_bits(linear.scales.detach(), scale.reshape(linear.scales.shape))


def test_freeze_halves_the_memory_of_weights():
    model = language_model()
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    rest = sum(p.nbytes for p in model.parameters()) - sum(m.weight.nbytes for m in linears)
    fp8.freeze(model)
    expected = rest + sum(m.in_features * m.out_features + 4 * m.out_features for m in linears)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == expected


def test_freeze_keeps_objects_hooks_and_training_mode():
    linear = nn.Linear(16, 16).eval()
    seen = []
    linear.register_forward_hook(lambda m, args, y: seen.append(m))
    model = nn.Sequential(linear, linear)
    bias = linear.bias
    assert fp8.freeze(model) is model
    assert model[0] is model[1] is linear
    assert linear.bias is bias
    assert not linear.training
    model(torch.randn(2, 16))
    assert seen == [linear, linear]
    assert not hasattr(linear, "recipe")


def test_freeze_takes_a_recipe_for_all_and_rowwise_for_plain_layers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert [m.describe() for m in fp8.freeze(copy.deepcopy(model))] == ["rowwise"] * 2
    chosen = fp8.freeze(copy.deepcopy(model), "blockwise:power_of_two")
    assert [m.describe() for m in chosen] == ["blockwise:power_of_two"] * 2
    mixed = convert(copy.deepcopy(model), "tensorwise")
    assert [m.describe() for m in fp8.freeze(mixed, fp8.Recipe("rowwise"))] == ["rowwise"] * 2


def test_freeze_in_inference_mode_makes_tensors_like_any_other():
    linear = nn.Linear(32, 16)
    with torch.inference_mode():
        fp8.freeze(linear)
    assert not any(p.is_inference() for p in linear.parameters())
    x = torch.randn(2, 32, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


def test_freeze_twice_changes_nothing():
    model = fp8.freeze(language_model(), "blockwise")
    before = copy.deepcopy(model)
    assert_same_state(fp8.freeze(model, "rowwise"), before)


def test_frozen_mlps_and_siblings_are_computed_layer_by_layer():
    model = convert(language_model(), "rowwise")
    kinds = (_fused_mlps.own_class, _fused_siblings.own_class)
    assert all(any(own(type(m)) for m in model.modules()) for own in kinds)
    fp8.freeze(model)
    assert not any(own(type(m)) for m in model.modules() for own in kinds)
    assert [type(m).__name__ for m in model.blocks.modules()].count("GatedUnit") == 2


def test_fusion_runs_layer_by_layer_where_a_layer_was_frozen_past_freeze():
    """Frozen one by one: the fused parents still have their classes, and the right values."""
    model = convert(language_model(), "rowwise")
    tokens = torch.randint(48, (2, 7))
    expected = model(tokens)
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if type(child) is fp8.Linear:
                setattr(parent, name, fp8.FrozenLinear.from_linear(child))
    assert _fused_mlps.own_class(type(model.blocks[0].mlp))
    assert_same_bits(model(tokens), expected)
    assert "gate_proj is no fp8.Linear" in fp8.summary(model)


def test_frozen_norms_stay_fused():
    model = convert(language_model(), "rowwise")
    norms = type(model.norm)
    assert norms is not nn.LayerNorm
    assert type(fp8.freeze(model).norm) is norms


def test_freeze_takes_weights_from_float32_and_float16():
    for dtype in (torch.float32, torch.float16):
        linear = fp8.freeze(nn.Linear(64, 32).to(dtype))
        assert linear.compute_dtype == dtype
        assert linear(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_freeze_keeps_what_is_not_finite():
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data[3, 5] = float("nan")
    y = fp8.freeze(linear, "rowwise")(torch.randn(2, 64))
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


def test_freeze_of_a_filter_that_raises_changes_nothing():
    model = convert(language_model(), "rowwise")
    before = copy.deepcopy(model)

    def filter(module, name):
        if name.endswith("o_proj"):
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fp8.freeze(model, filter=filter)
    assert_same_state(model, before)
    assert not frozen_layers(model)
    fp8.freeze(model, filter=every)
    assert frozen_layers(model)


def test_freeze_asks_whether_siblings_are_read_together():
    """Where their parent's forward would not compute them as one, each keeps its own scale."""
    model = nn.Sequential(Siblings())
    model[0].k.weight.data *= 100
    convert(model, "tensorwise")
    with torch.inference_mode():  # such weights count no writes
        for layer in (model[0].q, model[0].k):
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    x = torch.randn(4, 160)
    actual, expected = frozen_and_before(model, x)
    assert_same_bits(actual, expected)
    assert not torch.equal(model[0].q.scales, model[0].k.scales)
