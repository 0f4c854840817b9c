"""Attention that takes the weight of a linear layer and does not call the layer.

Such a layer never runs in FP8, so it must not be reported as if it did: either `fp8.convert` leaves
it alone, or `fp8.summary` says after a forward that it was never called, and one warning does.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from converted import assert_close, converted_layers, every, randomize, step, summary_line
from torch import Tensor, nn
from torch.nn import functional as F

import fp8

IMAGE = {"img_size": 32, "num_classes": 10}


def _timm(name: str, **options: object):
    return lambda: timm.create_model(name, **(IMAGE | options))


def _wavlm(kind: str):
    def make() -> nn.Module:
        config = transformers.WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_buckets=32,
            apply_spec_augment=False,
            layerdrop=0.0,
        )
        return getattr(transformers, kind)(config)

    return make


def _mobilebert() -> nn.Module:
    """Its head reads the weights of two layers, one of which it also calls."""
    config = transformers.MobileBertConfig(
        vocab_size=64,
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        intra_bottleneck_size=32,
        max_position_embeddings=32,
    )
    return transformers.MobileBertForMaskedLM(config)


class QueryKeyValue(nn.Module):
    """A user's own attention of this kind: one qkv for self-attention and for cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(QueryKeyValue(), QueryKeyValue())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


MODELS = {
    "timm beit": (_timm("beit_base_patch16_224", embed_dim=32, depth=2, num_heads=2), image),
    "timm beitv2": (_timm("beitv2_base_patch16_224", embed_dim=32, depth=2, num_heads=2), image),
    "timm eva": (_timm("eva_giant_patch14_224", embed_dim=32, depth=2, num_heads=2,
                       patch_size=16, mlp_ratio=2.0), image),
    "timm eva02": (_timm("eva02_tiny_patch14_224", embed_dim=32, depth=2, num_heads=2,
                         patch_size=16), image),
    "timm swin v2": (_timm("swinv2_tiny_window8_256", embed_dim=16, depths=(1, 1),
                           num_heads=(2, 4), window_size=4), image),
    "torchvision swin": (lambda: torchvision.models.SwinTransformer(
        [2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=10), image),
    "torchvision swin v2": (lambda: torchvision.models.SwinTransformer(
        [2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=10,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2), image),
    "torchvision swin3d": (lambda: torchvision.models.video.SwinTransformer3d(
        [2, 4, 4], 16, [2], [2], [2, 4, 4], num_classes=10), lambda: torch.randn(1, 3, 4, 16, 16)),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(
        32, 16, 2, 2, 32, 64, num_classes=10), image),
    "transformers wavlm": (_wavlm("WavLMModel"), lambda: torch.randn(2, 800)),
    "transformers mobilebert": (_mobilebert, lambda: torch.randint(0, 64, (2, 16))),
    "one of the user's": (Sequence, lambda: torch.randn(2, 8, 32)),
}  # fmt: skip


def result(model: nn.Module, data: Tensor) -> Tensor:
    y = model(data)
    if not isinstance(y, Tensor):
        y = y.logits if "logits" in y else y.last_hidden_state
    return y.float().square().mean()


def never_called(model: nn.Module, data: Tensor) -> list[str]:
    """Names of the converted layers that a forward and backward does not call."""
    called = set()
    layers = converted_layers(model)
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in layers.values()]
    result(model, data).backward()
    for hook in hooks:
        hook.remove()
    return [name for name, layer in layers.items() if layer not in called]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_layers_that_never_run_in_fp8_are_not_reported_as_fp8(name, recipe):
    make, inputs = MODELS[name]
    data = inputs()
    model = fp8.convert(randomize(make()), recipe, filter=every)
    probe = copy.deepcopy(model)
    idle = never_called(probe, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            result(model, data).backward()
        lines = {layer: summary_line(model, layer) for layer in converted_layers(model)}
        fp8.summary(model)
    said = [str(w.message) for w in caught if "never called" in str(w.message)]
    for layer, line in lines.items():
        assert ("never called" in line) == (layer in idle), line
    assert len(said) == bool(idle), said
    for layer in idle[:1]:
        assert layer in said[0]


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights_give_the_right_gradients(name):
    make, inputs = MODELS[name]
    data = inputs()
    model = randomize(make())
    copied = fp8.convert(copy.deepcopy(model), filter=every)
    assert list(copied.state_dict()) == list(model.state_dict())
    ours, theirs = (step(m, lambda m: result(m, data)) for m in (copied, model))
    known = {w for w in ours.warned if "never called" in w}
    assert_close(ours._replace(warned=ours.warned - known), theirs)


def test_before_a_forward_nothing_is_said_to_be_never_called():
    """A model that has not run yet, and one of which a part is not used in this forward."""
    model = fp8.convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), filter=every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "never called" not in fp8.summary(model)
        model(torch.randn(2, 32))
        assert "never called" not in fp8.summary(model)


def test_a_part_that_runs_later_is_no_longer_never_called():
    model = nn.ModuleDict({"encoder": nn.Linear(32, 32), "decoder": nn.Linear(32, 32)})
    fp8.convert(model, filter=every)
    model["encoder"](torch.randn(2, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "never called" in summary_line(model, "decoder")
        model["decoder"](torch.randn(2, 32))
        assert "never called" not in fp8.summary(model)


def test_calls_are_noticed_through_functional_call_and_copies():
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    fp8.convert(model, filter=every)
    copied = copy.deepcopy(model)
    torch.func.functional_call(model, dict(model.named_parameters()), torch.randn(2, 32))
    copied(torch.randn(2, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "never called" not in fp8.summary(model)
        assert "never called" not in fp8.summary(copied)
