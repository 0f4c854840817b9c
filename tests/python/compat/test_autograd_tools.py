"""Checkpointing, autocast, functional_call, inference mode, threads: what surrounds a layer."""

from __future__ import annotations

import threading

import pytest
import torch
from reference import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8

RECIPES = tuple(fp8.RECIPES)


def layer(recipe: str, device: str, dtype: torch.dtype = torch.bfloat16) -> fp8.Linear:
    return fp8.Linear(64, 96, device=device, dtype=dtype, recipe=recipe)


def gradients(run, parameters, x, dy) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def assert_all_same(actual, expected) -> None:
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(ours, theirs, f"result {i}")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoint_changes_nothing(device, recipe, use_reentrant):
    block = nn.Sequential(
        layer(recipe, device), nn.GELU(), fp8.Linear(96, 64, device=device, dtype=torch.bfloat16)
    )
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    results = []
    for run in (block, lambda t: checkpoint(block, t, use_reentrant=use_reentrant)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(dy)
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
    assert_all_same(*results)


AUTOCAST = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("where", "dtype"), AUTOCAST)
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_from_fp32_parameters(where, dtype, recipe):
    """y in the autocast dtype, gradients in the parameters', the values of the cast operands."""
    module = layer(recipe, where, torch.float32)
    x, dy = torch.randn(48, 64, device=where), torch.randn(48, 96, device=where).to(dtype)

    def under_autocast(leaf):
        with torch.autocast(where, dtype=dtype):
            return module(leaf)

    y, dx, dw, db = gradients(under_autocast, module.parameters(), x, dy)
    with torch.autocast(where, dtype=dtype):
        assert_all_same(gradients(module, module.parameters(), x, dy), (y, dx, dw, db))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, *(torch.float32,) * 3)
    cast = layer(recipe, where, dtype)
    cast.load_state_dict(module.state_dict())
    expected = gradients(cast, cast.parameters(), x.to(dtype), dy)
    assert_same_bits(y, expected[0], "y")
    for name, ours, theirs in zip(("dx", "dw", "db"), (dx, dw, db), expected[1:], strict=True):
        # The cast of the gradient may or may not go through the 16-bit dtype: half an ulp of it.
        torch.testing.assert_close(
            ours, theirs.float(), rtol=2**-8, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("where", "dtype"), AUTOCAST)
def test_autocast_mixed_inputs(where, dtype):
    """All of x, weight and bias are cast, whatever they were."""
    module = layer("tensorwise", where, torch.float32)
    x = torch.randn(16, 64, device=where)
    with torch.autocast(where, dtype=dtype):
        expected = module(x)
        assert_same_bits(module(x.to(dtype)), expected)
        with torch.autocast(where, enabled=False):
            assert module(x).dtype == torch.float32
        with torch.no_grad():
            assert_same_bits(module(x), expected)


@pytest.mark.parametrize(("where", "dtype"), AUTOCAST)
def test_autocast_refuses_what_it_cannot_cast(where, dtype):
    module = layer("tensorwise", where, torch.float32)
    with torch.autocast(where, dtype=dtype), pytest.raises(TypeError, match=r"fp8::fused_linear: "):
        module(torch.zeros(4, 64, device=where, dtype=torch.int64))


@pytest.mark.gpu
def test_autocast_with_gradient_scaler():
    """An overflowing scale is found (the step is skipped), a sane one steps."""
    module = layer("tensorwise", "cuda", torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**100)
    before = module.weight.detach().clone()
    for steps in (False, True):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = module(torch.randn(32, 64, device="cuda")).float().sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10)
        assert torch.equal(module.weight, before) != steps
    assert module.weight.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_functional_call(device, recipe):
    module, other = layer(recipe, device), layer(recipe, device)
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn(32, 96, device=device, dtype=torch.bfloat16)
    replaced = dict(other.named_parameters())
    ours = gradients(
        lambda t: torch.func.functional_call(module, replaced, t), replaced.values(), x, dy
    )
    assert_all_same(ours, gradients(other, other.parameters(), x, dy))


@pytest.mark.parametrize("recipe", RECIPES)
def test_inference_mode_parameters(device, recipe):
    """A module made in inference mode serves there."""
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    module = layer(recipe, device)
    expected = module(x).detach()
    with torch.inference_mode():
        inside = layer(recipe, device)
        inside.load_state_dict(module.state_dict())
        assert_same_bits(inside(x.clone()).clone(), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_channels_last_input(device, recipe):
    module = layer(recipe, device)
    x = torch.randn(2, 3, 5, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn(2, 3, 5, 96, device=device, dtype=torch.bfloat16)
    expected = gradients(module, module.parameters(), x, dy)
    last = torch.channels_last
    ours = gradients(
        module,
        module.parameters(),
        x.contiguous(memory_format=last),
        dy.contiguous(memory_format=last),
    )
    assert ours[0].is_contiguous()
    if (
        fp8.RECIPES[recipe].wgrad == "high precision"
    ):  # dW is a library matmul, whose order may follow the strides
        torch.testing.assert_close(ours.pop(2), expected.pop(2), rtol=2**-7, atol=1e-2)
    assert_all_same(ours, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_threads(device, recipe):
    """Two threads, on CUDA each with its own stream, give what they give one after the other."""
    modules = [layer(recipe, device) for _ in range(2)]
    shapes = [(96, 64), (160, 64)]
    problems = [
        (torch.randn(s, device=device).bfloat16(), torch.randn(s[0], 96, device=device).bfloat16())
        for s in shapes
    ]
    expected = [
        gradients(module, list(module.parameters()), x, dy)
        for module, (x, dy) in zip(modules, problems, strict=True)
    ]
    if device == "cuda":
        torch.cuda.synchronize()
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            barrier.wait()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    module, (x, dy) = modules[index], problems[index]
                    assert_all_same(
                        gradients(module, list(module.parameters()), x, dy), expected[index]
                    )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_tensors_on_the_cpu(device, recipe):
    """What the graph keeps may be moved away and back by saved-tensor hooks."""
    module = layer(recipe, device)
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn(40, 96, device=device, dtype=torch.bfloat16)

    def offloaded(leaf):
        with torch.autograd.graph.save_on_cpu():
            return module(leaf)

    ours = gradients(offloaded, module.parameters(), x, dy)
    assert_all_same(ours, gradients(module, module.parameters(), x, dy))


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise", "blockwise_1x128"])
def test_autocast_leaves_other_operators_alone(device, granularity):
    """Inside a region of autocast no operator rounds its fp32 arithmetic to 16 bits."""
    ops = torch.ops.fp8
    quantize = getattr(ops, f"quantize_{granularity}")
    x, weight = torch.randn(48, 160, device=device), torch.randn(32, 160, device=device)

    def run():
        (a, scale_a), (b, scale_b) = quantize(x), quantize(weight)
        out = torch.ones(48, 32, device=device)
        ops.scaled_mm_accumulate_(out, a, b, scale_a, scale_b)
        product = ops.scaled_mm(a, b, scale_a, scale_b, None, torch.float32)
        return a, scale_a, ops.dequantize(a, scale_a, torch.float32), product, out

    expected = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_all_same(run(), expected)


def test_quantize_has_no_gradient(device):
    """A backward that reaches quantize or dequantize says so, instead of giving zeros."""
    x = torch.randn(8, 32, device=device, requires_grad=True)
    y = torch.ops.fp8.dequantize(*torch.ops.fp8.quantize_rowwise(x))
    if y.requires_grad:
        with pytest.raises(RuntimeError, match="not implemented"):
            y.sum().backward()
