"""transformers' Trainer with converted models: the losses of nn.Linear, up to FP8."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from converted import convert, converted_layers, noticed
from tiny_transformers import make
from torch import Tensor, nn

import fp8

STEPS = 4


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(index % 2))
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module | None, folder: Any, **options: Any) -> transformers.Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    data = {"train_dataset": Texts(), "eval_dataset": options.pop("eval_dataset", None)}
    data |= {k: options.pop(k) for k in ("callbacks", "model_init") if k in options}
    arguments = transformers.TrainingArguments(**(settings | options))
    return transformers.Trainer(model=model, args=arguments, **data)


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def train(model: nn.Module, folder: Any, **options: Any) -> tuple[list[float], set[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(model, folder, **options)
        run.train()
    return losses(run), {str(w.message) for w in caught}


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "foreach": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
    "bitsandbytes": {"optim": "adamw_bnb_8bit"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
}


CASES = [(name, "tensorwise") for name in OPTIONS]
CASES += [(name, "delayed") for name in ("fused", "accumulation", "checkpointing", "reentrant")]


@pytest.mark.parametrize(("options", "recipe"), CASES)
def test_trainer_gives_the_losses_of_linear(options, recipe, tmp_path):
    model = make("llama")
    copied = convert(copy.deepcopy(model), recipe)
    theirs, expected_warnings = train(model, tmp_path / "a", **OPTIONS[options])
    ours, warned = train(copied, tmp_path / "b", **OPTIONS[options])
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=0.03)
    assert ours[-1] < ours[0]
    assert warned <= expected_warnings, warned - expected_warnings
    assert list(copied.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "bert", "gpt_oss"])
def test_trainer_of_other_families(family, tmp_path):
    model = make(family)
    copied = convert(copy.deepcopy(model))
    theirs, _ = train(model, tmp_path / "a")
    ours, _ = train(copied, tmp_path / "b")
    assert ours == pytest.approx(theirs, rel=0.03)


def test_trainer_resumes(tmp_path):
    """From a checkpoint in the middle, into a model that is converted again."""
    whole = convert(make("llama"))
    expected = trainer(whole, tmp_path / "a")
    expected.train()
    first = trainer(convert(make("llama")), tmp_path / "b", save_strategy="steps", save_steps=2)
    first.train()
    again = trainer(convert(make("llama")), tmp_path / "b", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert losses(again)[-2:] == pytest.approx(losses(expected)[-2:], rel=1e-4)
    saved = torch.load(tmp_path / "b" / "checkpoint-2" / "optimizer.pt")["state"]
    assert len(saved) == len(list(whole.parameters()))


def test_trainer_resumes_a_calibrated_model(tmp_path):
    """Trainer loads with load_state_dict: the scales come back into a model without any."""
    given = Texts()[0]["input_ids"][None]

    def calibrated() -> nn.Module:
        model = convert(make("llama"))
        with torch.no_grad(), fp8.calibrate(model):
            model(given)
        return model

    first = trainer(calibrated(), tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    scales = {n: m.input_scale for n, m in converted_layers(first.model).items()}
    again = trainer(convert(make("llama")), tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, layer in converted_layers(again.model).items():
        if scales[name] is not None:
            assert layer.input_scale is not None, name
            assert torch.equal(layer.input_scale, scales[name])


def test_trainer_evaluates_and_loads_the_best(tmp_path):
    model = convert(make("llama"))
    run = trainer(
        model,
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        eval_dataset=Texts(),
    )
    run.train()
    assert run.state.best_model_checkpoint is not None
    with fp8.cached_weights(model):
        inside = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == inside
    assert converted_layers(model)


def test_training_inside_cached_weights(tmp_path):
    """A whole Trainer run inside the context: noticed or refused, never old weights."""
    theirs, _ = train(convert(make("llama")), tmp_path / "a")
    model = convert(make("llama"))
    ours: list[float] = []

    def inside() -> None:
        with fp8.cached_weights(model):
            ours.extend(train(model, tmp_path / "b")[0])

    if noticed(inside):
        assert ours == pytest.approx(theirs, rel=1e-4)
