"""FP8 checkpoints between fp8 and the packages that write and read them: transformers with its own
quantizers, and compressed-tensors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_transformers import make
from torch import Tensor, nn

import fp8

E4M3 = torch.float8_e4m3fn
SIZE = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64}
FORMATS = [
    ("fp8", "blockwise"),
    ("fp8", "tensorwise"),
    ("compressed-tensors", "tensorwise"),
    ("compressed-tensors", "rowwise"),
    ("compressed-tensors", "blockwise"),
]


def llama() -> nn.Module:
    return make("llama", torch.bfloat16, **SIZE).eval()


def sqnr(actual: Tensor, expected: Tensor) -> float:
    noise = (actual.detach().float() - expected.detach().float()).norm()
    return float(20 * torch.log10(expected.detach().float().norm() / noise))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize(("format", "recipe"), FORMATS)
def test_saved_checkpoint_is_read_by_transformers(format, recipe, tmp_path):
    """On a CPU it makes bfloat16 of the weights: the numbers that ours stand for, where it does not
    round scales to bfloat16 first, as compressed-tensors does."""
    model = llama()
    ids = torch.randint(3, 96, (2, 16))
    exact = model(ids).logits
    fp8.freeze(model, recipe)
    fp8.save(model, tmp_path, format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs.eval()
    logits, ours = theirs(ids).logits, model(ids).logits
    for name, layer in linears(theirs).items():
        expected = model.get_submodule(name).dequantize()
        if format == "compressed-tensors":
            # scale and product are rounded by 2^-9 each, the code is exact
            torch.testing.assert_close(layer.weight, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(layer.weight, expected), name
    # Rounding to four bits in 14 layers: 20 to 25 dB. Wrong scales give less than 5.
    assert sqnr(ours, exact) > 15
    assert sqnr(logits, exact) > 15
    assert sqnr(ours, logits) > 15


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("format", "recipe"),
    [("fp8", "blockwise"), ("compressed-tensors", "rowwise")],
)
def test_saved_experts_are_read_by_transformers(family, format, recipe, tmp_path):
    """One by one, and merged by it: the same numbers, as above."""
    settings = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_local_experts": 4}
    settings |= {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 256}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=False, **settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    fp8.save(fp8.freeze(model, recipe), tmp_path, format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts"
    experts, other = model.get_submodule(name), theirs.get_submodule(name)
    assert type(experts) is fp8.FrozenExperts
    for weight, expected in zip(("gate_up_proj", "down_proj"), experts.dequantize(), strict=True):
        found = getattr(other, weight)
        if format == "compressed-tensors":
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected), weight


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_checkpoint_of_compressed_tensors_is_loaded(strategy, tmp_path):
    """Quantized and compressed by that package, with scales that it computes."""
    import compressed_tensors as ct
    import compressed_tensors.compressors
    import compressed_tensors.quantization
    from compressed_tensors.quantization import utils

    model = llama()
    blocks = {"block_structure": [128, 128]} if strategy == "block" else {}
    weights = ct.quantization.QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, **blocks
    )
    inputs = ct.quantization.QuantizationArgs(
        num_bits=8, type="float", strategy="token", dynamic=True
    )
    scheme = ct.quantization.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format="float-quantized"
    )
    config = ct.quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="float-quantized"
    )
    ct.quantization.apply_quantization_config(model, config)
    for layer in linears(model).values():
        magnitude = layer.weight.detach().abs()
        n, k = magnitude.shape
        # a row of what shares a scale
        groups = magnitude.reshape(1, -1) if strategy == "tensor" else magnitude
        if strategy == "block":
            padded = nn.functional.pad(magnitude, (0, -k % 128, 0, -n % 128))
            tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
            groups = tiles.reshape(-1, 128 * 128)
        amax = groups.amax(1)
        scale, _ = utils.calculate_qparams(-amax, amax, weights)
        layer.weight_scale.data.copy_(scale.reshape(layer.weight_scale.shape))
    compressor = ct.compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == E4M3
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": json.loads(config.model_dump_json())})
    )
    target = llama()
    done = fp8.load(target, tmp_path)
    assert len(done.frozen) == 14
    for name in linears(target):
        layer = target.get_submodule(name)
        assert torch.equal(
            layer.weight.view(torch.uint8), state[f"{name}.weight"].view(torch.uint8)
        )
        expected = state[f"{name}.weight_scale"].float().reshape(layer.scales.shape)
        assert torch.equal(layer.scales, expected)
    ids = torch.randint(3, 96, (2, 16))
    assert sqnr(target(ids).logits, llama()(ids).logits) > 15


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_fp8_checkpoint_with_a_device_map(device_map, tmp_path):
    from fp8.integrations.transformers._frozen_quantizer import frozen_config

    model = fp8.freeze(llama(), "rowwise")
    fp8.save(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=frozen_config(tmp_path), dtype=torch.bfloat16, device_map=device_map
    )
    for name, layer in linears(loaded).items():
        assert type(layer) is fp8.FrozenLinear
        expected = model.get_submodule(name)
        assert torch.equal(layer.weight.view(torch.uint8), expected.weight.view(torch.uint8))
        assert torch.equal(layer.scales, expected.scales)


def test_adapters_train_on_frozen_layers():
    """PEFT takes a frozen layer for an nn.Linear, and makes adapters in its compute_dtype."""
    import peft

    model = fp8.freeze(llama(), "rowwise")
    before = {n: m.weight.view(torch.uint8).clone() for n, m in linears(model).items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    adapters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 3 * 2
    assert {p.dtype for p in adapters.values()} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    ids = torch.randint(3, 96, (2, 16))
    losses = []
    for _ in range(8):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, codes in before.items():
        layer = adapted.base_model.model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        assert torch.equal(weight.view(torch.uint8), codes)
