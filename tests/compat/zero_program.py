"""Trains a small converted model under DeepSpeed, ZeRO 1 to 3: see test_deepspeed.py."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from two_processes import WORLD, answer, join

import fp8

STEPS = 3
RECIPES = ("tensorwise", "rowwise")
DTYPES = (torch.float32, torch.bfloat16)


def make(recipe: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)
    return model if recipe is None else fp8.convert(model, recipe, filter=lambda *_: True)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(WORLD * step + rank))


def train(recipe: str, dtype: torch.dtype, stage: int, rank: int, text: str) -> dict[str, Any]:
    import deepspeed

    model = make(None)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch's own
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
    }
    losses = []
    space = {"deepspeed": deepspeed, "fp8": fp8, "model": model, "config": config}
    space["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = text.replace("fp8.convert(model)", f"fp8.convert(model, {recipe!r})")
    first, _, rest = text.partition("\n")
    for step in range(STEPS):
        space["batch"] = batch(step, rank).to(dtype)
        if step == 0:
            exec(first, space)
        exec(rest, space)
        losses.append(float(space["loss"].detach()))
    layers = [m for m in space["engine"].module.modules() if isinstance(m, fp8.Linear)]
    assert [layer.recipe for layer in layers] == [recipe, recipe]
    parameters = list(space["engine"].module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        values = [p.detach().float().clone() for p in parameters]
    return {"losses": losses, "parameters": values}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    rank = join()
    import deepspeed.comm  # noqa: F401
    from test_integrations_page import nothing_is_small, snippet

    nothing_is_small(setattr)
    # It would compile an operator for collectives in shared memory, for two minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    text = snippet("DeepSpeed")
    results = {
        f"{recipe} {dtype} {stage}": train(recipe, dtype, stage, rank, text)
        for recipe in RECIPES
        for dtype in DTYPES
        for stage in (1, 2, 3)
    }
    answer(results)


if __name__ == "__main__":
    main()
