"""FP8 weights through transformers' from_pretrained: the codes of the files, in frozen layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoint_files import FORMATS, raw, write
from reference import assert_same_bits, expand_scale
from torch import nn

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

from fp8.integrations.transformers._frozen_quantizer import (  # noqa: E402
    METHOD,
    FrozenConfig,
    frozen_config,
)

SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def make(family: str = "qwen3", **more) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **(SETTINGS | more))
    # Not .bfloat16(), which casts the frequencies of the rotation too.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def checkpoint(folder, format: str, family: str = "qwen3", **more):
    """A checkpoint of the family whose projections are in a format; and the file's tensors."""
    model = make(family, **more)
    model.save_pretrained(folder)
    state = transformers.modeling_utils.load_state_dict(folder / "model.safetensors")
    method, make_weight = FORMATS[format]
    tensors, granularities = {}, {}
    for name, value in state.items():
        prefix = name.removesuffix(".weight")
        if name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            weight = make_weight(*value.shape)
            tensors |= {f"{prefix}.{last}": tensor for last, tensor in weight.tensors.items()}
            granularities[prefix] = weight
        else:
            tensors[name] = value.clone()
    config = json.loads((folder / "config.json").read_text())
    write(folder, tensors, {"quant_method": method} if method else None)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | written | {"model_type": family}))
    return tensors, granularities


def load(folder, **options) -> nn.Module:
    config = frozen_config(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, **options
    )


@pytest.mark.parametrize("format", FORMATS)
def test_from_pretrained_has_the_bytes_of_the_file(format, tmp_path):
    tensors, weights = checkpoint(tmp_path, format)
    model = load(tmp_path)
    for prefix, weight in weights.items():
        layer = model.get_submodule(prefix)
        assert type(layer) is fp8.FrozenLinear, prefix
        source = weight.tensors.get("weight", weight.tensors.get("_weight_qdata"))
        assert raw(layer.weight.detach()) == raw(source)
        assert raw(layer.scales.detach()) == raw(weight.scales)
        assert layer.granularity == weight.granularity
        assert layer.scales.dtype == torch.float32
        assert not layer.weight.requires_grad
        assert not layer.scales.requires_grad
        assert (layer.static_scale is None) == (weight.static is None)
        assert layer.compute_dtype == torch.bfloat16
    assert type(model.lm_head) is nn.Linear
    assert raw(model.lm_head.weight.detach()) == raw(tensors["lm_head.weight"])
    # The same as without transformers' loading
    other = make()
    fp8.load(other, tmp_path)
    ids = torch.randint(96, (2, 9))
    assert_same_bits(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_from_pretrained_of_other_families(family, tmp_path):
    _, weights = checkpoint(tmp_path, "compressed-tensors, channel", family, pad_token_id=0)
    model = load(tmp_path)
    assert len(weights) == sum(type(m) is fp8.FrozenLinear for m in model.modules())
    assert model(torch.randint(96, (1, 5))).logits.isfinite().all()


WIDE = {"moe_intermediate_size": 128, "hidden_size": 256}
OF_EXPERTS = (
    "fp8, blocks",
    "fp8, blocks in bf16",
    "fp8, tensor",
    "fp8, tensor, static",
    "AutoFP8",
    "compressed-tensors, channel",
    "compressed-tensors, block",
    "ModelOpt, block",
)


@pytest.mark.parametrize("format", OF_EXPERTS)
def test_from_pretrained_freezes_experts(format, tmp_path, capfd):
    """transformers merges codes, and nothing is missing or unexpected; fp8.load has the same."""
    settings = MOE | WIDE
    tensors, weights = checkpoint(tmp_path / "a", format, "qwen3_moe", **settings)
    capfd.readouterr()
    model = load(tmp_path / "a")
    shown = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in shown
    assert "MISSING" not in shown
    experts = model.model.layers[1].mlp.experts
    assert type(experts) is fp8.FrozenExperts
    assert experts.compute_dtype == torch.bfloat16
    assert not any(p.requires_grad for p in experts.parameters())
    prefix = "model.layers.1.mlp.experts.3.up_proj"
    assert raw(experts.gate_up_proj[3, 128:].detach()) == raw(tensors[f"{prefix}.weight"])
    weight = weights[prefix]
    own = experts.gate_up_proj_scale_inv[3, 1:] if experts.granularity == "blockwise" else None
    if own is None:
        own = experts.gate_up_proj_scale[3, 128:]
    assert_same_bits(own.detach(), weight.scales.reshape(-1, own.shape[1]).expand(own.shape))
    other = make("qwen3_moe", **settings)
    fp8.load(other, tmp_path / "a")
    same_state(model, other)
    ids = torch.randint(96, (2, 9))
    assert_same_bits(model(ids).logits, other(ids).logits)
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    same_state(again, model)


def same_state(actual: nn.Module, expected: nn.Module) -> None:
    mine, others = actual.state_dict(), expected.state_dict()
    assert mine.keys() == others.keys()
    for name, value in others.items():
        assert_same_bits(mine[name], value, name)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "tensorwise:power_of_two"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_from_pretrained_quantizes_experts(recipe, family, tmp_path):
    """As fp8.freeze of the same model; and what is saved of it, merged or one by one, reloads."""
    settings = MOE | WIDE
    if family == "gpt_oss":  # transposed, interleaved, with biases
        settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
        settings |= {"max_position_embeddings": 128, "pad_token_id": 0}
    source = make(family, **settings)
    source.save_pretrained(tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.bfloat16, quantization_config=FrozenConfig(recipe)
    )
    fp8.freeze(source, recipe)
    same_state(model, source)
    experts = [m for m in model.modules() if type(m) is fp8.FrozenExperts]
    assert len(experts) == 2
    assert all(m.power_of_two == ("power_of_two" in recipe) for m in experts)
    ids = torch.randint(96, (2, 9))
    expected = model(ids).logits
    assert_same_bits(expected, source(ids).logits)
    model.save_pretrained(tmp_path / "b")
    fp8.save(model, tmp_path / "c")
    same_state(load(tmp_path / "c"), renamed(copy.deepcopy(model)))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    same_state(again, model)
    if "power_of_two" not in recipe:  # what transformers saves does not say how x is scaled
        assert_same_bits(again(ids).logits, expected)


def renamed(model: nn.Module) -> nn.Module:
    """compressed-tensors calls every scale of a linear layer weight_scale."""
    for module in model.modules():
        if isinstance(module, fp8.FrozenLinear) and module.scale_name == "weight_scale_inv":
            module._parameters["weight_scale"] = module._parameters.pop("weight_scale_inv")
            module.scale_name = "weight_scale"
    return model


@pytest.mark.parametrize("format", ["fp8, blocks"])
def test_from_pretrained_dequantizes_experts(format, tmp_path):
    """Where blocks of gate and up are not whole."""
    tensors, _ = checkpoint(tmp_path, format, "qwen3_moe", **MOE)
    model = load(tmp_path)
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16
    prefix = "model.layers.1.mlp.experts.3.up_proj"
    scale = next(v for n, v in tensors.items() if n.startswith(f"{prefix}.weight_"))
    weight = tensors[f"{prefix}.weight"]
    scale = scale.float() if scale.numel() > 1 else scale.float().reshape(())
    expected = (weight.float() * expand_scale(scale, weight.shape)).bfloat16()
    assert_same_bits(experts.gate_up_proj[3, 48:].detach(), expected)
    other = make("qwen3_moe", **MOE)
    fp8.load(other, tmp_path)
    ids = torch.randint(96, (2, 9))
    assert_same_bits(model(ids).logits, other(ids).logits)


FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_and_load_know_names_that_transformers_changes(family, tmp_path, capfd):
    """Mixtral's experts are w1, w3 and w2 of block_sparse_moe in files."""
    tensors, _ = checkpoint(tmp_path, "fp8, blocks in bf16", family, **FAMILIES[family])
    capfd.readouterr()
    model = load(tmp_path)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    other = make(family, **FAMILIES[family])
    done = fp8.load(other, tmp_path)
    assert len(done.frozen) == sum(type(m) is fp8.FrozenLinear for m in model.modules()) > 0
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    for name, value in others.items():
        # The router's correction is kept in float32: by from_pretrained, later by from_config too.
        exact = mine[name].to(value.dtype) if name.endswith("correction_bias") else mine[name]
        assert_same_bits(exact, value, name)
    if family == "mixtral":
        prefix = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
        scale = expand_scale(tensors[f"{prefix}_scale_inv"].float(), tensors[prefix].shape)
        expected = (tensors[prefix].float() * scale).bfloat16()
        up = mine["model.layers.0.mlp.experts.gate_up_proj"][1, 192:]
        assert_same_bits(up, expected)
    ids = torch.randint(96, (1, 7))
    assert_same_bits(model(ids).logits, other(ids).logits)


def test_from_pretrained_refuses_codes_without_scale(tmp_path):
    tensors, _ = checkpoint(tmp_path, "fp8, blocks")
    config = (tmp_path / "config.json").read_text()
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' is FP8 .* no scale"):
        load(tmp_path)


def test_from_pretrained_refuses_foreign_formats(tmp_path):
    checkpoint(tmp_path, "fp8, blocks")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    file.write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="is quantized by 'awq'"):
        load(tmp_path)


def test_saved_model_of_from_pretrained_reloads(tmp_path):
    checkpoint(tmp_path / "a", "compressed-tensors, block")
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == METHOD
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    ids = torch.randint(96, (2, 9))
    assert_same_bits(again(ids).logits, model(ids).logits)
    fp8.save(model, tmp_path / "c", "fp8")
    config = json.loads((tmp_path / "c/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert_same_bits(load(tmp_path / "c")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "tensorwise:power_of_two"])
@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_quantizes_what_is_in_high_precision(recipe, tied, tmp_path):
    source = make(tie_word_embeddings=tied)
    source.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=FrozenConfig(recipe)
    )
    fp8.freeze(source, recipe)
    mine, others = model.state_dict(), source.state_dict()
    assert mine.keys() == others.keys()
    for name, value in others.items():
        assert_same_bits(mine[name], value, name)
    ids = torch.randint(96, (2, 9))
    assert_same_bits(model(ids).logits, source(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16
    )
    for name, value in again.state_dict().items():
        assert_same_bits(value, mine[name], name)


def test_from_pretrained_gives_codes_that_no_cast_changes(tmp_path):
    """model.to(dtype), which transformers' own FP8Linear does not survive."""
    checkpoint(tmp_path, "fp8, blocks")
    model = load(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    before = raw(layer.weight.detach())
    model.to(torch.float16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert raw(layer.weight.detach()) == before
    assert model(torch.randint(96, (1, 4))).logits.dtype == torch.float16
