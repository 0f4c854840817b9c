"""The amax that a norm leaves for the quantization of what it wrote: the same bits, used and
forgotten as remembered inputs are."""

from __future__ import annotations

import copy

import pytest
import torch
from norm_reference import FORMS, LAYER
from torch.utils.checkpoint import checkpoint

import fp8

OPS = torch.ops.fp8
RECIPES = ("tensorwise", "tensorwise:power_of_two", "rowwise", "blockwise", "delayed")


def norm(form, x, weight, bias=None, residual=None):
    if residual is not None:
        return OPS.add_rms_norm(x, residual, weight, 1e-6, form)[0]
    return OPS.layer_norm(x, weight, bias) if form == LAYER else OPS.rms_norm(x, weight, 1e-6, form)


def leaves(device, rows=40, cols=64, dtype=torch.bfloat16):
    x, residual = (torch.randn(rows, cols, device=device, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(cols, device=device, dtype=dtype) for _ in range(2))
    return [t.requires_grad_() for t in (x, weight, bias, residual)]


def linear(device, cols=64, recipe="tensorwise", dtype=torch.bfloat16):
    return fp8.Linear(cols, 48, device=device, dtype=dtype, recipe=recipe)


def write_unseen(y):
    """No counter sees it: what is computed of y after it shows which amax is taken."""
    y.data.mul_(64)


def is_used(make, layer):
    """Whether the layer takes an amax that was left by the norm that make() calls."""
    y = make()
    write_unseen(y)
    return not torch.equal(layer(y), layer(y.clone()))


def learn(make, layer):
    for _ in range(3):
        layer(make())


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "residual", "no parameters", "odd columns", "wide"])
def test_an_amax_is_left_once_it_was_asked_for(device, case, dtype, form):
    if form == LAYER and case == "residual":
        pytest.skip("LayerNorm adds none")
    cols = 61 if case == "odd columns" else 64
    x, weight, bias, residual = leaves(device, cols=cols, dtype=dtype)
    if case == "no parameters":
        weight = bias = None
    if case == "wide":
        if form == "round_then_scale":
            pytest.skip("its result is float32")
        weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    layer = linear(device, cols, dtype=dtype)

    def make():
        return norm(form, x, weight, bias, residual if case == "residual" else None)

    learn(make, layer)
    assert is_used(make, layer)
    y = make()
    assert torch.equal(layer(y), layer(y.clone()))


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_after_a_norm_has_the_bits_that_it_has_alone(device, recipe, form):
    x, weight, bias, _ = leaves(device)
    layer = linear(device, recipe=recipe)
    asks = linear(device)
    dy = torch.randn(40, 48, device=device, dtype=torch.bfloat16)

    def results(copied):
        ours = copy.deepcopy(layer)  # its history too
        y = norm(form, x, weight, bias)
        y = ours(y.clone() if copied else y)
        return y, *torch.autograd.grad(y, [x, weight, ours.weight], dy)

    learn(lambda: norm(form, x, weight, bias), asks)
    for ours, expected in zip(results(False), results(True), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 0.0])
def test_extreme_rows_have_the_bits_that_they_have_alone(device, value):
    x, weight, bias, _ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(LAYER, x, weight, bias), layer)
    with torch.no_grad():
        x[3] = value
        x[4, 5] = value
    y = norm(LAYER, x, weight, bias)
    assert torch.equal(layer(y).view(torch.int16), layer(y.clone()).view(torch.int16))


def zeros_outside(device, form):
    """Beyond the last column (0 - mean) * rstd is large, and is no part of y."""
    x, weight, bias, _ = leaves(device, cols=61)
    with torch.no_grad():
        x.add_(1000)
        weight.fill_(1)
        bias.zero_()
    return x, weight, bias


@pytest.mark.parametrize("parameters", [True, False])
def test_columns_that_are_not_there_are_no_part_of_an_amax(device, parameters):
    x, weight, bias = zeros_outside(device, LAYER)
    layer = linear(device, 61)

    def make():
        return norm(LAYER, x, weight if parameters else None, bias if parameters else None)

    learn(make, layer)
    y = make()
    assert torch.equal(layer(y), layer(y.clone()))


def _set_data(y):
    y.data = y.data * 64


WRITES = {
    "in place": lambda y: y.mul_(64),
    "data": _set_data,
    "detached": lambda y: y.detach().mul_(64),
    "a view": lambda y: y[:, 3:].mul_(64),
    "transposed and back": lambda y: y.t_().mul_(64).t_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_between_norm_and_linear_is_noticed(device, write):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    y = norm(FORMS[0], x, weight)
    write(y)
    assert torch.equal(layer(y), layer(y.clone()))


def test_a_view_and_a_part_are_other_tensors(device):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    for other in (lambda y: y[:16], lambda y: y.view(2, 20, 64), lambda y: y.detach()):
        y = norm(FORMS[0], x, weight)
        write_unseen(y)
        assert torch.equal(layer(other(y)), layer(other(y).clone()))


@pytest.mark.parametrize("second", ["tensorwise", "tensorwise:power_of_two", "rowwise"])
def test_two_linears_take_it(device, second):
    x, weight, *_ = leaves(device)
    first, other = linear(device), linear(device, recipe=second)
    learn(lambda: norm(FORMS[0], x, weight), first)
    y = norm(FORMS[0], x, weight)
    for layer in (first, other, first):
        assert torch.equal(layer(y), layer(y.clone()))
    if second != "rowwise":
        assert is_used(lambda: norm(FORMS[0], x, weight), other)


def test_nothing_is_left_without_a_graph(device):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    with torch.no_grad():
        assert not is_used(lambda: norm(FORMS[0], x, weight), layer)
    y = norm(FORMS[0], x.detach(), weight.detach())
    write_unseen(y)
    assert torch.equal(layer(y), layer(y.clone()))


def test_a_linear_without_a_graph_takes_its_own(device):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    y = norm(FORMS[0], x, weight)
    write_unseen(y)
    with torch.no_grad():
        assert torch.equal(layer(y), layer(y.clone()))


def test_a_backward_ends_it(device):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    waiting = layer(norm(FORMS[0], x, weight))
    y = norm(FORMS[0], x, weight)
    write_unseen(y)
    waiting.sum().backward()
    assert torch.equal(layer(y), layer(y.clone()))


def test_a_norm_that_nobody_asks_stops_leaving_it(device):
    x, weight, *_ = leaves(device)
    layer, other = linear(device), linear(device, recipe="rowwise")
    learn(lambda: norm(FORMS[0], x, weight), layer)
    for _ in range(8 + 2):  # the last two wait
        other(norm(FORMS[0], x, weight))
    assert not is_used(lambda: norm(FORMS[0], x, weight), layer)
    assert is_used(lambda: norm(FORMS[0], x, weight), layer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_repeats_the_bits(device, reentrant):
    x, weight, *_ = leaves(device)
    layer = linear(device)

    def block(x):
        return layer(norm(FORMS[1], x, weight))

    def gradients(run):
        return torch.autograd.grad(run(x).float().square().sum(), x)[0]

    expected = gradients(block)
    if reentrant:  # it refuses autograd.grad
        x.grad = None
        checkpoint(block, x, use_reentrant=True).float().square().sum().backward()
        ours = x.grad
    else:
        for _ in range(3):
            ours = gradients(lambda x: checkpoint(block, x, use_reentrant=False))
    assert torch.equal(ours, expected)


def test_compiled_code_remembers_nothing(device):
    torch._dynamo.reset()
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)

    def block(x):
        return layer(norm(FORMS[0], x, weight))

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x), block(x))


def test_it_goes_with_its_tensor(device):
    x, weight, *_ = leaves(device)
    layer = linear(device)
    learn(lambda: norm(FORMS[0], x, weight), layer)
    gone = []
    y = norm(FORMS[0], x, weight)
    torch.utils.weak.weakref.finalize(y, gone.append, True)
    del y
    assert gone


@pytest.mark.parametrize("kind", ["fp8.RMSNorm", "converted", "merged", "mlp"])
def test_modules_take_it(device, kind):
    """Whoever reads an input that may be remembered."""
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(40, 64, requires_grad=True, **options)
    if kind == "mlp":
        reader = fp8.GatedMLP(64, 96, **options)
    elif kind == "merged":
        weights = [torch.randn(48, 64, requires_grad=True, **options) for _ in range(2)]

        def reader(y):
            return torch.cat(fp8.ops.merged_linear(y, weights), -1)
    else:
        reader = fp8.Linear(64, 48, **options)
    if kind == "converted":
        model = torch.nn.Sequential(torch.nn.RMSNorm(64, 1e-6), torch.nn.Linear(64, 48))
        model = fp8.convert(model.to(**options), filter=lambda module, name: True)
        of_x, reader = model
    else:
        of_x = fp8.RMSNorm(64, 1e-6, **options)
    learn(lambda: of_x(x), reader)
    assert is_used(lambda: of_x(x), reader)
    y = of_x(x)
    assert torch.equal(reader(y), reader(y.clone()))
