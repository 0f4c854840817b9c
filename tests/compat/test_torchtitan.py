"""The override for torchtitan: its own machinery finds, applies and builds it.

Of torchtitan 0.3.0 what describes and makes modules works with this torch; its models do not (they
import torch.distributed.fsdp.DataParallelMeshDims). So the model here is one of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports
from torchtitan.models.common.linear import Linear, ScaledBiasRowwiseLinear
from torchtitan.protocols.module import Module, ModuleList

import fp8
from fp8.integrations import torchtitan

NAME = "fp8.integrations.torchtitan.linear"
INIT = {"weight": lambda w: nn.init.normal_(w, std=0.1), "bias": nn.init.zeros_}


def config_of(k: int, n: int, kind: type = Linear, bias: bool = False) -> Linear.Config:
    return kind.Config(in_features=k, out_features=n, bias=bias, param_init=INIT)


class Block(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        up: Linear.Config
        scaled: Linear.Config
        down: Linear.Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = config.up.build()
        self.scaled = config.scaled.build()
        self.down = config.down.build()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.scaled(torch.relu(self.up(x))))


class Model(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layers: list[Block.Config] = field(default_factory=list)
        output: Linear.Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = ModuleList([layer.build() for layer in config.layers])
        self.output = config.output.build()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def model_config(k: int = 64, n: int = 96) -> Model.Config:
    blocks = [
        Block.Config(
            up=config_of(k, n, bias=True),
            scaled=config_of(n, n, ScaledBiasRowwiseLinear, bias=True),
            down=config_of(n, k),
        )
        for _ in range(2)
    ]
    return Model.Config(layers=blocks, output=config_of(k, 32))


def overridden(*tokens: str, config: Model.Config | None = None) -> Model.Config:
    config = config or model_config()
    apply_overrides(OverrideConfig(imports=parse_cli_imports(list(tokens))), config)
    return config


def test_override_is_named_on_the_command_line():
    config = overridden(NAME + '={"recipe": "rowwise", "small": true}')
    model = config.build()
    for block in model.layers:
        assert type(block.up) is type(block.down) is torchtitan.Linear
        assert block.up.recipe == block.down.recipe == "rowwise"
        assert isinstance(block.up, fp8.Linear)
        assert type(block.scaled) is ScaledBiasRowwiseLinear  # it computes something else
    assert type(model.output) is Linear
    assert "4 in FP8 (4 rowwise)" in fp8.summary(model)


def test_override_leaves_small_layers():
    config = overridden(NAME, config=model_config(16, 8))
    assert type(config.layers[0].up) is Linear.Config
    config = overridden(NAME, config=model_config(4096, 14336))
    assert type(config.layers[0].up) is torchtitan.Linear.Config
    assert config.layers[0].up.recipe == "tensorwise"
    assert config.layers[0].up.param_init is INIT


def test_overridden_model_trains_as_converted_by_hand():
    torch.manual_seed(1)
    plain = model_config().build()
    plain.init_states()
    model = overridden(NAME + '={"small": true}').build()
    model.init_states()  # torchtitan's own initialization finds the parameters
    assert float(model.layers[0].up.weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(32, 64)
    for block in plain.layers:
        for name in ("up", "down"):
            layer = getattr(block, name)
            exact = fp8.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            exact.load_state_dict(layer.state_dict())
            setattr(block, name, exact)
    for one in (plain, model):
        one(x).square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name].grad), name


def test_override_refuses_an_unknown_recipe():
    with pytest.raises(ValueError, match="e4m3"):
        overridden(NAME + '={"recipe": "e4m3"}')
