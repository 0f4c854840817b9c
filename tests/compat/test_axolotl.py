"""axolotl's plugin, loaded and called as axolotl does: by its name, between the model's loading and
its adapters. Its trainer needs packages of hundreds of MB and is not run here."""

from __future__ import annotations

import pytest
import torch
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from converted import converted_layers
from pydantic import BaseModel, ValidationError
from test_integrations_page import nothing_is_small
from tiny_transformers import loss, make

from fp8.integrations.axolotl import FP8Args, Plugin

NAME = "fp8.integrations.axolotl.Plugin"


@pytest.fixture
def manager():
    manager = PluginManager.get_instance()
    manager.register(NAME)
    yield manager
    manager.plugins.pop(NAME)


def test_plugin_is_found_by_its_name(manager):
    assert type(manager.plugins[NAME]) is Plugin
    assert isinstance(manager.plugins[NAME], BasePlugin)
    module, _, name = manager.get_input_args()[-1].rpartition(".")
    assert (module, name) == (FP8Args.__module__, "FP8Args")


@pytest.mark.parametrize("given", [{}, {"fp8_recipe": "rowwise"}])
def test_plugin_converts_the_model(manager, monkeypatch, given):
    nothing_is_small(monkeypatch.setattr)
    model = make("llama", torch.bfloat16)
    manager.post_model_build(DictDefault(given), model)
    recipe = given.get("fp8_recipe", "tensorwise")
    assert {layer.recipe for layer in converted_layers(model).values()} == {recipe}
    loss("llama")(model).backward()


def test_recipe_of_the_configuration_is_checked():
    """As axolotl makes its own configuration class: from the plugin's and its own."""

    class Config(BaseModel):
        learning_rate: float = 1e-4

    class Merged(Config, FP8Args):
        pass

    assert Merged(fp8_recipe="rowwise:power_of_two").fp8_recipe == "rowwise:power_of_two"
    assert Merged().fp8_recipe == "tensorwise"
    with pytest.raises(ValidationError, match="e4m3"):
        Merged(fp8_recipe="e4m3")
