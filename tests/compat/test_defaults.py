"""torch's defaults (dtype, device, grad mode) reach nothing that fp8 computes for itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from converted import convert, converted_layers, every, randomize
from tiny_transformers import CAUSAL, inputs, make
from torch import Tensor, nn

import fp8

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
RECIPES = tuple(fp8.RECIPES)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "set meta": lambda: default_device("meta"),
    "cpu": lambda: torch.device("cpu"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "no grad mode": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
}


def net(recipe: str | None = None) -> nn.Module:
    model = randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))
    return model if recipe is None else convert(model, recipe)


def data(rows: int = 16) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().mean().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


def assert_same_results(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_within(context, recipe):
    """The model was made outside; nothing of it depends on where it was converted."""
    expected = result(net(recipe), data())
    model = net()
    with CONTEXTS[context]():
        convert(model, recipe)
        fp8.summary(model)
    assert_same_results(result(model, data()), expected)
    with CONTEXTS[context]():
        fp8.revert(model)
    assert_same_results(result(model, data()), result(net(), data()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_backward_under_a_default_dtype(dtype, recipe):
    expected = [result(net(recipe), data()) for _ in range(2)]
    model = net(recipe)
    x = data()
    with default_dtype(dtype):
        for theirs in expected[:1]:
            assert_same_results(result(model, x), theirs)
        layer = fp8.Linear(64, 64, recipe=recipe)
        assert layer.weight.dtype == dtype
        if dtype != torch.float64:
            assert layer(torch.randn(4, 64)).dtype == dtype


@pytest.mark.parametrize("mode", ["meta", "set meta"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_first_forward_under_a_default_device(mode, recipe):
    expected = result(net(recipe), data())
    model, x = net(recipe), data()
    with CONTEXTS[mode]():
        ours = result(model, x)
    assert_same_results(ours, expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_calibrate_within(context):
    model, x = net("tensorwise"), data()
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    expected = {n: m.input_scale for n, m in converted_layers(model).items()}
    model = net("tensorwise")
    with CONTEXTS[context](), fp8.calibrate(model):
        model(x)
    for name, layer in converted_layers(model).items():
        scale = layer.input_scale
        assert scale.dtype == torch.float32
        assert scale.device.type == "cpu"
        assert not scale.is_inference()
        if context == "autocast":  # other values flow: those of bf16
            assert scale == pytest.approx(float(expected[name]), rel=0.02)
        else:
            assert torch.equal(scale, expected[name])
    result(model, x)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("assign", [False, True])
def test_load_a_calibrated_state_dict_within(context, assign):
    source, x = net("tensorwise"), data()
    with torch.no_grad(), fp8.calibrate(source):
        source(x)
    state = {n: t.clone() for n, t in source.state_dict().items()}
    expected = result(source, 0.5 * x)
    model = net("tensorwise")
    with CONTEXTS[context]():
        model.load_state_dict(state, assign=assign)
    for layer in converted_layers(model).values():
        assert layer.input_scale.dtype == torch.float32
        assert layer.input_scale.device.type == "cpu"
    assert_same_results(result(model, 0.5 * x), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_load_and_run_within_one_default(dtype):
    """As programs do that set the default once, at the top: a model of that dtype."""
    with default_dtype(dtype):
        source = net("tensorwise")
        x = data().to(dtype)
        with torch.no_grad(), fp8.calibrate(source):
            source(x)
        model = net("tensorwise")
        model.load_state_dict(source.state_dict())
        assert_same_results(result(model, x), result(source, x))
        for layer in converted_layers(model).values():
            assert layer.input_scale.dtype == torch.float32


MOE_CONTEXTS = ("bfloat16", "float16", "float64", "meta", "set meta", "inference_mode", "autocast")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("context", MOE_CONTEXTS)
def test_convert_a_mixture_within(family, context):
    given = inputs(family)
    expected = convert(make(family))(**given).loss.detach()
    model = make(family)
    with CONTEXTS[context]():
        convert(model)
    assert torch.equal(model(**given).loss.detach(), expected)
    assert "not fused" not in fp8.summary(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_mixture_chosen_by_transformers_runs_first_within(family, dtype):
    """set_experts_implementation converts nothing: the gate is looked for in the first forward."""
    fp8.integrations.transformers.register()
    given = inputs(family)
    model = make(family)
    model.set_experts_implementation("fp8")
    expected = copy.deepcopy(model)(**given).loss.detach()
    with default_dtype(dtype):
        value = model(**given).loss.detach()
    assert value == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_mixture_made_converted_and_run_within(dtype):
    with default_dtype(dtype):
        model = make("mixtral", dtype)
        convert(model)
        loss = model(**inputs("mixtral")).loss
        loss.backward()
    assert "not fused" not in fp8.summary(model)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_mixture_made_and_converted_on_meta(family):
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(family, **CAUSAL[family])
        model = transformers.AutoModelForCausalLM.from_config(config)
        convert(model)
    source = make(family)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)
    given = inputs(family)
    assert torch.equal(model(**given).logits, convert(source)(**given).logits)


def test_a_conversion_that_fails_leaves_the_model_as_it_was():
    """Whatever fails, a later filter call or an experts module: no layer has changed."""
    model = make("mixtral")
    before = {n: type(m) for n, m in model.named_modules()}
    configs = {n: vars(m).get("config") for n, m in model.named_modules()}

    def fails_late(module, name):
        if "layers.1" in name and name.endswith("experts"):
            raise RuntimeError("no")
        return True

    with pytest.raises(RuntimeError, match="no"):
        fp8.convert(model, filter=fails_late)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert {n: vars(m).get("config") for n, m in model.named_modules()} == configs


def test_a_gate_that_raises_leaves_the_model_whole():
    model = make("mixtral")
    last = [m for n, m in model.named_modules() if n.endswith(".experts")][-1]

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt  # as from the keyboard, in the middle of it

    last.act_fn = Fails()
    before = {n: type(m) for n, m in model.named_modules()}
    try:
        fp8.convert(model, filter=every)
    except KeyboardInterrupt:
        assert {n: type(m) for n, m in model.named_modules()} == before
        assert not any(fp8.integrations.transformers.in_fp8(m) for m in model.modules())


@pytest.mark.parametrize("context", ["bfloat16", "float64", "meta", "inference_mode"])
def test_grouped_linear_within(context):
    x, offsets = data(32), torch.tensor([16, 32], dtype=torch.int32)
    layer = fp8.GroupedLinear(2, 64, 48)
    expected = layer(x, offsets).detach()
    with CONTEXTS[context](), torch.no_grad():
        y = layer(x, offsets)
    assert torch.equal(y.clone(), expected)


IMPORTS = """
import torch
{first}
import fp8
from torch import nn
torch.set_default_dtype(torch.float32)
torch.set_default_device(None)
model = fp8.convert(nn.Sequential(nn.Linear(64, 64)), "delayed", filter=lambda m, n: True)
with torch.no_grad():
    model[0].weight.copy_(torch.arange(4096.0).view(64, 64).sin())
    model[0].bias.zero_()
x = torch.arange(512.0).view(8, 64).cos().requires_grad_()
y = model(x)
y.sum().backward()
with fp8.calibrate(fp8.convert(model, filter=lambda m, n: True)):
    model(x)
assert model[0].input_scale.dtype == torch.float32
assert not model[0].weight.grad.is_inference()
print(float(y.detach().double().sum()), float(x.grad.double().sum()))
"""


@functools.cache
def imported(first: str) -> str:
    """What a program prints whose first import of fp8 comes after, or within, something."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(first=first)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta')",
        "with torch.inference_mode(): import fp8",
    ],
)
def test_import_within(first):
    """The first import may happen anywhere: in a function that a library calls under no_grad."""
    assert imported(first) == imported("")
