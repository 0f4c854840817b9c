"""LoRA merged into frozen layers and taken out again, and what cannot be had over FP8 codes."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from lora_models import RECIPES, adapted, decibels, filled, frozen, layers, lora, loras, thawed
from test_peft import _config
from tiny_transformers import inputs, make
from torch import Tensor, nn

import fp8
from fp8.integrations.peft import FrozenLoraLinear, adopt, register

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


def bits(layer: fp8.FrozenLinear) -> list[Tensor]:
    tensors = [layer.weight.view(torch.uint8), layer.scales]
    return [t.detach().clone() for t in (*tensors, layer.bias) if t is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def net(
    recipe: str, bias: bool = True, shape: tuple[int, int] = (160, 200), **options: object
) -> nn.Module:
    """One adapted layer, of a shape that blocks of 128 do not divide."""
    torch.manual_seed(2)
    layer = fp8.FrozenLinear.from_linear(nn.Linear(*shape, bias=bias), recipe)
    config = register(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **options))
    return filled(peft.get_peft_model(nn.Sequential(layer), config))


def quantized(weight: Tensor, recipe: str) -> tuple[Tensor, Tensor]:
    granularity, _, options = recipe.partition(":")
    name = "blockwise_128x128" if granularity == "blockwise" else granularity
    return getattr(fp8.ops, f"quantize_{name}")(weight, power_of_two=bool(options))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_codes_are_those_of_weight_and_delta(recipe, safe):
    model = net(recipe)
    module = loras(model)[0]
    base, before = module.base_layer, bits(module.base_layer)
    delta = 2 * (module.lora_B["default"].weight @ module.lora_A["default"].weight)
    codes, scale = quantized((base.dequantize(torch.float32) + delta).detach(), recipe)
    model.merge_adapter(safe_merge=safe)
    assert base.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(base.weight.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(base.scales.flatten(), scale.flatten())
    assert base.scales.shape == before[1].shape
    assert not base.weight.requires_grad
    assert not base.scales.requires_grad
    model.unmerge_adapter()
    assert same(bits(base), before)
    assert not module.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        module.unmerge()


@pytest.mark.parametrize("recipe", RECIPES)
def test_merged_model_computes_what_adapters_computed(recipe):
    """Up to rounding the sum to e4m3 as a weight is: another 31 dB a layer, 17 over all of them."""
    model, given = adapted(frozen(recipe), lora()).eval(), inputs("llama")
    names = list(layers(frozen(recipe)))
    with torch.no_grad():
        expected, base = model(**given).logits, frozen(recipe).eval()(**given).logits
        merged = model.merge_and_unload()
        actual = merged(**given).logits
    assert list(layers(merged)) == names
    assert decibels(actual, expected) > 14
    assert decibels(base, expected) < 8
    again = fp8.freeze(copy.deepcopy(merged))  # frozen layers as any others
    assert same(bits(next(iter(layers(again).values()))), bits(next(iter(layers(merged).values()))))


def test_merged_model_is_saved_and_loaded(tmp_path):
    wide = {"hidden_size": 64, "head_dim": 32}
    merged = adapted(fp8.freeze(make("llama", **wide)), lora()).merge_and_unload().eval()
    fp8.save(merged, tmp_path)
    loaded = make("llama", **wide).eval()
    fp8.load(loaded, tmp_path)
    given = inputs("llama")
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, merged(**given).logits)


def test_adapters_merged_one_by_one_are_those_merged_together():
    results = []
    for order in (["default"], ["second"]), (["second"], ["default"]), (["default", "second"],):
        model = net("rowwise")
        model.add_adapter("second", register(peft.LoraConfig(r=2, target_modules=["0"])))
        module = loras(filled(model, "second", seed=5))[0]
        before = bits(module.base_layer)
        for names in order:
            module.merge(adapter_names=names)
        assert sorted(module.merged_adapters) == ["default", "second"]
        results.append(bits(module.base_layer))
        module.unmerge()
        assert same(bits(module.base_layer), before)
    assert same(results[0], results[2])
    # In another order sums round otherwise, and few codes are at a boundary.
    assert (results[0][0] != results[1][0]).float().mean() < 1e-3


def test_merged_layer_is_left_as_it_was_where_adapters_are_switched_off():
    model = adapted(frozen(), lora()).eval()
    before = {name: bits(layer) for name, layer in layers(model).items()}
    given = inputs("llama")
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        logits = model(**given).logits
        assert torch.equal(logits, frozen().eval()(**given).logits)
    assert all(same(bits(layer), before[name]) for name, layer in layers(model).items())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_bias_of_an_adapter_is_merged(recipe):
    model = net(recipe, lora_bias=True)
    module = loras(model)[0]
    with torch.no_grad():
        module.lora_B["default"].bias.fill_(0.5)
    before = bits(module.base_layer)
    model.merge_adapter()
    assert torch.equal(module.base_layer.bias, before[2] + 1.0)
    model.unmerge_adapter()
    assert same(bits(module.base_layer), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns, too
        without = net(recipe, bias=False, lora_bias=True)
    with pytest.raises(RuntimeError, match="'default' has a bias, and the layer has none"):
        without.merge_adapter()


def test_safe_merge_refuses_what_is_not_finite():
    model = net("rowwise")
    module = loras(model)[0]
    before = bits(module.base_layer)
    with torch.no_grad():
        module.lora_B["default"].weight[3, 0] = float("inf")
    with pytest.raises(ValueError, match="merging default gives values that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert same(bits(module.base_layer), before)
    assert not module.merged
    model.merge_adapter()  # not hidden either: the row's scale says so
    assert not module.base_layer.scales[3].isfinite()
    model.unmerge_adapter()
    assert same(bits(module.base_layer), before)


def test_static_scale_of_x_stays_when_merging():
    codes, scale = fp8.ops.quantize_tensorwise(torch.randn(32, 64))
    layer = fp8.FrozenLinear.from_codes(codes, scale, None, torch.tensor(0.02))
    config = register(peft.LoraConfig(r=4, target_modules=["0"]))
    model = filled(peft.get_peft_model(nn.Sequential(layer), config))
    model.merge_adapter()
    assert layer.static_scale == torch.tensor(0.02)
    assert model(torch.randn(4, 64)).isfinite().all()


def test_merged_layers_move_and_come_apart_as_copies():
    model = net("rowwise")
    before = bits(loras(model)[0].base_layer)
    model.merge_adapter()
    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.unmerge_adapter()
    assert same(bits(loras(copied)[0].base_layer)[:2], before[:2])
    assert loras(model)[0].merged


# --- what cannot be had -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"alora_invocation_tokens": [1]},
        *({"init_lora_weights": start} for start in ("pissa", "olora", "mica")),
    ],
    ids=str,
)
def test_register_refuses_what_reads_the_weight(options):
    config = lora(**options)
    name, value = next(iter(options.items()))
    what = re.escape(f"{name}={value!r}")
    with pytest.raises(ValueError, match=f"^fp8.integrations.peft: .*{what}"):
        register(config)
    model = adapted(frozen(), lora())
    with pytest.raises(ValueError, match=r"^fp8.integrations.peft: "):
        model.add_adapter("second", config)


@pytest.mark.parametrize("kind", ["ia3", "adalora"])
def test_register_refuses_other_configs(kind):
    expected = f"expected a peft.LoraConfig, got {type(_config(kind)).__name__}"
    with pytest.raises(TypeError, match=expected):
        register(_config(kind))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_without_our_class_says_what_to_do(safe):
    model = filled(peft.get_peft_model(frozen(), lora()))
    before = {name: bits(layer) for name, layer in layers(model).items()}
    with pytest.raises(NotImplementedError, match=r"Call fp8.integrations.peft.adopt\(model\)"):
        model.merge_adapter(safe_merge=safe)
    with pytest.raises(NotImplementedError, match=r"Linear.merge of peft.tuners.lora.layer takes"):
        model.merge_and_unload(safe_merge=safe)
    assert all(same(bits(layer), before[name]) for name, layer in layers(model).items())
    adopt(model).merge_adapter(safe_merge=safe)
    assert all(not same(bits(layer), before[name]) for name, layer in layers(model).items())
    assert {type(m) for m in loras(model)} == {FrozenLoraLinear}


def test_dora_without_our_class_says_what_to_do():
    with pytest.raises(NotImplementedError, match=r"dequantize_module_weight .* it is FP8 codes"):
        peft.get_peft_model(frozen(), lora(use_dora=True))


OTHERS = ("adalora", "ia3", "loha", "lokr", "oft", "boft", "vera", "hra", "fourierft")


@pytest.mark.parametrize("kind", OTHERS)
def test_no_other_adapter_takes_codes_for_numbers(kind):
    """They train, except HRA, whose forward reads the weight; none of them merges."""
    given, models = inputs("llama"), []
    for base in (frozen(), thawed(frozen())):
        torch.manual_seed(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models.append(peft.get_peft_model(base, _config(kind)).eval())
    model, plain = models
    before = {name: bits(layer) for name, layer in layers(model).items()}
    with torch.no_grad():
        if kind == "hra":
            with pytest.raises(NotImplementedError, match=r"HRALinear.forward .* it is FP8 codes"):
                model(**given)
        else:
            assert decibels(model(**given).logits, plain(**given).logits) > 15
    with pytest.raises(NotImplementedError, match=r"it is FP8 codes.*use plain LoRA"):
        model.merge_adapter()
    assert all(same(bits(layer), before[name]) for name, layer in layers(model).items())
