"""ConvertCallback: Trainer converts its model, as fp8.convert before it would."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from converted import convert, converted_layers, every
from test_trainer import losses, trainer
from tiny_transformers import make

from fp8.integrations.transformers import ConvertCallback


def test_callback_converts_as_convert_does(tmp_path):
    model = make("llama")
    before = trainer(convert(copy.deepcopy(model), "rowwise"), tmp_path / "a")
    within = trainer(model, tmp_path / "b", callbacks=[ConvertCallback("rowwise", filter=every)])
    assert {layer.recipe for layer in converted_layers(model).values()} == {"rowwise"}
    before.train()
    within.train()
    assert losses(within) == losses(before)


def test_callback_converts_a_model_with_adapters(tmp_path):
    torch.manual_seed(1)
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    run = trainer(model, tmp_path, callbacks=[ConvertCallback(filter=every)])
    run.train()
    assert any("base_layer" in name for name in converted_layers(model))
    assert losses(run)[-1] < losses(run)[0]


def test_callback_converts_what_model_init_makes(tmp_path):
    """Trainer drops the model that its constructor had, and makes another."""
    made = []

    def init():
        made.append(make("llama"))
        return made[-1]

    run = trainer(None, tmp_path, model_init=init, callbacks=[ConvertCallback(filter=every)])
    run.train()
    assert len(made) == 2
    assert run.model is made[1]
    assert converted_layers(run.model)


def test_callback_converts_once(tmp_path):
    """Training again keeps what was done to a layer in between."""
    model = make("llama")
    run = trainer(model, tmp_path, callbacks=[ConvertCallback(filter=every)])
    run.train()
    name, layer = next(iter(converted_layers(model).items()))
    layer.recipe = "rowwise"
    run.train()
    assert converted_layers(model)[name].recipe == "rowwise"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "e4m3"}, ValueError, "e4m3"),
        ({"experts_recipe": "tensorwise"}, ValueError, "tensorwise"),
        ({"save": "int8"}, ValueError, "ConvertCallback: expected save out of"),
        ({"filters": every}, TypeError, "ConvertCallback: unknown option 'filters'; fp8.convert"),
    ],
)
def test_callback_says_at_once_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvertCallback(**arguments)
