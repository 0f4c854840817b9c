"""fp8.load of mixtures: experts are a tensor each in the files, and merged in the model."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import codes, raw, scales, write
from reference import assert_same_bits, expand_scale

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
EXPERTS = "model.layers.0.mlp.experts"


def mixture() -> torch.nn.Module:
    config = transformers.AutoConfig.for_model("qwen3_moe", **SETTINGS)
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()


def files(granularity: str) -> dict[str, torch.Tensor]:
    """All linears and experts but the router and the head in FP8."""
    tensors = {}
    for name, value in mixture().state_dict().items():
        if name.startswith(EXPERTS):
            for expert, matrix in enumerate(value):
                names = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                    tensors[f"{EXPERTS}.{expert}.{part}.weight"] = rows
        else:
            tensors[name] = value
    for name, value in list(tensors.items()):
        if "proj.weight" in name:
            n, k = value.shape
            shapes = {
                "tensorwise": (),
                "rowwise": (n, 1),
                "blockwise": (-(-n // 128), -(-k // 128)),
            }
            tensors[name] = codes(n, k)
            tensors[f"{name}_scale_inv"] = scales(*shapes[granularity])
    return tensors


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise", "blockwise"])
def test_load_dequantizes_experts(granularity, tmp_path):
    """Each with its own scale: gate and up have scales of their own, whatever the blocks."""
    tensors, target = files(granularity), mixture()
    done = fp8.load(target, write(tmp_path, tensors))
    assert len(done.frozen) == 4
    assert done.dequantized == (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    assert "2 parameters dequantized, where no frozen layer can be (experts" in str(done)
    experts = target.get_submodule(EXPERTS)
    for expert in range(4):
        parts = {}
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{EXPERTS}.{expert}.{part}.weight"
            scale = expand_scale(tensors[f"{name}_scale_inv"], tensors[name].shape)
            parts[part] = (tensors[name].float() * scale).bfloat16()
        gate_up = torch.cat([parts["gate_proj"], parts["up_proj"]])
        assert_same_bits(experts.gate_up_proj[expert].detach(), gate_up)
        assert_same_bits(experts.down_proj[expert].detach(), parts["down_proj"])
    layer = target.model.layers[0].self_attn.q_proj
    assert raw(layer.weight.detach()) == raw(tensors["model.layers.0.self_attn.q_proj.weight"])
    assert target(torch.randint(96, (1, 5))).logits.isfinite().all()


def test_load_copies_experts_in_high_precision(tmp_path):
    tensors = files("blockwise")
    for name in [name for name in tensors if name.startswith(EXPERTS)]:
        if name.endswith("weight"):
            tensors[name] = torch.randn(tensors[name].shape, dtype=torch.bfloat16)
        else:
            del tensors[name]
    target = mixture()
    done = fp8.load(target, write(tmp_path, tensors))
    assert not done.dequantized
    up = target.get_submodule(EXPERTS).gate_up_proj[2, 48:]
    assert_same_bits(up.detach(), tensors[f"{EXPERTS}.2.up_proj.weight"])


def test_load_refuses_experts_that_are_not_whole(tmp_path):
    tensors = files("blockwise")
    missing = f"{EXPERTS}.2.up_proj.weight"
    left = {name: value for name, value in tensors.items() if name != missing}
    with pytest.raises(ValueError, match=f"'{missing}' is missing, of experts"):
        fp8.load(mixture(), write(tmp_path, left))
    del tensors[f"{missing}_scale_inv"]
    with pytest.raises(ValueError, match=f"'{missing}' is FP8 .* has no scale"):
        fp8.load(mixture(), write(tmp_path, tensors))
