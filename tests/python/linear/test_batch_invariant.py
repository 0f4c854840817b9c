"""fp8.batch_invariant: a row's bits are the same whatever the other rows are, and however many."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from reference import assert_same_bits

import fp8

# What cuBLASLt, at::mm and the decode kernel change their order at: tiles, halves of tiles, the end
# of few rows, and many.
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
# K, N: whole tiles; K that is no multiple of 128 or 16, N of 8; a contraction in turns and not
SHAPES = ((256, 256), (200, 140), (33, 7), (4112, 264))
RECIPES = ("rowwise", "rowwise_fast_gw_hp", "rowwise:power_of_two", "blockwise")
GPU_ROWS = (8192,)
GPU_SHAPES = ((4096, 1024), (14336, 512), (1003, 1100))  # decode takes these too


def cases(device):
    if device == "cpu":
        return SHAPES, ROWS
    return SHAPES + GPU_SHAPES, ROWS + GPU_ROWS


def inputs(rows, k, device, dtype=torch.bfloat16):
    """Rows of unlike sizes."""
    sizes = torch.logspace(-3, 3, rows, device=device)[torch.randperm(rows, device=device)]
    return (torch.randn(rows, k, device=device) * sizes[:, None]).to(dtype)


def check_rows(run, x, rows, what):
    """Rows first and last of so many, and one in the middle alone."""
    whole = run(x)
    for m in rows:
        assert_same_bits(run(x[:m]), whole[:m], f"{what}, first {m}")
        assert_same_bits(run(x[-m:].clone()), whole[-m:], f"{what}, last {m}")
    middle = x.size(0) // 2
    assert_same_bits(run(x[middle : middle + 1]), whole[middle : middle + 1], f"{what}, one")


def frozen(k, n, recipe, device, dtype, bias=True):
    linear = torch.nn.Linear(k, n, bias=bias, device=device, dtype=dtype)
    return fp8.FrozenLinear.from_linear(linear, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_rows_of_a_linear_layer(device, recipe, poisoned_memory):
    shapes, rows = cases(device)
    for k, n in shapes:
        for bias, dtype in ((False, torch.bfloat16), (True, torch.float32)):
            x = inputs(max(rows), k, device, dtype)
            layer = fp8.Linear(k, n, bias, device=device, dtype=dtype, recipe=recipe)
            with fp8.batch_invariant():
                check_rows(layer, x, rows, f"{recipe} {k} -> {n} {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@torch.no_grad()
def test_rows_of_a_frozen_layer(device, recipe, dtype):
    shapes, rows = cases(device)
    for k, n in shapes:
        layer = frozen(k, n, recipe, device, dtype)
        with fp8.batch_invariant():
            check_rows(layer, inputs(max(rows), k, device, dtype), rows, f"{recipe} {k} -> {n}")


@torch.no_grad()
def test_rows_of_a_static_scale(device):
    shapes, rows = cases(device)
    for k, n in shapes:
        layer = fp8.Linear(k, n, device=device, dtype=torch.bfloat16, recipe="tensorwise")
        layer.input_scale = torch.tensor(0.05, device=device)
        other = fp8.FrozenLinear.from_linear(layer)
        x = inputs(max(rows), k, device)
        with fp8.batch_invariant():
            check_rows(layer, x, rows, f"static {k} -> {n}")
            check_rows(other, x, rows, f"frozen, static {k} -> {n}")
            assert_same_bits(layer(x), other(x))


@pytest.mark.parametrize("of_weight", ["tensorwise", "rowwise"])
@torch.no_grad()
def test_rows_of_other_scales_of_frozen_weights(device, of_weight):
    """One scale of the weight beside rows of x, and rows of it beside a static scale."""
    linear = torch.nn.Linear(272, 144, device=device, dtype=torch.bfloat16)
    layer = fp8.FrozenLinear.from_linear(linear, of_weight)
    static = torch.full((1,), 0.02, device=device) if of_weight == "rowwise" else None

    def run(x):
        return fp8.ops.linear_frozen(x, layer.weight, layer.scales, layer.bias, static)

    with fp8.batch_invariant():
        check_rows(run, inputs(max(ROWS), 272, device), ROWS, of_weight)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@torch.no_grad()
def test_rows_of_merged_layers_and_mlps(device, recipe):
    options = {"device": device, "dtype": torch.bfloat16, "recipe": recipe}
    merged = fp8.MergedLinear(256, (144, 80), bias=True, **options)
    mlp = fp8.GatedMLP(256, 384, **options)
    x = inputs(max(ROWS), 256, device)
    with fp8.batch_invariant():
        check_rows(lambda rows: torch.cat(merged(rows), -1), x, ROWS, "merged")
        check_rows(mlp, x, ROWS, "mlp")


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@torch.no_grad()
def test_rows_of_a_grouped_layer(device, recipe):
    """Of each group."""
    layer = fp8.GroupedLinear(2, 256, 144, device=device, dtype=torch.bfloat16, recipe=recipe)
    x = inputs(600, 256, device)

    def run(first, second):
        ends = torch.tensor([first, first + second], dtype=torch.int32, device=device)
        return layer(torch.cat([x[:first], x[300 : 300 + second]]), ends)

    with fp8.batch_invariant():
        whole = run(300, 300)
        for m in (1, 7, 64, 65, 129, 300):
            assert_same_bits(run(m, 5), torch.cat([whole[:m], whole[300:305]]), f"{m} and 5")
            assert_same_bits(run(0, m), whole[300 : 300 + m], f"0 and {m}")


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@torch.no_grad()
def test_rows_of_frozen_experts(device, recipe):
    """Of each token, whichever experts the others have."""
    op = "quantize_rowwise" if recipe == "rowwise" else "quantize_blockwise_128x128"
    weights = (torch.randn(4, n, k, device=device) for n, k in ((288, 256), (256, 144)))
    made = [[getattr(fp8.ops, op)(matrix) for matrix in weight] for weight in weights]
    (up, up_scale), (down, down_scale) = (
        (torch.stack([c.view(torch.uint8) for c, _ in pairs]), torch.stack([s for _, s in pairs]))
        for pairs in made
    )
    experts = fp8.FrozenExperts.from_codes(
        up.view(torch.float8_e4m3fn), up_scale, down.view(torch.float8_e4m3fn), down_scale,
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    x = inputs(600, 256, device)
    weights, index = torch.rand(600, 4, device=device).topk(2)

    def run(first, last):
        return experts(x[first:last], index[first:last], weights[first:last])

    with fp8.batch_invariant():
        whole = run(0, 600)
        for m in (1, 7, 64, 65, 129, 300):
            assert_same_bits(run(0, m), whole[:m], f"first {m}")
            assert_same_bits(run(600 - m, 600), whole[600 - m :], f"last {m}")


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@torch.no_grad()
def test_values_are_those_of_other_sums(device, recipe):
    """What the codes stand for, multiplied in double precision. Hopper's tensor cores lose 2^-14 of
    a running sum in each step of 32, over all of K where they accumulate fast (bounds.py)."""
    shapes, _ = cases(device)
    for k, n in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            linear = torch.nn.Linear(k, n, device=device, dtype=dtype)
            layer = fp8.FrozenLinear.from_linear(linear, recipe)
            x = torch.randn(65, k, device=device, dtype=dtype)
            with fp8.batch_invariant():
                y = layer(x).double()
            quantize = {
                "rowwise": fp8.ops.quantize_rowwise,
                "blockwise": fp8.ops.quantize_blockwise_1x128,
            }[recipe]
            values = fp8.ops.dequantize(*quantize(x), torch.float32).double()
            exact = values @ layer.dequantize(torch.float32).double().t() + linear.bias.double()
            rounding = 2.0**-8 if dtype is torch.bfloat16 else 0.0
            steps = k / 32 if recipe == "rowwise" else 4
            limit = 1e-5 + rounding + (0 if device == "cpu" else 1e-3 + steps * 2.0**-14)
            assert float((y - exact).norm() / exact.norm()) < limit, (k, n, dtype)


@torch.no_grad()
def test_gradients_outside_and_training_inside(device):
    """A forward that keeps tensors for the backward has the same bits; the backward works."""
    layer = fp8.Linear(256, 144, device=device, dtype=torch.bfloat16, recipe="rowwise")
    x = inputs(130, 256, device)
    with fp8.batch_invariant():
        expected = layer(x)
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            y = layer(given)
            y.sum().backward()
    assert_same_bits(y.detach(), expected)
    assert given.grad is not None
    assert layer.weight.grad is not None


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_recipes_that_cannot_are_named(device, recipe):
    layer = fp8.Linear(64, 48, device=device, recipe=recipe)
    x = torch.randn(4, 64, device=device)
    message = rf"fp8::fused_linear: inside fp8.batch_invariant expected a recipe .* '{recipe}'"
    with fp8.batch_invariant(), pytest.raises(ValueError, match=message):
        layer(x)
    layer(x)
    merged = fp8.MergedLinear(64, (48, 32), device=device, recipe=recipe)
    with fp8.batch_invariant(), pytest.raises(ValueError, match="fp8::merged_linear: inside"):
        merged(x)
    mlp = fp8.MLP(64, 96, device=device, recipe=recipe)
    with fp8.batch_invariant(), pytest.raises(ValueError, match="fp8::mlp: inside"):
        mlp(x)
    other = frozen(64, 48, "tensorwise", device, torch.float32)
    message = "fp8::linear_frozen: inside fp8.batch_invariant expected .*, got 'tensorwise'"
    with fp8.batch_invariant(), pytest.raises(ValueError, match=message):
        other(x)


def test_scopes_nest_and_end_with_an_exception():
    enabled = fp8._native.loader.native().batch_invariant_enabled
    assert not enabled()
    with fp8.batch_invariant():
        with pytest.raises(KeyError), fp8.batch_invariant():
            raise KeyError
        assert enabled()
        found = []
        thread = threading.Thread(target=lambda: found.append(enabled()))
        thread.start()
        thread.join()
        assert found == [True]
    assert not enabled()


def test_the_switch_in_many_threads():
    enabled = fp8._native.loader.native().batch_invariant_enabled

    def work():
        for _ in range(200):
            with fp8.batch_invariant():
                assert enabled()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not enabled()


def test_the_environment_variable():
    program = (
        "import fp8, torch\n"
        "try: fp8.ops.fused_linear(torch.ones(2, 16), torch.ones(16, 16))\n"
        "except ValueError as error: print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, FP8_BATCH_INVARIANT="1", PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "got 'tensorwise'" in found.stdout


@pytest.mark.gpu
@torch.no_grad()
def test_in_a_graph_it_is_what_was_on_at_the_capture():
    layer = frozen(1024, 1152, "rowwise", "cuda", torch.bfloat16)
    x = inputs(200, 1024, "cuda")
    with fp8.batch_invariant():
        whole = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x[:5])
    y.zero_()
    graph.replay()
    assert_same_bits(y, whole[:5])


@pytest.mark.gpu
@torch.no_grad()
def test_without_it_the_kernel_of_few_rows_runs():
    """Else the tests above would not say that it is left out."""
    layer = frozen(4096, 1024, "rowwise", "cuda", torch.float32)
    x = inputs(4, 4096, "cuda", torch.float32)
    decoded = layer(x)
    with fp8.batch_invariant():
        assert not torch.equal(layer(x), decoded)
    layer.decode = False
    assert not torch.equal(layer(x), decoded)
