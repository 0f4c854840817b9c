"""timm and torchvision: small models train as with nn.Linear; their own tools keep working."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from converted import assert_same, assert_trains_alike, convert, converted_layers, randomize, step
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

TIMM = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "deit distilled": (
        "deit_tiny_distilled_patch16_224",
        {"embed_dim": 32, "depth": 1, "num_heads": 2},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    ),
    "xcit": (
        "xcit_nano_12_p16_224",
        {"embed_dim": 32, "depth": 1, "num_heads": 2, "cls_attn_layers": 1},
    ),
}


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=10)


def loss(model: nn.Module) -> Tensor:
    y = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    y = sum(y) if isinstance(y, tuple) else y
    return nn.functional.cross_entropy(y, torch.tensor([1, 7]))


def make(name: str) -> nn.Module:
    if name == "torchvision":
        return randomize(vit())
    if name == "mixer":
        mixer = timm.models.mlp_mixer.MlpMixer(
            num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=64
        )
        return randomize(mixer)
    kind, options = TIMM[name]
    size = {} if name == "convnext" else {"img_size": 32}
    return randomize(timm.create_model(kind, num_classes=10, **size, **options))


@pytest.mark.parametrize("name", [*TIMM, "mixer", "torchvision"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_model_trains_as_with_linear(name, recipe):
    assert_trains_alike(make(name), loss, recipe)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_timm_gradient_checkpointing_changes_no_bit(name, recipe):
    models = [convert(make(name), recipe) for _ in range(2)]
    models[1].set_grad_checkpointing(True)
    for index in range(20 if recipe == "delayed" else 1):
        if index == 17:  # outgrows the window
            with torch.no_grad():
                for one in models:
                    next(iter(converted_layers(one).values())).weight.mul_(3)
        assert_same(*(step(one, loss) for one in models))


@pytest.mark.parametrize("order", ["convert first", "extract first"])
def test_feature_extractor(order):
    """torchvision traces the model, through every module that is not torch's own."""
    model, node = randomize(vit()).eval(), "encoder.layers.encoder_layer_0.mlp"
    expected = []
    converted = convert(copy.deepcopy(model))
    converted.get_submodule(node).register_forward_hook(lambda m, a, y: expected.append(y))
    image = torch.randn(2, 3, 32, 32)
    if order == "convert first":
        extractor = create_feature_extractor(convert(model), [node])
    else:
        extractor = convert(create_feature_extractor(model, [node]))
    with torch.no_grad():
        converted(image)
        assert torch.equal(extractor(image)[node], expected[0])
