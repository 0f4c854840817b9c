"""fp8.freeze of mixtures: the codes that a converted model's experts compute with, kept."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference import assert_same_bits
from tiny_models import (
    FAMILIES,
    experts_of,
    make,
    only_experts,
    record_calls,
    relative,
    summary_row,
    tokens,
)
from torch import nn

import fp8

RECIPES = ("rowwise", "rowwise_gw_hp", "blockwise", "rowwise:power_of_two")


def converted(family, recipe, device="cpu", dtype=torch.bfloat16):
    model = make(family, device, dtype).eval()
    return fp8.convert(model, experts_recipe=recipe, filter=only_experts, fuse=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_freeze_experts_keeps_the_logits_of_the_converted_model(device, family, recipe):
    """Experts alone were converted: the linears stay in high precision."""
    model, ids = converted(family, recipe, device), tokens(device=device)
    with torch.no_grad():
        expected = model(ids).logits
    before = {name: id(m) for name, m in experts_of(model).items()}
    fp8.freeze(model)
    assert {name: id(m) for name, m in experts_of(model).items()} == before
    for module in experts_of(model).values():
        assert type(module) is fp8.FrozenExperts
        assert module.granularity == recipe.partition(":")[0].partition("_")[0]
        assert module.power_of_two == recipe.endswith("power_of_two")
        assert module.compute_dtype == torch.bfloat16
        assert not module.gate_up_proj.requires_grad
    with torch.no_grad():
        assert_same_bits(model(ids).logits, expected)
    assert not any(isinstance(m, fp8.FrozenLinear) for m in model.modules())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_freeze_experts_in_high_precision(device, family):
    """Half the bytes, and near what they were: e4m3 keeps 2^-5.4 of a weight, and of x and h."""
    model = make(family, device, torch.bfloat16).eval()
    original = experts_of(copy.deepcopy(model))
    before = {name: sum(p.nbytes for p in m.parameters()) for name, m in original.items()}
    fp8.freeze(model, filter=only_experts)
    calls = record_calls(model, lambda: model(tokens(device=device)))
    assert len(calls) == 2
    for (module, args, y), (name, other) in zip(calls, original.items(), strict=True):
        assert type(module) is fp8.FrozenExperts
        assert module.granularity == "rowwise"
        assert relative(y, other(*args)) < 0.08
        scales = sum(module.scales(w).nbytes for w in ("gate_up_proj", "down_proj"))
        biases = sum(b.nbytes for n, b in module.named_parameters() if n.endswith("bias"))
        own = sum(p.nbytes for p in module.parameters())
        assert own - scales - biases == (before[name] - biases) / 2


def test_freeze_experts_takes_everything_by_default():
    """Experts, and linears but head and routers; recipes that experts have not become rowwise."""
    model = fp8.freeze(make("qwen3_moe", dtype=torch.bfloat16), "tensorwise:power_of_two")
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is fp8.FrozenLinear
    assert kinds["lm_head"] is nn.Linear
    module = model.get_submodule("model.layers.1.mlp.experts")
    assert type(module) is fp8.FrozenExperts
    assert (module.granularity, module.power_of_two) == ("rowwise", True)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert linear.describe() == "tensorwise:power_of_two"
    blocks = fp8.freeze(make("qwen3_moe", dtype=torch.bfloat16), "blockwise")
    assert blocks.get_submodule("model.layers.1.mlp.experts").granularity == "blockwise"


def test_freeze_experts_leaves_alone_what_convert_left():
    """Small experts stay in high precision by default: frozen, a model keeps its bits."""
    model = make("mixtral", dtype=torch.bfloat16).eval()
    fp8.convert(model, filter=lambda module, name: "self_attn" in name)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    fp8.freeze(model, filter=lambda module, name: module is layer)
    row = summary_row(model, next(iter(experts_of(model))))
    assert "not frozen: in high precision beside layers that were converted" in row[-1]
    fp8.freeze(model)
    name, module = next(iter(experts_of(model).items()))
    assert type(module) is not fp8.FrozenExperts
    assert "(not frozen)" in summary_row(model, name)[-1]
    fp8.freeze(model, filter=only_experts)
    assert type(module) is fp8.FrozenExperts


def test_freeze_experts_summary_and_calls():
    model = fp8.freeze(make("mixtral", dtype=torch.bfloat16), "blockwise")
    name = next(iter(experts_of(model)))
    assert summary_row(model, name) == [
        "4 x (64 -> 192, 96 -> 64)",
        "float8_e4m3fn",
        "frozen blockwise",
    ]
    text = fp8.summary(model)
    assert "2 experts: 2 in FP8 (2 frozen blockwise), 0 left alone; 100.0%" in text
    experts_of(model)[name](torch.randn(3, 64), torch.zeros(3, 1).long(), torch.ones(3, 1))
    with pytest.warns(UserWarning, match="never called"):
        fp8.summary(model)


def test_freeze_experts_twice_and_convert_after():
    model = fp8.freeze(make("mixtral", dtype=torch.bfloat16).eval())
    ids = tokens()
    expected = model(ids).logits
    state = {name: t.clone() for name, t in model.state_dict().items()}
    fp8.freeze(model, "blockwise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fp8.convert(model, filter=lambda module, name: True, fuse=False)
        fp8.revert(model)
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, state[name], name)
    assert_same_bits(model(ids).logits, expected)


def test_freeze_experts_keeps_hooks_and_configs():
    """The implementation that others have stays: set_experts_implementation is of a config that
    all share."""
    model = make("mixtral", dtype=torch.bfloat16)
    fp8.integrations.transformers.register()
    model.set_experts_implementation("fp8")
    first, second = experts_of(model).values()
    seen = []
    first.register_forward_hook(lambda *args: seen.append(1))
    fp8.freeze(model, filter=lambda module, name: module is first)
    assert type(first) is fp8.FrozenExperts
    assert fp8.integrations.transformers.in_fp8(second)
    model(tokens())
    assert seen == [1]
    second_config = vars(second)["config"]
    converted_model = fp8.convert(make("mixtral"), filter=only_experts)
    module = next(iter(experts_of(converted_model).values()))
    fp8.freeze(converted_model)
    assert vars(module)["config"]._experts_implementation_internal != "fp8"
    assert second_config._experts_implementation_internal == "fp8"
    assert not any(key.startswith("fp8_") for key in vars(module))


class Custom(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_freeze_experts_leaves_alone_what_the_operator_has_not():
    model = make("mixtral", dtype=torch.bfloat16)
    first, second = experts_of(model).values()
    first.act_fn = Custom()
    second.down_proj = nn.Parameter(second.down_proj.double())
    fp8.freeze(model)
    assert type(first) is type(second) is not fp8.FrozenExperts
    names = list(experts_of(model))
    assert "not frozen: a gating of its own" in summary_row(model, names[0])[-1]
    assert "not frozen: float64 weights" in summary_row(model, names[1])[-1]


def test_freeze_experts_leaves_shared_weights_alone():
    model = make("mixtral", dtype=torch.bfloat16)
    first, second = experts_of(model).values()
    second.gate_up_proj = first.gate_up_proj
    fp8.freeze(model)
    name = next(iter(experts_of(model)))
    assert "not frozen: its weight is shared with model.layers.1" in summary_row(model, name)[-1]


def test_freeze_experts_alone_and_nothing_to_freeze():
    module = next(iter(experts_of(make("mixtral", dtype=torch.bfloat16)).values()))
    assert fp8.freeze(module) is module
    assert type(module) is fp8.FrozenExperts
    model = make("mixtral")
    with pytest.warns(UserWarning, match=r"froze nothing: of \d+ nn.Linear modules and 2 experts"):
        fp8.freeze(model, filter=lambda module, name: False)


def test_freeze_experts_on_the_meta_device():
    with torch.device("meta"):
        skeleton = make_empty()
    fp8.freeze(skeleton, "blockwise")
    source = fp8.freeze(make("mixtral", dtype=torch.bfloat16), "blockwise")
    mine, others = skeleton.state_dict(), source.state_dict()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert (tensor.shape, tensor.dtype) == (others[name].shape, others[name].dtype), name


def make_empty() -> nn.Module:
    from tiny_models import OWN, SHARED, transformers

    config = transformers.AutoConfig.for_model("mixtral", **(SHARED | OWN["mixtral"]))
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def test_freeze_experts_trains_what_is_around(device):
    """LoRA's case: gradients go through frozen experts to what is before them."""
    model = make("qwen3_moe", device, torch.bfloat16)
    fp8.freeze(model, filter=only_experts)
    ids = tokens(device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    embedding = model.get_input_embeddings().weight.grad
    assert embedding.isfinite().all()
    router = model.get_submodule("model.layers.0.mlp.gate").weight.grad
    assert router.abs().sum() > 0
    reference = make("qwen3_moe", device, torch.bfloat16)
    reference(input_ids=ids, labels=ids).loss.backward()
    exact = reference.get_input_embeddings().weight.grad
    # FP8 moves routing choices too, so only the direction is compared.
    cosine = torch.nn.functional.cosine_similarity(embedding.flatten(), exact.flatten(), 0)
    assert cosine > 0.8
