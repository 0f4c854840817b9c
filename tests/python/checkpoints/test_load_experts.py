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


def mixture(**more) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model("qwen3_moe", **(SETTINGS | more))
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()


def files(granularity: str, **more) -> dict[str, torch.Tensor]:
    """All linears and experts but the router and the head in FP8."""
    tensors = {}
    for name, value in mixture(**more).state_dict().items():
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


WIDE = {"moe_intermediate_size": 256, "hidden_size": 384}


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise", "blockwise"])
def test_load_holds_the_codes_of_experts_once(granularity, tmp_path):
    """Of parameters on the meta device: memory of what they become, and of one tensor."""
    folder = write(tmp_path, files(granularity, **WIDE, num_experts=16))
    target = mixture(**WIDE, num_experts=16).cuda()
    target.get_submodule(EXPERTS).to("meta")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fp8.load(target, folder, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    experts = sum(p.nbytes for p in target.get_submodule(EXPERTS).parameters())
    assert experts > 4 * 2**20
    assert peak <= experts + 2**20  # of the linears, one tensor, and rounding


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("meta", [False, True], ids=["", "meta"])
def test_load_freezes_experts(granularity, meta, tmp_path):
    """The codes of the files, gate above up, each with its own scale; one for a tensor is one for
    each of its rows."""
    tensors, target = files(granularity, **WIDE), mixture(**WIDE)
    if meta:
        target.get_submodule(EXPERTS).to("meta")
    done = fp8.load(target, write(tmp_path, tensors))
    assert not done.dequantized
    assert len(done.frozen) == 5
    assert EXPERTS in done.frozen
    experts = target.get_submodule(EXPERTS)
    assert type(experts) is fp8.FrozenExperts
    assert experts.granularity == ("blockwise" if granularity == "blockwise" else "rowwise")
    assert experts.compute_dtype == torch.bfloat16
    assert not any(p.requires_grad for p in experts.parameters())
    for expert in range(4):
        for weight, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            names = [f"{EXPERTS}.{expert}.{part}.weight" for part in parts]
            expected = b"".join(raw(tensors[name]) for name in names)
            assert raw(getattr(experts, weight)[expert].detach()) == expected
            found = [tensors[f"{name}_scale_inv"] for name in names]
            if granularity == "tensorwise":
                rows = [tensors[name].shape[0] for name in names]
                found = [s.expand(n, 1) for s, n in zip(found, rows, strict=True)]
            assert_same_bits(experts.scales(weight)[expert].detach(), torch.cat(found))
    ids = torch.randint(96, (1, 5))
    logits = target(ids).logits
    assert logits.isfinite().all()
    # The same numbers as experts in high precision, but for what x and h lose.
    wide = mixture(**WIDE)
    wide.load_state_dict(target.state_dict(), strict=False)
    other = wide.get_submodule(EXPERTS)
    with torch.no_grad():
        for name, values in zip(("gate_up_proj", "down_proj"), experts.dequantize(), strict=True):
            getattr(other, name).copy_(values)
    x, index, weights = torch.randn(9, 384).bfloat16(), torch.randint(4, (9, 2)), torch.rand(9, 2)
    exact = other(x, index, weights).detach()
    assert (experts(x, index, weights) - exact).norm() < 0.08 * exact.norm()


def test_load_into_frozen_experts(tmp_path):
    """Of a model that is frozen already, and of its skeleton."""
    tensors = files("blockwise", **WIDE)
    folder = write(tmp_path, tensors)
    first = mixture(**WIDE)
    fp8.load(first, folder)
    for target in (fp8.freeze(mixture(**WIDE)), fp8.freeze(mixture(**WIDE), "blockwise")):
        done = fp8.load(target, folder)
        assert EXPERTS in done.frozen
        mine, others = target.state_dict(), first.state_dict()
        assert mine.keys() == others.keys()
        for name, value in others.items():
            assert_same_bits(mine[name], value, name)
    high = {name: t for name, t in mixture(**WIDE).state_dict().items() if "experts" not in name}
    for expert in range(4):
        for part, n, k in (("gate", 256, 384), ("up", 256, 384), ("down", 384, 256)):
            name = f"{EXPERTS}.{expert}.{part}_proj.weight"
            high[name] = torch.zeros(n, k, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"experts of .* are in high precision, .* fp8.freeze"):
        fp8.load(fp8.freeze(mixture(**WIDE)), write(tmp_path / "high", high))


def test_load_experts_static_inputs_are_not_taken(tmp_path):
    """Experts of one token would need one scale of x each: rows are scaled in the call."""
    tensors = files("tensorwise", **WIDE)
    for name in list(tensors):
        if name.startswith(EXPERTS) and name.endswith("weight"):
            tensors[name.replace("weight", "input_scale")] = torch.tensor(0.1)
    target = mixture(**WIDE)
    done = fp8.load(target, write(tmp_path, tensors))
    assert EXPERTS in done.frozen
    assert not done.unexpected


def test_load_dequantizes_a_custom_gate(tmp_path):
    target = mixture(**WIDE)
    experts = target.get_submodule(EXPERTS)
    experts.act_fn = torch.nn.Softplus()
    done = fp8.load(target, write(tmp_path, files("rowwise", **WIDE)))
    assert done.dequantized == (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    assert experts.gate_up_proj.dtype == torch.bfloat16


def test_load_dequantizes_experts(tmp_path):
    """Where blocks of gate and up are not whole: each has scales of its own."""
    granularity = "blockwise"
    tensors, target = files(granularity), mixture()
    done = fp8.load(target, write(tmp_path, tensors))
    assert len(done.frozen) == 4
    assert done.dequantized == (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    assert "2 parameters dequantized, where no frozen layer can be: model" in str(done)
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
