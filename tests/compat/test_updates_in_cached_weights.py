"""Inside fp8.cached_weights whatever changes a weight is noticed, or refused: averages of weights,
parametrizations, loading, initializing; experts and grouped layers with an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm.utils
import torch
from converted import convert, noticed, relative
from tiny_transformers import loss, make
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from watched_layer import OldStyle, assert_current, layer

import fp8


def _swa(module: fp8.Linear) -> tuple[AveragedModel, Callable[[], Any]]:
    averaged = AveragedModel(module)
    return averaged, lambda: averaged.update_parameters(shifted(module))


def _ema(module: fp8.Linear) -> tuple[AveragedModel, Callable[[], Any]]:
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    return averaged, lambda: averaged.update_parameters(shifted(module))


def _timm_ema(module: fp8.Linear) -> tuple[Any, Callable[[], Any]]:
    averaged = timm.utils.ModelEmaV3(module, decay=0.5)
    return averaged, lambda: averaged.update(shifted(module))


def _timm_ema2(module: fp8.Linear) -> tuple[Any, Callable[[], Any]]:
    averaged = timm.utils.ModelEmaV2(module, decay=0.5)
    return averaged, lambda: averaged.update(shifted(module))


def shifted(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5).add_(0.3)
    return module


@pytest.mark.parametrize("make_average", [_swa, _ema, _timm_ema, _timm_ema2])
def test_averages_of_weights(make_average):
    """Evaluation of the average between two updates, its weights cached."""
    module = layer()
    averaged, update = make_average(module)
    inner = averaged.module
    assert type(inner) is fp8.Linear
    x = torch.randn(8, 64)
    update()
    with torch.no_grad(), fp8.cached_weights(averaged):
        for _ in range(3):
            averaged(x) if isinstance(averaged, AveragedModel) else inner(x)
            update()
            assert_current(inner, x)


def _weight_norm(module: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(module)


def _spectral_norm(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(module)


def _orthogonal(module: nn.Module) -> nn.Module:
    return parametrizations.orthogonal(module)


@pytest.mark.parametrize("wrap", [_weight_norm, _spectral_norm, _orthogonal])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused", "old style"])
def test_parametrized_weights(wrap, optimizer):
    """A weight that is computed: its originals change, the weight is a new tensor each time."""
    module = wrap(layer())
    x = torch.randn(32, 64)
    parameters = list(module.parameters())
    step = {
        "SGD": lambda: torch.optim.SGD(parameters, lr=5.0),
        "AdamW fused": lambda: torch.optim.AdamW(parameters, lr=0.5, fused=True),
        "old style": lambda: OldStyle(parameters, lr=1.0),
    }[optimizer]()
    with fp8.cached_weights(module):
        for _ in range(3):
            module(x).square().mean().backward()
            if not noticed(step.step):
                break
            module.eval()  # spectral_norm: no power iteration
            with torch.no_grad():
                exact = torch.nn.functional.linear(x, module.weight, module.bias)
                assert relative(module(x), exact) < 0.08
            module.train()


def _vector(module: fp8.Linear) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 1.7, module.parameters())


def _load(module: fp8.Linear, **how: Any) -> None:
    module.load_state_dict({n: t * 1.7 for n, t in module.state_dict().items()}, **how)


def _new_parameter(module: fp8.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach() * 1.7)


def _new_data(module: fp8.Linear) -> None:
    module.weight.data = module.weight.data * 1.7


def _foreach(module: fp8.Linear) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(module.parameters()), 1.7)


def _lerp(module: fp8.Linear) -> None:
    with torch.no_grad():
        module.weight.lerp_(torch.ones_like(module.weight), 0.3)


def _out(module: fp8.Linear) -> None:
    with torch.no_grad():
        torch.mul(module.weight, 1.7, out=module.weight)


def _init(module: fp8.Linear) -> None:
    nn.init.normal_(module.weight)


def _reset(module: fp8.Linear) -> None:
    module.reset_parameters()


def _view(module: fp8.Linear) -> None:
    with torch.no_grad():
        module.weight[3:7].mul_(30)


def _to(module: fp8.Linear) -> None:
    module.to(torch.float64).to(torch.float32)
    with torch.no_grad():
        module.weight.mul_(1.7)


UPDATES = (
    _vector,
    _load,
    _new_parameter,
    _new_data,
    _foreach,
    _lerp,
    _out,
    _init,
    _reset,
    _view,
    _to,
)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_other_updates_of_weights(update, recipe):
    module = layer(recipe)
    x = torch.randn(8, 64)
    with torch.no_grad(), fp8.cached_weights(module):
        for _ in range(2):
            module(x)
            update(module)
            assert_current(module, x)


def test_load_state_dict_with_assign():
    module = layer()
    x = torch.randn(8, 64)
    with torch.no_grad(), fp8.cached_weights(module):
        module(x)
        _load(module, assign=True)
        assert_current(module, x)


@pytest.mark.parametrize(
    ("family", "fused"), itertools.product(["mixtral", "gpt_oss"], [True, False])
)
def test_experts(family, fused):
    """Experts and grouped products remember their weights in the same way."""
    models = [convert(make(family)) for _ in range(2)]
    losses: list[list[float]] = [[], []]
    for model, values, cached in zip(models, losses, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        run = loss(family)

        def steps(model=model, values=values, optimizer=optimizer, run=run):
            for _ in range(3):
                value = run(model)
                values.append(float(value.detach()))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()

        with fp8.cached_weights(model if cached else nn.Module()):
            if not noticed(steps):
                return
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_grouped_linear(fused):
    module = fp8.GroupedLinear(2, 64, 48)
    x, offsets = torch.randn(32, 64), torch.tensor([16, 32], dtype=torch.int32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    with fp8.cached_weights(module):
        for _ in range(2):
            module(x, offsets).square().mean().backward()
            if not noticed(optimizer.step):
                return
            exact = torch.cat([x[:16] @ module.weight[0].T, x[16:] @ module.weight[1].T])
            bias = getattr(module, "bias", None)
            if bias is not None:
                exact = exact + bias.repeat_interleave(16, 0)
            assert relative(module(x, offsets), exact) < 0.08
