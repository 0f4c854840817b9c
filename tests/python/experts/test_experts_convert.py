"""fp8.convert, revert and summary of Hugging Face's mixtures of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    FAMILIES,
    experts_of,
    make,
    only_experts,
    relative,
    summary_row,
    tokens,
    transformers,
)
from torch import nn

import fp8
from fp8.integrations.transformers import _experts as experts


def every(module, name):
    return True


def totals(model):
    return fp8.summary(model).splitlines()[-1]


def implementations(model):
    return {m.config._experts_implementation for m in experts_of(model).values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_and_revert_round_trip(family):
    model = make(family)
    fresh = {name: dict(vars(m)) for name, m in model.named_modules()}
    expected = model(tokens()).logits
    assert fp8.convert(model, filter=only_experts) is model
    assert implementations(model) == {"fp8"}
    assert not torch.equal(model(tokens()).logits, expected)
    assert fp8.revert(model) is model
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == fresh
    assert torch.equal(model(tokens()).logits, expected)


def test_convert_gives_back_the_implementation_that_was_chosen():
    model = make("mixtral")
    model.set_experts_implementation("eager")
    fp8.convert(model, filter=only_experts)
    assert implementations(fp8.revert(model)) == {"eager"}


def test_convert_changes_no_other_model_of_the_same_config():
    """A config is shared by whoever was made of it: the baseline must stay what it is."""
    config = make("mixtral").config
    kind = transformers.MixtralForCausalLM
    model, baseline = kind(config), kind(config)
    assert model.config is baseline.config
    fp8.convert(model, filter=only_experts)
    assert implementations(model) == {"fp8"}
    assert implementations(baseline) == {config._experts_implementation} == {"grouped_mm"}


def test_convert_module_by_module():
    """What the filter leaves out keeps its implementation, and follows the model's."""
    model = make("mixtral")
    only = "model.layers.1.mlp.experts"
    fp8.convert(model, filter=lambda module, name: name == only, fuse=False)
    first, second = experts_of(model).values()
    assert (experts.in_fp8(first), experts.in_fp8(second)) == (False, True)
    model.set_experts_implementation("eager")
    assert first.config._experts_implementation == "eager"
    assert second.config._experts_implementation == "fp8"
    assert totals(model).startswith("2 experts: 1 in FP8 (1 rowwise), 1 left alone; 50.0%")
    assert implementations(fp8.revert(model)) == {"eager"}


@pytest.mark.filterwarnings("ignore:fp8.convert converted nothing")
def test_convert_asks_the_filter_about_linears_and_experts_once():
    model = make("deepseek_v3")
    seen = []
    fp8.convert(model, filter=lambda module, name: seen.append((name, module)) or False)
    expected = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected |= experts_of(model)
    assert len(seen) == len(expected)
    assert dict(seen) == expected


@pytest.mark.parametrize(
    ("recipe", "experts_recipe", "expected"),
    [
        ("tensorwise", None, "rowwise"),
        ("rowwise_gw_hp", None, "rowwise"),
        ("tensorwise", "rowwise_gw_hp", "rowwise_gw_hp"),
        ("tensorwise", "rowwise_fast", "rowwise_fast"),
        ("delayed", "rowwise:power_of_two", "rowwise:power_of_two"),
        ("rowwise", fp8.Recipe("rowwise", power_of_two=True), "rowwise:power_of_two"),
    ],
)
def test_convert_recipes_of_experts(recipe, experts_recipe, expected):
    model = fp8.convert(make("mixtral"), recipe, filter=every, experts_recipe=experts_recipe)
    assert {experts.recipe_of(m) for m in experts_of(model).values()} == {expected}
    linears = [m for m in model.modules() if isinstance(m, fp8.Linear)]
    assert {m.recipe for m in linears} == {recipe}


def test_convert_again_changes_the_recipe():
    model = fp8.convert(make("mixtral"), filter=only_experts, fuse=False)
    before = {name: m.config for name, m in experts_of(model).items()}
    fp8.convert(model, filter=only_experts, experts_recipe="rowwise_gw_hp", fuse=False)
    assert totals(model).startswith("2 experts: 2 in FP8 (2 rowwise_gw_hp)")
    assert {id(m.config) for m in experts_of(fp8.revert(model)).values()} == {id(model.config)}
    assert model.config not in before.values() or model.config is not next(iter(before.values()))


def test_convert_refuses_an_unknown_experts_recipe():
    model = make("mixtral")
    with pytest.raises(ValueError, match=r"per row or block, .*'rowwise', .*got 'tensorwise'"):
        fp8.convert(model, filter=every, experts_recipe="tensorwise")
    assert implementations(model) == {"grouped_mm"}
    assert not any(isinstance(m, fp8.Linear) for m in model.modules())


def test_set_experts_implementation_without_convert():
    fp8.integrations.transformers.register()
    model = make("qwen3_moe")
    model.set_experts_implementation("fp8")
    assert totals(model).startswith("2 experts: 2 in FP8 (2 rowwise)")
    expected = make("qwen3_moe")(tokens()).logits
    assert relative(model(tokens()).logits, expected) > 0
    assert implementations(fp8.revert(model)) == {"grouped_mm"}
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("by_convert", [True, False])
def test_experts_that_cannot_run_in_fp8_run_as_before(by_convert, monkeypatch):
    model = make("mixtral")
    if by_convert:
        model.set_experts_implementation("eager")
        fp8.convert(model, filter=only_experts, fuse=False)
    else:
        fp8.integrations.transformers.register()
        model.set_experts_implementation("fp8")
    monkeypatch.setattr(experts, "_DTYPES", (torch.bfloat16, torch.float16))
    plain = make("mixtral")
    plain.set_experts_implementation("eager" if by_convert else "grouped_mm")
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    before = "eager" if by_convert else "grouped_mm"
    why = f"float32 weights; FP8 takes bfloat16, float16, float32: runs {before}"
    assert summary_row(model, "model.layers.0.mlp.experts")[-1] == f"rowwise ({why})"
    assert totals(model).startswith("2 experts: 0 in FP8 (none), 2 left alone")
    with fp8.cached_weights(model):
        model(tokens())


def test_convert_leaves_alone_what_it_cannot_take():
    model = make("mixtral").double()
    with pytest.warns(UserWarning, match="and 2 experts modules were left alone"):
        fp8.convert(model, filter=every)
    assert summary_row(model, "model.layers.0.mlp.experts")[-1].startswith(
        "- (float64 weights; FP8 takes"
    )


def test_convert_refuses_too_many_experts():
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_local_experts=1024, num_hidden_layers=1
    )
    with torch.device("meta"):
        module = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    assert experts.refused(module) == "1024 experts; FP8 takes up to 1023"


def test_summary_has_a_line_for_each_experts_module():
    model = fp8.convert(make("gpt_oss", dtype=torch.bfloat16), filter=only_experts, fuse=False)
    shape = "4 x (64 -> 96, 48 -> 64)"  # stored transposed
    assert summary_row(model, "model.layers.1.mlp.experts") == [shape, "bfloat16", "rowwise"]
    names = [line.split()[0] for line in fp8.summary(model).splitlines()[1:-2]]
    wanted = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or experts.is_experts(m)
    }
    assert names == [name for name, _ in model.named_modules() if name in wanted]
    assert totals(model) == (
        "2 experts: 2 in FP8 (2 rowwise), 0 left alone; 100.0% of their weight elements in FP8"
    )


def test_summary_says_where_passes_are_not_fused():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=40, num_local_experts=4, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    model = fp8.convert(transformers.MixtralForCausalLM(config), filter=only_experts)
    name = "model.layers.0.mlp.experts"
    why = "passes not fused: extents that are not multiples of 16"
    assert summary_row(model, name)[-1] == f"rowwise ({why})"
    model(torch.arange(12)[None]).logits.sum().backward()
    module = experts_of(model)[name]
    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].tanh()
    experts.forget_gate(module)
    assert experts.gate_of(module) is None


@pytest.mark.parametrize(
    ("family", "gate"),
    [
        ("mixtral", ("silu", False, 1.702, 7.0)),
        ("deepseek_v3", ("silu", False, 1.702, 7.0)),
        ("gpt_oss", ("clamped_silu", True, 1.702, 7.0)),
    ],
)
def test_gating_is_recognized(family, gate):
    assert experts.gate_of(next(iter(experts_of(make(family)).values()))) == gate


def test_gating_follows_the_modules_numbers():
    module = next(iter(experts_of(make("gpt_oss")).values()))
    module.limit, module.alpha = 5.0, 1.5
    assert experts.gate_of(module) == ("clamped_silu", True, 1.5, 5.0)


def test_gating_that_clamps_is_not_taken_for_one_that_does_not():
    """As DeepSeek-V4's: SiLU with both sides clamped, which differs beyond the limit only."""
    module = next(iter(experts_of(make("mixtral")).values()))

    def clamped(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(min=-10.0, max=10.0)

    module._apply_gate = clamped
    assert experts.gate_of(module) is None
    assert experts.unfused(module) == "a gating of its own"


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None), ("quick_gelu", None)],
)
def test_gating_of_other_activations(activation, expected):
    model = make("mixtral")
    module = next(iter(experts_of(model).values()))
    module.act_fn = transformers.activations.ACT2FN[activation]
    gate = experts.gate_of(module)
    assert (gate and gate.activation) == expected


# --- cached weights ---


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_weights_of_experts(family):
    """The same values, made of the same codes; an update that PyTorch counts is seen."""
    model = fp8.convert(make(family), filter=only_experts)
    with torch.no_grad():
        expected = model(tokens()).logits
        with fp8.cached_weights(model):
            assert torch.equal(model(tokens()).logits, expected)
            assert torch.equal(model(tokens()).logits, expected)
            for module in experts_of(model).values():
                module.down_proj.mul_(1.5)
            changed = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, changed)
    assert not torch.equal(changed, expected)


def test_cached_weights_are_quantized_once():
    """What leaves no trace is not seen inside, which shows that the codes are kept."""
    model = fp8.convert(make("gpt_oss"), filter=only_experts)
    module = next(iter(experts_of(model).values()))
    index, weights = torch.arange(16).view(8, 2) % 4, torch.rand(8, 2)
    hidden = torch.randn(8, 64)
    up, down = module.gate_up_proj.data, module.down_proj.data
    with torch.no_grad(), fp8.cached_weights(model):
        first = module(hidden, index, weights)
        up.mul_(2.0)
        down.mul_(2.0)
        assert torch.equal(module(hidden, index, weights), first)
    with torch.no_grad():
        assert not torch.equal(module(hidden, index, weights), first)


def test_a_copy_is_converted_apart():
    model = fp8.convert(make("mixtral"), filter=only_experts)
    other = fp8.revert(copy.deepcopy(model))
    assert implementations(model) == {"fp8"}
    assert implementations(other) == {"grouped_mm"}
