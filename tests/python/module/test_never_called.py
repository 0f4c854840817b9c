"""Layers in FP8 that were never called: fp8.summary says so, once the model has run."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fp8


def every(module, name):
    return True


class Attention(nn.Module):
    """Takes the weight in a way that conversion cannot recognize."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 16)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        weight = dict(self.named_parameters())["qkv.weight"]
        return self.proj(F.linear(x, weight))


class Plain(nn.Module):
    """No MLP that is fused: each layer's own forward runs."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)

    def forward(self, x):
        return self.down(self.up(x).relu() + 1)


X = torch.ones(3, 16)


def model():
    return nn.Sequential(fp8.convert(Attention(), filter=every), fp8.convert(Plain(), filter=every))


def never(model):
    """The names in the warning of fp8.summary, which must be those of the lines that say so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = fp8.summary(model).splitlines()
    marked = [line.split()[0] for line in lines if line.endswith(", never called")]
    assert len(caught) == (1 if marked else 0)
    for warning in caught:
        assert warning.filename == __file__
        assert "never called" in str(warning.message)
        assert str(warning.message).endswith(", ".join(map(repr, marked)))
    return marked


def test_nothing_is_said_before_the_first_call():
    assert never(model()) == []


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layer_that_was_never_called_is_named(mode):
    layers = model()
    with mode():
        layers(X)
    assert never(layers) == ["0.qkv"]
    assert "tensorwise, never called" in fp8_line(layers, "0.qkv")


def fp8_line(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(line for line in fp8.summary(model).splitlines() if line.startswith(name))


def test_a_model_that_calls_all_is_silent():
    layers = fp8.convert(Plain(), filter=every)
    layers(X)
    assert never(layers) == []


def test_revert_forgets_and_convert_begins_anew():
    layers = model()
    layers(X)
    fp8.revert(layers)
    assert all("fp8_called" not in vars(module) for module in layers.modules())
    assert never(layers) == []
    assert never(fp8.convert(layers, filter=every)) == []
    layers(X)
    assert never(layers) == ["0.qkv"]


@pytest.mark.parametrize("dup", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_what_was_called(dup):
    layers = model()
    assert never(dup(layers)) == []
    layers(X)
    assert never(dup(layers)) == ["0.qkv"]


def test_a_grouped_linear_is_named():
    layer = nn.ModuleDict({"a": fp8.GroupedLinear(2, 16, 16), "b": fp8.GroupedLinear(2, 16, 16)})
    assert never(layer) == []
    line = ["a", "2", "x", "(16", "->", "16)", "float32", "rowwise"]
    assert fp8_line(layer, "a").split() == line
    layer["a"](X, torch.tensor([1, 3], dtype=torch.int32))
    assert never(layer) == ["b"]


def test_a_subclass_with_a_forward_of_its_own_is_not_judged():
    class Own(fp8.Linear):
        def forward(self, x):
            return fp8.ops.fused_linear(x, self.weight, self.bias, self.recipe)

    layers = nn.Sequential(Own(16, 16), fp8.Linear(16, 16))
    layers(X)
    assert never(layers) == []


# --- compilers and tracers: nothing breaks, nothing is said that is not so ---


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_compiled_once_and_silent():
    layers = fp8.convert(nn.Sequential(Plain(), Plain()), filter=every)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert never(layers) == never(compiled) == []


@pytest.mark.usefixtures("_fresh_compiler")
def test_eager_calls_do_not_make_compiled_code_stale():
    layers = fp8.convert(Plain(), filter=every)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    compiled(X)
    layers(X)
    compiled(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_blocks_that_share_compiled_code_are_silent():
    """Compiled code of one block serves the others, in which nothing is traced."""
    blocks = fp8.convert(nn.Sequential(*[Plain() for _ in range(4)], Attention()), filter=every)
    for block in blocks[:4]:
        block.compile(backend="aot_eager", fullgraph=True)
    blocks(X)
    assert never(blocks) == ["4.qkv"]


@pytest.mark.usefixtures("_fresh_compiler")
def test_checkpointed_regions_compile():
    from torch.utils.checkpoint import checkpoint

    layers = fp8.convert(Plain(), filter=every)

    def step(x):
        return checkpoint(layers, x, use_reentrant=False)

    x = X.clone().requires_grad_()
    torch.compile(step, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert never(layers) == []


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_no_mark(strict):
    layers = fp8.convert(Plain(), filter=every)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*side effects.*")
        program = torch.export.export(layers, (X,), strict=strict)
    assert torch.equal(program.module()(X), layers(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_jit_trace_works():
    layers = fp8.convert(Plain(), filter=every)
    assert torch.equal(torch.jit.trace(layers, X)(X), layers(X))


@pytest.mark.usefixtures("_fresh_compiler")
def test_layers_that_are_compiled_one_by_one_are_silent():
    layers = fp8.convert(nn.Sequential(Plain(), Plain(), nn.Linear(16, 16)), filter=every)
    for layer in layers.modules():
        if isinstance(layer, fp8.Linear):
            layer.compile(backend="aot_eager", fullgraph=True)
    layers(X)
    assert never(layers) == []


def test_a_model_that_trains_past_all_of_its_layers(recwarn):
    """None was called, but gradients say that the model ran."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x):
            for _, layer in enumerate(self.layers):
                x = nn.functional.linear(x, layer.weight, layer.bias)
            return x

    model = fp8.convert(Reads(), filter=lambda module, name: True)
    assert "never called" not in fp8.summary(model)
    model(torch.randn(2, 16)).sum().backward()
    if any(isinstance(layer, fp8.Linear) for layer in model.layers):
        with pytest.warns(UserWarning, match="never called"):
            assert "never called" in fp8.summary(model)
