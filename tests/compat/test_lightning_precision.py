"""The precision plugins for lightning's Trainer and Fabric: what converting by hand gives."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from converted import convert, converted_layers, every
from test_lightning import Task, batches, fit

import fp8
from fp8.integrations.lightning import FabricPrecision, Precision


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_trainer_plugin_converts(precision, recipe, tmp_path):
    by_hand, task = Task(recipe), Task()
    fit(by_hand, tmp_path, precision=precision)
    fit(task, tmp_path, plugins=Precision(precision, recipe=recipe, filter=every))
    assert {layer.recipe for layer in converted_layers(task).values()} == {recipe}
    assert {p.dtype for p in task.parameters()} == {p.dtype for p in by_hand.parameters()}
    assert task.seen == by_hand.seen


def test_trainer_plugin_keeps_checkpoints_plain(tmp_path):
    task = Task()
    run, _ = fit(task, tmp_path, plugins=Precision(filter=every))
    run.save_checkpoint(tmp_path / "end.ckpt")
    plain = Task.load_from_checkpoint(tmp_path / "end.ckpt")
    assert not any(isinstance(m, fp8.Linear) for m in plain.modules())
    for name, value in plain.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), task.state_dict()[name]), name


def test_fabric_plugin_converts():
    values = []
    for by_hand in (True, False):
        if by_hand:
            fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
        else:
            plugin = FabricPrecision("bf16-true", recipe="rowwise", filter=every)
            fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=plugin)
        net = copy.deepcopy(Task().net)
        if by_hand:
            convert(net, "rowwise")
        net, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        assert converted_layers(net)
        losses = []
        for batch in batches():
            loss = net(batch).float().square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        values.append(losses)
    assert values[0] == values[1]


@pytest.mark.parametrize("plugin", [Precision, FabricPrecision])
def test_plugins_say_at_once_what_is_wrong(plugin):
    with pytest.raises(TypeError, match=f"{plugin.__name__}: unknown option 'recipes'"):
        plugin("bf16-true", recipes="rowwise")
    with pytest.raises(ValueError, match="e4m3"):
        plugin("bf16-true", recipe="e4m3")
