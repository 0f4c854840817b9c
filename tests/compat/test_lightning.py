"""lightning's Trainer: precisions, accumulation, checkpoints, averages of weights."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import pytest
import torch
from converted import convert, converted_layers, every, noticed, randomize
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

import fp8

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STEPS = 4


class Task(lightning.LightningModule):
    """A user's module: converted in its constructor, in configure_model, or from outside."""

    def __init__(self, recipe: str | None = None, where: str = "init", fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))
        self.recipe, self.where, self.fused = recipe, where, fused
        self.seen: list[float] = []
        if recipe is not None and where == "init":
            convert(self.net, recipe)

    def configure_model(self) -> None:
        if self.recipe is not None and self.where == "configure_model":
            convert(self.net, self.recipe)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self(batch) - batch).float().square().mean()
        self.seen.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self(batch) - batch).float().square().mean()
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4, fused=self.fused)


def batches() -> torch.utils.data.DataLoader[Tensor]:
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    return torch.utils.data.DataLoader(data, batch_size=8)


def fit(task: Task, folder: Any, **options: Any) -> tuple[lightning.Trainer, set[str]]:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    path = options.pop("ckpt_path", None)
    run = lightning.Trainer(**(settings | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(task, batches(), batches() if options.get("check") else None, ckpt_path=path)
    return run, {str(w.message) for w in caught}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_precisions(precision, recipe, tmp_path):
    fused = precision != "16-mixed"  # lightning clips and scales, and wants it so
    plain, task = Task(fused=fused), Task(recipe, fused=fused)
    _, expected = fit(plain, tmp_path, precision=precision)
    _, warned = fit(task, tmp_path, precision=precision)
    assert len(task.seen) == STEPS
    assert task.seen == pytest.approx(plain.seen, rel=0.05)
    assert warned <= expected, warned - expected
    assert list(task.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("where", ["init", "configure_model", "outside"])
def test_places_to_convert(where, tmp_path):
    plain, task = Task(), Task("tensorwise", where)
    if where == "outside":
        fp8.convert(task, filter=every)
    fit(plain, tmp_path)
    fit(task, tmp_path)
    assert converted_layers(task)
    assert task.seen == pytest.approx(plain.seen, rel=0.05)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_and_clipping(clip, fused, tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    plain, task = Task(fused=fused and clip is None), Task("rowwise", fused=fused and clip is None)
    fit(plain, tmp_path, **options)
    fit(task, tmp_path, **options)
    assert task.seen == pytest.approx(plain.seen, rel=0.05)


def resumed(recipe: str | None, scaled: bool, folder: Any) -> tuple[Task, Task]:
    """A task trained for two epochs, and another that takes over after the first."""

    def task() -> Task:
        made = Task(recipe)
        if scaled:
            with torch.no_grad(), fp8.calibrate(made):
                made(next(iter(batches())))
        return made

    whole, rest = task(), Task(recipe)
    fit(whole, folder, max_steps=2 * STEPS)
    keep = ModelCheckpoint(dirpath=folder, filename="half")
    fit(task(), folder, enable_checkpointing=True, callbacks=[keep])
    fit(rest, folder, ckpt_path=str(folder / "half.ckpt"), max_steps=2 * STEPS)
    return whole, rest


@pytest.mark.parametrize("scaled", [False, True])
def test_checkpoint_and_resume(scaled, tmp_path):
    """The first loss is that of the run without a break. Those after it are lightning's affair
    (it takes the batches in another order): what they are with nn.Linear."""
    _, plain = resumed(None, False, tmp_path / "plain")
    whole, rest = resumed("tensorwise", scaled, tmp_path / "fp8")
    assert rest.seen[0] == whole.seen[STEPS]
    assert rest.seen == pytest.approx(plain.seen, rel=0.05)
    for name, layer in converted_layers(whole).items():
        scale = converted_layers(rest)[name].input_scale
        if layer.input_scale is None:
            assert scale is None
        else:
            assert torch.equal(scale, layer.input_scale)


def test_load_from_checkpoint(tmp_path):
    task = Task("tensorwise")
    run, _ = fit(task, tmp_path)
    run.save_checkpoint(tmp_path / "end.ckpt")
    x = next(iter(batches()))
    for loaded in (
        Task.load_from_checkpoint(tmp_path / "end.ckpt", recipe="tensorwise"),
        fp8.convert(Task.load_from_checkpoint(tmp_path / "end.ckpt"), filter=every),
    ):
        with torch.no_grad():
            assert torch.equal(loaded(x), task(x))


def test_stochastic_weight_averaging(tmp_path):
    plain, task = Task(), Task("tensorwise")
    for one in (plain, task):
        swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, device=None)
        fit(one, tmp_path, callbacks=[swa], max_steps=-1, max_epochs=3)
    assert task.seen == pytest.approx(plain.seen, rel=0.07)
    x = next(iter(batches()))
    with torch.no_grad():
        assert torch.allclose(task(x), plain(x), atol=0.2)


def test_whole_fit_inside_cached_weights(tmp_path):
    plain, task = Task("tensorwise"), Task("tensorwise")
    fit(plain, tmp_path)

    def inside() -> None:
        with fp8.cached_weights(task):
            fit(task, tmp_path)

    if noticed(inside):
        assert task.seen == pytest.approx(plain.seen, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision):
    values = []
    for recipe in (None, "tensorwise"):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        task = Task(recipe, fused=False)
        with fabric.init_module(empty_init=False):
            fp8.Linear(8, 8)
        net, optimizer = fabric.setup(task.net, torch.optim.AdamW(task.net.parameters(), lr=1e-2))
        losses = []
        for batch in batches():
            with fabric.no_backward_sync(net, enabled=False):
                loss = net(batch).float().square().mean()
                fabric.backward(loss)
            if precision != "16-mixed":
                fabric.clip_gradients(net, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        values.append(losses)
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_fabric_init_module_of_a_mixture_of_defaults():
    """init_module sets default dtype and device around the constructor: convert inside it."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module():
        net = nn.Sequential(nn.Linear(64, 64))
        convert(net)
        with torch.no_grad(), fp8.calibrate(net):
            net(torch.randn(4, 64))
    assert net[0].weight.dtype == torch.bfloat16
    assert net[0].input_scale.dtype == torch.float32
    net(torch.randn(4, 64, dtype=torch.bfloat16)).sum().backward()
