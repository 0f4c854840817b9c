"""fp8.save and fp8.export_weights of mixtures: a tensor for each expert, as other engines read."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from checkpoint_files import raw
from reference import assert_same_bits
from torch import nn

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "tie_word_embeddings": False,
}
MOE = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
}
EXPERTS = "model.layers.1.mlp.experts"
IDS = torch.arange(18).view(2, 9)


def make(family: str = "qwen3_moe", **more) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **(SETTINGS | MOE[family] | more))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def converted(model: nn.Module, recipe: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(
            model, recipe, experts_recipe=recipe, filter=lambda m, n: n != "lm_head", fuse=False
        )


def only_experts(module: nn.Module, name: str) -> bool:
    return name.endswith("experts")


def quantization(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "rowwise:power_of_two"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "converted"])
def test_saved_experts_are_loaded_with_their_bits(family, recipe, frozen, tmp_path):
    """Also of a converted model, which stays as it is, and computes the same."""
    model = make(family)
    model = fp8.freeze(model, recipe) if frozen else converted(model, recipe)
    expected = model(IDS).logits
    fp8.save(model, tmp_path, max_shard_size=300_000)
    target = make(family)
    done = fp8.load(target, tmp_path)
    assert not done.dequantized
    experts = target.get_submodule(EXPERTS)
    assert type(experts) is fp8.FrozenExperts
    assert experts.power_of_two == ("power_of_two" in recipe)
    assert_same_bits(target(IDS).logits, expected)
    if frozen:
        own = model.get_submodule(EXPERTS)
        for name, value in own.state_dict().items():
            assert_same_bits(experts.state_dict()[name], value, name)
    else:
        assert type(model.get_submodule(EXPERTS)) is not fp8.FrozenExperts


NAMES = {"qwen3_moe": "gate_proj up_proj down_proj", "mixtral": "w1 w3 w2"}


@pytest.mark.parametrize(("family", "names"), NAMES.items())
def test_saved_experts_have_the_names_of_checkpoints(family, names, tmp_path):
    model = fp8.freeze(make(family), "blockwise")
    tensors = dict(fp8.export_weights(model, format="fp8"))
    assert not any(name.startswith(f"{EXPERTS}.gate_up") for name in tensors)
    module = model.get_submodule(EXPERTS)
    gate, up, down = names.split()
    for part, whole, rows in (
        (gate, "gate_up_proj", slice(0, 128)),
        (up, "gate_up_proj", slice(128, 256)),
        (down, "down_proj", slice(0, 256)),
    ):
        name = f"{EXPERTS}.2.{part}.weight"
        assert raw(tensors[name]) == raw(getattr(module, whole)[2, rows].detach())
        blocks = slice(rows.start // 128, rows.stop // 128)
        scale = module.scales(whole)[2, blocks].detach()
        assert_same_bits(tensors[f"{name}_scale_inv"], scale)
    fp8.save(model, tmp_path, "fp8")
    assert quantization(tmp_path)["weight_block_size"] == [128, 128]
    left = quantization(tmp_path)["modules_to_not_convert"]
    assert "lm_head" in left
    assert "model.layers.1.mlp.gate" in left  # a router is no nn.Linear here, and is elsewhere
    fp8.save(fp8.freeze(make(family), "rowwise"), tmp_path / "b")
    assert "model.layers.1.mlp.gate" in quantization(tmp_path / "b")["ignore"]
    assert list(quantization(tmp_path / "b")["config_groups"]) == ["group_0"]


def test_interleaved_experts_are_saved_merged():
    """gpt-oss: rows of gate and up alternate, so there is no part that a format has a name for."""
    model = fp8.freeze(make("gpt_oss"))
    tensors = dict(fp8.export_weights(model))
    module = model.get_submodule(EXPERTS)
    for name in ("gate_up_proj", "gate_up_proj_scale", "gate_up_proj_bias", "down_proj_bias"):
        assert raw(tensors[f"{EXPERTS}.{name}"]) == raw(getattr(module, name).detach())


def test_saved_experts_errors(tmp_path):
    model = make()
    fp8.freeze(model, filter=lambda module, name: "self_attn" in name)
    with pytest.raises(NotImplementedError, match=r"merged experts in high precision.*fp8.freeze"):
        fp8.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"experts.0.gate_proj has a scale per row, which .*'fp8'"):
        fp8.save(fp8.freeze(make(), "rowwise", filter=only_experts), tmp_path, "fp8")
    odd = fp8.freeze(make(moe_intermediate_size=192), "blockwise")
    with pytest.raises(ValueError, match="lie across gate and up, which are 192 rows each"):
        fp8.save(odd, tmp_path)
    assert not list(tmp_path.iterdir())


def test_load_refuses_experts_apart_for_interleaved_ones(tmp_path):
    source = fp8.freeze(make("qwen3_moe", moe_intermediate_size=48, hidden_size=256))
    fp8.save(source, tmp_path)
    target = make("gpt_oss")
    with pytest.raises(ValueError, match="rows of gate and up alternate"):
        fp8.load(target, tmp_path, strict=False)


def test_load_refuses_merged_codes_that_mean_nothing(tmp_path):
    from checkpoint_files import write

    model = fp8.freeze(make("gpt_oss"))
    tensors = {name: t.clone() for name, t in fp8.export_weights(model)}
    name = f"{EXPERTS}.gate_up_proj"
    without = {n: t for n, t in tensors.items() if n != f"{name}_scale"}
    with pytest.raises(ValueError, match=f"'{name}' is FP8 .* has no scale: expected {name}_scale"):
        fp8.load(make("gpt_oss"), write(tmp_path / "a", without))
    wrong = tensors | {f"{name}_scale": torch.ones(4, 95, 1)}
    with pytest.raises(ValueError, match=r"_scale': expected \[4, 96, 1\].*got \[4, 95, 1\]"):
        fp8.load(make("gpt_oss"), write(tmp_path / "b", wrong))
    target = make("gpt_oss", intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"expected codes \[4, 128, 256\] for experts .* got \[4, 96"
    ):
        fp8.load(target, write(tmp_path / "c", tensors))
