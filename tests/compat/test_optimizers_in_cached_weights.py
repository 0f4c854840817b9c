"""Inside fp8.cached_weights a step of any optimizer is noticed, or refused: never old weights.

Optimizers of torch, timm and bitsandbytes, written in Python and fused, compiled and wrapped.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import timm.optim
import torch
from converted import noticed, relative
from torch import nn
from watched_layer import OldStyle, assert_current, layer

import fp8

RECIPES = ("tensorwise", "rowwise", "blockwise", "delayed")


def check(module: fp8.Linear, update: Callable[[], Any], calls: int = 2) -> None:
    """Two rounds of forward, backward and update; after each, the weight as it is now counts."""
    x = torch.randn(32, 64).to(module.weight.dtype)
    dtype, before = module.weight.dtype, module.weight.detach().clone()
    with fp8.cached_weights(module):
        for _ in range(calls):
            module(x).float().square().mean().backward()
            if not noticed(update):
                break
            assert_current(module, x)
        else:
            assert not torch.equal(module.weight, before), "the updates did nothing"
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
    with torch.no_grad():
        exact = torch.ones(32, 48) @ module.weight.float()
    assert relative(leaf.grad, exact) < 0.15
    assert leaf.grad.dtype == dtype


def torch_optimizers() -> list[Any]:
    """Every class, with each way to run that its constructor knows and a CPU has."""
    cases = []
    for name in sorted(dir(torch.optim)):
        kind = getattr(torch.optim, name)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "SparseAdam", "LBFGS"):  # LBFGS has a test of its own
            continue
        known = inspect.signature(kind).parameters
        for options in ({}, {"fused": True}, {"foreach": True}, {"foreach": False}):
            if known.keys() >= options.keys():
                label = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
                cases.append(pytest.param(kind, options, id=label))
    return cases


@pytest.mark.parametrize(("kind", "options"), torch_optimizers())
def test_torch_optimizer(kind, options):
    module = layer()
    parameters = [module.weight] if kind.__name__ == "Muon" else module.parameters()
    check(module, kind(parameters, lr=0.05, **options).step)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_optimizer_of_every_recipe(recipe, dtype, kind):
    module = layer(recipe, dtype)
    check(module, kind(module.parameters(), lr=2.0, fused=True).step)


def test_lbfgs():
    module = layer()
    x = torch.randn(32, 64)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        value = module(x).square().mean()
        value.backward()
        return value

    check(module, lambda: optimizer.step(closure))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_and_load_state_dict_of_an_optimizer(set_to_none):
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.load_state_dict(optimizer.state_dict())

    check(module, update)


TIMM = ("adamw", "adamp", "adan", "adopt", "lamb", "lars", "lion", "madgradw", "nadamw",
        "rmsproptf", "sgdw", "adafactor", "adafactorbv", "laprop", "mars", "muon",
        "lookahead_adamw", "adabelief", "radabelief", "sgdp")  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_optimizer(name):
    module = layer()
    optimizer = timm.optim.create_optimizer_v2(module, opt=name, lr=0.05, weight_decay=0.01)
    check(module, optimizer.step)


BITSANDBYTES = ("AdamW", "AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit", "PagedAdamW8bit",
                "AdEMAMix", "RMSprop8bit", "Adagrad8bit")  # fmt: skip


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_optimizer(name):
    """Its kernels write weights through pointers: no version counter moves."""
    module = layer()
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    options |= {"min_8bit_size": 16} if name.endswith("8bit") and "Paged" not in name else {}
    optimizer = getattr(bitsandbytes.optim, name)(module.parameters(), lr=0.05, **options)

    def update():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()

    check(module, update)


class Wrapper:
    """As Apex, DeepSpeed and Accelerate do it: no subclass, holds one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("wrapped", [False, True])
def test_optimizer_that_writes_data(wrapped):
    module = layer()
    optimizer = OldStyle(module.parameters())
    check(module, (Wrapper(optimizer) if wrapped else optimizer).step)


def test_optimizer_made_inside_the_context():
    module = layer()
    made = []

    def update():
        if not made:
            made.append(OldStyle(module.parameters()))
        made[0].step()

    check(module, update)


def test_optimizer_of_another_model_refuses_nothing():
    """A step on parameters that are not cached goes through and costs no cached weight."""
    module, other = layer(), nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True, lr=0.1)
    other(torch.randn(2, 8)).sum().backward()
    before = other.weight.detach().clone()
    with fp8.cached_weights(module):
        module(torch.randn(4, 64))
        optimizer.step()
        assert_current(module, torch.randn(4, 64))
    assert not torch.equal(other.weight, before)


def test_steps_after_the_context_are_as_before():
    """Nothing stays behind: no hook of the context runs in later steps."""
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, lr=0.05)
    counts = [
        len(h) for h in (optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks)
    ]
    with fp8.cached_weights(module):
        module(torch.randn(4, 64)).sum().backward()
    assert counts == [
        len(h) for h in (optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks)
    ]
    for _ in range(2):
        optimizer.step()
        assert_current(module, torch.randn(4, 64))


def test_step_under_grad_scaler():
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def update():
        scaler.step(optimizer)
        scaler.update()

    scaler.scale(torch.ones(()))
    check(module, update)


def test_compiled_step():
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.05))
    step = torch.compile(optimizer.step, backend="aot_eager")
    check(module, step)


def test_step_compiled_to_one_kernel():
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    @torch.compile(fullgraph=False)
    def update():
        optimizer.step()

    check(module, update)
