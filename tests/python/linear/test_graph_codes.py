"""fp8.cached_weights and CUDA graphs: who quantizes a weight that a graph reads, and when."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from reference import assert_same_bits

import fp8

RECIPES = ("tensorwise", "rowwise", "blockwise")
SIZE = 256


def model_of(recipe, device="cuda", kind="linear"):
    options = {"device": device, "dtype": torch.bfloat16, "recipe": recipe}
    if kind == "merged":
        return fp8.MergedLinear(SIZE, (SIZE, 2 * SIZE), **options)
    if kind == "mlp":
        return fp8.GatedMLP(SIZE, 2 * SIZE, **options)
    return torch.nn.Sequential(*(fp8.Linear(SIZE, SIZE, **options) for _ in range(2)))


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else torch.cat(tuple(y), -1)


def on_another_stream(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def captured(model, x):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = output(model, x)
    return graph, y


def kernels(run):
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return len([event for event in recorded.events() if event.device_type == cuda])


def negate(model, dims=(1, 2)):
    """Weights have two dimensions, biases one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in dims:
                torch._foreach_neg_([parameter])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "merged", "mlp"])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_graph_reads_codes_that_were_made_before(recipe, kind):
    model = model_of(recipe, kind=kind)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    expected = output(model, x)
    output(model, x)  # the shape has run
    plain, _ = captured(model, x)
    with fp8.cached_weights(model, captures=True):
        on_another_stream(lambda: output(model, x))
        graph, y = captured(model, x)
        y.zero_()
        graph.replay()
        assert_same_bits(y, expected)
        assert kernels(graph.replay) < kernels(plain.replay)
    torch.cuda.empty_cache()
    noise = [torch.full((SIZE, SIZE), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(64)]
    y.zero_()
    graph.replay()  # the context has ended: its codes have not
    assert_same_bits(y, expected)
    del noise


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "merged", "mlp"])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_call_brings_a_graph_up_to_date(recipe, kind):
    """On the stream of the graph or not, inside the same context or another one."""
    model = model_of(recipe, kind=kind)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    with fp8.cached_weights(model, captures=True):
        on_another_stream(lambda: output(model, x))
        before = output(model, x)
        graph, y = captured(model, x)
        negate(model, dims=(2,))
        graph.replay()
        assert_same_bits(y, before)  # stale, as it was said to be
        changed = output(model, x)
        graph.replay()
        assert_same_bits(y, changed)
    assert not torch.equal(changed, before)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    for _ in range(2):
        with fp8.cached_weights(model, captures=True):
            changed = output(model, x)
            graph.replay()
            assert_same_bits(y, changed)
            assert_same_bits(output(copy.deepcopy(model), x), changed)
        negate(model)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_call_without_gradients_renews_what_a_backward_reads(recipe):
    model = model_of(recipe)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def step(model):
        y = model(x)
        return y, *torch.autograd.grad(y, x, dy)

    with fp8.cached_weights(model, captures=True):
        on_another_stream(lambda: step(model))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(model)
        negate(model, dims=(2,))
        with torch.no_grad():
            model(x)
        graph.replay()
    for found, expected in zip(results, step(copy.deepcopy(model)), strict=True):
        assert_same_bits(found.detach(), expected.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "merged"])
@torch.no_grad()
def test_an_inner_context_brings_a_graph_up_to_date(kind):
    """What was made in an outer one, in which nothing captures, is written for it, once."""
    model = model_of("rowwise", kind=kind)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    with fp8.cached_weights(model, captures=True):
        output(model, x)
        graph, y = captured(model, x)
    negate(model, dims=(2,))
    with fp8.cached_weights(model):
        changed = output(model, x)
        launched = kernels(lambda: output(model, x))
        with fp8.cached_weights(model, captures=True):
            assert_same_bits(output(model, x), changed)
            assert kernels(lambda: output(model, x)) == launched
        graph.replay()
        assert_same_bits(y, changed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "merged"])
@torch.no_grad()
def test_a_graph_reads_the_bias_as_it_is(kind):
    """It has no codes. Beside a weight that changed too it is the new one with old codes."""
    model = model_of("rowwise", kind=kind)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    with fp8.cached_weights(model, captures=True):
        on_another_stream(lambda: output(model, x))
        graph, y = captured(model, x)
        before = output(model, x)
        negate(model, dims=(1,))
        graph.replay()
        changed = output(model, x)
        assert not torch.equal(changed, before)
        assert_same_bits(y, changed)
        negate(model, dims=(2,))
        graph.replay()
        assert_same_bits(y, changed)
        output(model, x)
        graph.replay()
        assert_same_bits(y, output(copy.deepcopy(model), x))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_without_captures_a_graph_quantizes_in_each_replay(recipe):
    model = model_of(recipe)
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    with fp8.cached_weights(model):
        output(model, x)
        graph, y = captured(model, x)
    graph.replay()
    before = y.clone()
    negate(model)
    graph.replay()
    assert_same_bits(y, output(model, x))
    assert not torch.equal(y, before)


@pytest.mark.gpu
@torch.no_grad()
def test_weights_without_codes_are_quantized_in_the_graph():
    model = model_of("rowwise")
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    output(model, x)  # outside of the context
    with fp8.cached_weights(model, captures=True):
        graph, y = captured(model, x)
        graph.replay()
        assert_same_bits(y, output(model, x))
        negate(model)
        graph.replay()
        assert_same_bits(y, output(copy.deepcopy(model), x))
        on_another_stream(lambda: output(model, x))
        again, z = captured(model, x)
        assert kernels(again.replay) < kernels(graph.replay)
        again.replay()
        assert_same_bits(z, y)


@pytest.mark.gpu
@torch.no_grad()
def test_an_outer_context_that_says_so_is_enough():
    model = model_of("rowwise")
    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    with fp8.cached_weights(model, captures=True), fp8.cached_weights(model):
        output(model, x)
        inner, _ = captured(model, x)
    with fp8.cached_weights(model):
        output(model, x)
        outer, _ = captured(model, x)
    assert kernels(inner.replay) < kernels(outer.replay)


@pytest.mark.gpu
@torch.no_grad()
def test_codes_go_with_the_parameter():
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    x = torch.randn(128, SIZE, device="cuda", dtype=torch.bfloat16)
    found = []
    for _ in range(4):
        model = model_of("rowwise")
        with fp8.cached_weights(model, captures=True):
            output(model, x)
            graph, y = captured(model, x)
            for _ in range(3):  # the same memory each time
                negate(model)
                output(model, x)
                other, z = captured(model, x)
        del graph, y, other, z, model
        found.append(allocated())
    assert found[-1] - found[-2] < SIZE * SIZE


@pytest.mark.gpu
def test_it_warns_once():
    program = """
import torch, fp8
model = fp8.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
for captures in (True, False):
    with torch.no_grad(), fp8.cached_weights(model, captures=captures):
        model(x)
        for _ in range(2):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                model(x)
    torch.cuda.synchronize()
    print(captures, file=__import__("sys").stderr)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        check=True,
    )
    asked, _, silent = found.stderr.partition("True")
    message = "fp8.cached_weights: a CUDA graph captured inside quantizes the weights in each"
    assert message not in asked
    assert silent.count(message) == 1


@pytest.mark.parametrize("captures", [False, True])
def test_contexts_of_both_kinds_nest(device, captures):
    """Where there is no graph captures changes nothing: codes are kept, and renewed."""
    layer = fp8.Linear(64, 48, device=device, recipe="rowwise")
    x = torch.randn(32, 64, device=device)
    with torch.no_grad(), fp8.cached_weights(layer, captures=captures):
        with fp8.cached_weights(layer, captures=not captures):
            before = layer(x)
            layer.weight.mul_(-3)
            assert not torch.equal(layer(x), before)
        assert_same_bits(layer(x), copy.deepcopy(layer)(x))
    assert_same_bits(layer(x), copy.deepcopy(layer)(x))


def test_error_captures_is_no_bool():
    message = r"fp8.cached_weights: expected captures True or False, got 'yes'"
    with (
        pytest.raises(TypeError, match=message),
        fp8.cached_weights(torch.nn.Linear(1, 1), captures="yes"),
    ):
        pass
