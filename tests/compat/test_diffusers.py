"""diffusers: small UNets and transformers, attention processors, checkpointing, LoRA, EMA."""

from __future__ import annotations

import copy
import warnings

import diffusers
import peft
import pytest
import torch
from converted import (
    assert_close,
    assert_same,
    assert_same_keys,
    assert_trains_alike,
    convert,
    converted_layers,
    noticed,
    randomize,
    relative,
    step,
    twins,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

import fp8


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def call(model: nn.Module) -> Tensor:
    torch.manual_seed(8)
    name = type(getattr(model, "base_model", model)).__name__
    name = type(model).__name__ if not hasattr(model, "get_base_model") else name
    time = torch.tensor([3, 7])
    image, text = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 32)
    if "UNet" in name:
        return model(image, time, encoder_hidden_states=text).sample
    if "DiT" in name:
        return model(image, timestep=time, class_labels=torch.tensor([1, 2])).sample
    pooled = torch.randn(2, 32)
    if "SD3" in name:
        options = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return model(image, timestep=time, **options).sample
    if "Wan" in name:
        video = torch.randn(1, 4, 2, 8, 8)
        return model(video, timestep=time[:1], encoder_hidden_states=torch.randn(1, 6, 16)).sample
    assert "Flux" in name
    return model(
        hidden_states=torch.randn(2, 16, 4),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time.float() / 10,
        img_ids=torch.rand(16, 3).mul(4).floor(),
        txt_ids=torch.zeros(6, 3),
    ).sample


def loss(model: nn.Module) -> Tensor:
    y = call(model)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    return (y - target).square().mean()


MODELS = {"unet": unet, "dit": dit, "flux": flux, "sd3": sd3, "wan": wan}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomize(MODELS[request.param]()).train()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_model_trains_as_with_linear(model, recipe):
    assert_trains_alike(model, loss, recipe)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_gradient_checkpointing_changes_no_bit(model, recipe):
    models = [convert(copy.deepcopy(model), recipe) for _ in range(2)]
    models[1].enable_gradient_checkpointing()
    for index in range(20 if recipe == "delayed" else 1):
        if index == 17:  # outgrows the window
            with torch.no_grad():
                for one in models:
                    next(iter(converted_layers(one).values())).weight.mul_(3)
        steps = [step(one, loss) for one in models]
        assert_same(*steps, tolerance=1e-5)
    if recipe == "delayed":
        assert all(m.recipe == "delayed" for m in converted_layers(models[0]).values())


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_attention_processors_changed_after_conversion(processor):
    model, copied = twins(randomize(unet()))
    for one in (model, copied):
        one.set_attn_processor(processor())
    assert_close(step(copied, loss), step(model, loss))


def test_attention_slicing_and_chunked_feed_forward():
    model, copied = twins(randomize(unet()), "rowwise")
    whole = step(copied, loss)
    copied.set_attention_slice("max")
    assert relative(step(copied, loss).loss, whole.loss) < 1e-2
    copied.set_attention_slice(None)
    model.eval(), copied.eval()


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_fused_projections(name):
    """fuse_qkv_projections makes new nn.Linear layers of the weights: before or after."""
    plain = randomize(MODELS[name]())
    exact = step(plain, loss)
    for order in ("fuse first", "convert first"):
        model = copy.deepcopy(plain)
        if order == "convert first":
            convert(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fuse_qkv_projections()
        if order == "fuse first":
            convert(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(model)
            text = fp8.summary(model)
        assert abs(float(value - exact.loss)) < 0.05 * max(1.0, float(exact.loss)), order
        for layer in (m for n, m in model.named_modules() if n.endswith("to_qkv")):
            assert isinstance(layer, fp8.Linear) == (order == "fuse first")
        assert "to_qkv" in text


@pytest.mark.parametrize("order", ["convert first", "adapters first"])
@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_lora_through_peft(name, order):
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    results = []
    for how in (None, order):
        model = randomize(MODELS[name]())
        if how == "convert first":
            convert(model)
        for p in model.parameters():
            p.requires_grad_(False)
        torch.manual_seed(2)
        model.add_adapter(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        if how == "adapters first":
            convert(model)
        results.append(step(model, loss))
    assert_close(results[1], results[0])


def test_lora_fused_and_unfused():
    model = convert(randomize(unet()))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.add_(0.1 * torch.randn(p.shape))
        before = call(model)
        model.fuse_lora()
        fused = call(model)
        model.unfuse_lora()
        again = call(model)
    assert relative(fused, before) < 0.3
    assert relative(again, before) < 0.15
    model.unload_lora()
    assert converted_layers(model)


def test_save_and_load_pretrained(model, tmp_path):
    copied = convert(copy.deepcopy(model))
    copied.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_keys(loaded, model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with torch.no_grad():
        assert torch.equal(call(convert(loaded)), call(copied.eval()))


def _averaged() -> tuple[nn.Module, EMAModel]:
    model = convert(randomize(unet()))
    average = EMAModel(model.parameters(), decay=0.5, foreach=True)
    with torch.no_grad():
        for _ in range(3):  # the first step takes the weights as they are
            for p in model.parameters():
                p.mul_(1.1)
            average.step(model.parameters())
    return model, average


def test_exponential_moving_average():
    """EMAModel copies the average into the model for a sample, and the weights back."""
    model, average = _averaged()
    with torch.no_grad():
        own = call(model)
        average.store(model.parameters())
        average.copy_to(model.parameters())
        sample = call(model)
        plain = convert(randomize(unet()))
        average.copy_to(plain.parameters())
        assert torch.equal(sample, call(plain))
        average.restore(model.parameters())
        assert torch.equal(call(model), own)
    assert relative(sample, own) > 1e-3


@pytest.mark.parametrize("foreach", [False, True])
def test_average_copied_inside_cached_weights(foreach):
    """copy_to writes through .data."""
    model, average = _averaged()
    average.foreach = foreach
    with torch.no_grad():
        plain = convert(randomize(unet()))
        average.copy_to(plain.parameters())
        expected = call(plain)
        with fp8.cached_weights(model):
            call(model)
            if noticed(lambda: average.copy_to(model.parameters())):
                assert torch.equal(call(model), expected)


def test_layerwise_casting():
    """Storage in another dtype between calls: the layer computes in what the hook makes of it."""
    model, copied = twins(randomize(dit()))
    for one in (model, copied):
        one.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.no_grad():
        assert relative(call(copied), call(model)) < 0.2
    dtypes = {m.weight.dtype for m in converted_layers(copied).values()}
    assert torch.bfloat16 in dtypes


def test_group_offloading():
    copied = convert(randomize(unet()))
    with torch.no_grad():
        expected = call(copied)
        copied.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
        )
        for _ in range(2):
            assert torch.equal(call(copied), expected)
