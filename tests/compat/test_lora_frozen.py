"""LoRA over frozen layers: trained, saved, loaded. What merging does: test_lora_merging.py.

Compared with LoRA over nn.Linear layers that hold the numbers of the codes, so that what differs is
x, quantized in the forward (e4m3: 2^-5.4 on average, or 31 dB), and dy, in the backward. Errors of
the dozen products on the way of two small decoder layers add in squares to about 20 dB, of a single
adapter to 13 and more; an adapter that is missing or scaled otherwise costs all of it.
"""

from __future__ import annotations

import peft
import pytest
import torch
from converted import step
from lora_models import RECIPES, adapted, decibels, filled, frozen, layers, lora, loras, thawed
from tiny_transformers import inputs, loss, make
from torch import nn
from transformers import AutoModelForCausalLM

import fp8
from fp8.integrations.peft import FrozenLoraLinear, adopt, register
from fp8.integrations.transformers._frozen_quantizer import FrozenConfig

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "bias": {"bias": "lora_only", "lora_bias": False},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 8}},
}


def of_adapters(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_lora_over_frozen_layers_has_the_gradients_of_lora_over_linear(recipe, dtype, options):
    base = frozen(recipe, dtype)
    plain = adapted(thawed(base), lora(**OPTIONS[options]))
    model = adapted(base, lora(**OPTIONS[options]))
    assert {type(m) for m in loras(model)} == {FrozenLoraLinear}
    ours, theirs = step(model, loss("llama")), step(plain, loss("llama"))
    assert ours.grads.keys() == theirs.grads.keys()
    assert set(of_adapters(model)) <= set(ours.grads)
    assert abs(ours.loss - theirs.loss) < 0.05
    for name, grad in theirs.grads.items():
        assert ours.grads[name].dtype == torch.float32, name  # PEFT's default for adapters
        assert decibels(ours.grads[name], grad) > 9, name
    together = [torch.cat([g.flatten() for g in s.grads.values()]) for s in (ours, theirs)]
    assert decibels(*together) > 16


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_lora_over_frozen_layers_learns_as_over_linear(recipe):
    losses = []
    for make_base in (lambda: frozen(recipe), lambda: thawed(frozen(recipe))):
        torch.manual_seed(3)
        model = adapted(make_base(), lora(lora_dropout=0.1))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        seen = []
        for _ in range(25):
            optimizer.zero_grad()
            value = model(**inputs("llama")).loss
            value.backward()
            optimizer.step()
            seen.append(value.item())
        losses.append(seen)
    ours, theirs = losses
    assert ours[-1] < ours[0] - 1.5
    assert abs(ours[-1] - theirs[-1]) < 0.15 * (theirs[0] - theirs[-1])


def test_frozen_bases_stay_as_they_are_in_training():
    base = frozen()
    before = {name: layer.weight.view(torch.uint8).clone() for name, layer in layers(base).items()}
    model = adapted(base, lora())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(**inputs("llama")).loss.backward()
    optimizer.step()
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    after = [layer.weight.view(torch.uint8) for layer in layers(model).values()]
    assert all(map(torch.equal, after, before.values()))


@pytest.mark.parametrize("autocast", [True, False])
def test_frozen_base_saves_nothing_of_x(autocast):
    """QLoRA's memory: of x the adapter saves one tensor, with adapters in bfloat16 x itself."""
    layer = fp8.FrozenLinear.from_linear(nn.Linear(64, 32).bfloat16(), "rowwise")
    net, config = nn.Sequential(layer), register(peft.LoraConfig(r=4, target_modules=["0"]))
    model = filled(peft.get_peft_model(net, config, autocast_adapter_dtype=autocast))
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    assert y.dtype == torch.bfloat16
    of_x = [t for t in saved if t.numel() == x.numel()]
    assert len(of_x) == 1
    assert of_x[0].dtype == (torch.float32 if autocast else torch.bfloat16)
    assert autocast or of_x[0].data_ptr() == x.data_ptr()
    assert not any(t.dtype == torch.float8_e4m3fn and t.numel() == x.numel() for t in saved)


def test_frozen_adapters_are_saved_and_loaded(tmp_path):
    model = adapted(frozen(), lora(lora_dropout=0.2)).eval()
    model.save_pretrained(tmp_path)
    names = set(peft.get_peft_model_state_dict(model))
    assert names == set(peft.utils.load_peft_weights(str(tmp_path), device="cpu"))
    loaded = peft.PeftModel.from_pretrained(frozen(), tmp_path)
    assert FrozenLoraLinear not in {type(m) for m in loras(loaded)}
    assert adopt(loaded) is loaded
    assert {type(m) for m in loras(loaded)} == {FrozenLoraLinear}
    given = inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(loaded.eval()(**given).logits, expected)
        plain = peft.PeftModel.from_pretrained(thawed(frozen()), tmp_path)
        assert decibels(expected, plain.eval()(**given).logits) > 18
    trained = peft.PeftModel.from_pretrained(frozen(), tmp_path, is_trainable=True)
    assert (
        step(adopt(trained), loss("llama")).grads.keys() == step(model, loss("llama")).grads.keys()
    )


def test_adopted_layers_keep_their_parameters():
    model = peft.get_peft_model(frozen(), lora())
    before = dict(model.named_parameters())
    assert adopt(adopt(model)) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    plain = adapted(make("llama"), lora())
    assert FrozenLoraLinear not in {type(m) for m in loras(adopt(plain))}


def test_another_adapter_is_added_and_loaded(tmp_path):
    model = adapted(frozen(), lora()).eval()
    model.add_adapter("second", register(lora(r=2)))
    filled(model, "second", seed=5)
    given = inputs("llama")
    with torch.no_grad():
        first = model(**given).logits
        model.set_adapter("second")
        second = model(**given).logits
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        model.load_adapter(tmp_path / "second", "third")
        model.set_adapter("third")
        assert torch.equal(model(**given).logits, second)
        assert decibels(first, second) < 20
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, frozen().eval()(**given).logits)
        mixed = model(input_ids=given["input_ids"], adapter_names=["default", "third"]).logits
        assert torch.allclose(mixed[0], first[0], atol=1e-4)
        assert torch.allclose(mixed[1], second[1], atol=1e-4)


def test_a_model_that_from_pretrained_froze_is_adapted(tmp_path):
    make("llama").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FrozenConfig("rowwise"), dtype=torch.bfloat16
    )
    model = adapted(base.train(), lora())
    assert {type(m) for m in loras(model)} == {FrozenLoraLinear}
    grads = step(model, loss("llama")).grads
    assert set(grads) == set(of_adapters(model))
    assert all(float(g.norm()) > 0 for g in grads.values())
    model.merge_and_unload()


def test_frozen_layers_of_a_converted_model_take_adapters():
    base = fp8.convert(make("llama"), "rowwise", filter=lambda m, name: "lm_head" not in name)
    model = adapted(fp8.freeze(base), lora())
    plain = adapted(make("llama"), lora())
    ours, theirs = step(model, loss("llama")), step(plain, loss("llama"))
    assert ours.grads.keys() == theirs.grads.keys()
    assert abs(ours.loss - theirs.loss) < 0.05
