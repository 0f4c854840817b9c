"""The demo's transformer: causal, near the uniform loss at the start, biases where asked for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byte_model import ByteModel, ModelSize, parameter_count, rotary_tables, rotate

SIZE = ModelSize(width=32, hidden=48, layers=2, heads=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ByteModel(SIZE)


def test_model_maps_tokens_to_logits(model):
    logits = model(torch.randint(0, 256, (3, 10)))
    assert logits.shape == (3, 10, 256)


def test_model_is_causal(model):
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_model_starts_near_the_uniform_loss(model):
    tokens, targets = torch.randint(0, 256, (2, 8, 32))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - math.log(256)) < 0.2


def test_model_has_seven_linears_a_layer_and_a_head(model):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 7 * SIZE.layers + 1
    assert names[-1] == "lm_head"
    expected = 2 * 256 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert parameter_count(model) == expected


@pytest.mark.parametrize("bias", [False, True])
def test_model_biases_are_optional(bias):
    model = ByteModel(ModelSize(32, 48, 1, 4, bias=bias))
    assert (model.blocks[0].mlp.up_proj.bias is not None) == bias
    assert model.lm_head.bias is None


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    tables = rotary_tables(16, 8, torch.device("cpu"))
    x, y = torch.randn(2, 1, 1, 1, 8)
    rotated_x, rotated_y = (rotate(v.expand(1, 1, 16, 8), tables)[0, 0] for v in (x, y))
    torch.testing.assert_close(rotated_x.norm(dim=-1), x.norm().expand(16))
    products = rotated_x @ rotated_y.T  # [position of x, position of y]
    torch.testing.assert_close(products[3, 5], products[10, 12], rtol=1e-4, atol=1e-5)
