"""What only a GPU shows of norms: the CPU's bits, determinism, graphs, no waiting, launches."""

from __future__ import annotations

import pytest
import test_norm_values as values
import torch
from norm_reference import DTYPES, FORMS, LAYER
from reference import assert_same_bits
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu
OPS = torch.ops.fp8
CPU_SMS = 132  # host/norm.h: sums over rows are cut for as many multiprocessors there


# Rows by kernel: blocks that stay take several rows a slot (the backward's always, the forward's
# from four a slot on), slots of 1 to 512 threads, rows fewer than slots or than what is on its way.
MANY = (
    *((1, 4096), (3, 128), (530, 4096), (4400, 4096), (2200, 8192), (1100, 16384)),
    *((140_001, 128), (17_001, 1001), (600, 264)),
)


def results(form, tensors, device, joins=True):
    """joins: a residual is added before RMSNorm, and its gradient to dx."""
    x, residual, dy, weight, bias = (None if t is None else t.to(device) for t in tensors)
    number = values.NUMBERS[form]
    bias = bias if form == LAYER else None
    residual = residual if joins else None
    added = residual if form != LAYER else None
    y, total, mean, rstd = OPS._norm_forward(x, added, weight, bias, 1e-6, number)
    saved = (total if added is not None else x, mean if form == LAYER else None, rstd, weight)
    options = (dy.dtype if weight is None else weight.dtype, number, True, True, form == LAYER)
    return (y, total, mean, rstd, *OPS._norm_backward(dy, *saved, residual, *options))


def assert_same_results(ours, expected):
    names = ("y", "sum", "mean", "rstd", "dx", "dweight", "dbias")
    equal_parts = torch.cuda.get_device_properties(0).multi_processor_count == CPU_SMS
    for name, a, b in zip(names, ours, expected, strict=True):
        if name.startswith("d") and name != "dx" and not equal_parts:
            continue
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40_000, 8), (70_001, 128), (3001, 1000), *values.SHAPES])
def test_norm_has_the_bits_of_the_cpu(shape, dtype, form, poisoned_memory):
    tensors = values.tensors(*shape, dtype)
    ours, expected = results(form, tensors, "cuda"), results(form, tensors, "cpu")
    assert_same_results(ours, expected)


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("shape", MANY)
def test_norm_of_many_rows_has_the_bits_of_the_cpu(shape, joins, form, poisoned_memory):
    tensors = values.tensors(*shape, torch.bfloat16)
    ours, expected = (results(form, tensors, device, joins) for device in ("cuda", "cpu"))
    assert_same_results(ours, expected)


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["offset", "odd columns", "no parameters", "wide parameters"])
def test_norm_of_rows_that_lie_elsewhere_has_the_bits_of_the_cpu(case, dtype, form):
    wide = values.tensors(17_000, 1032, dtype)

    def part(device, joins):
        x, residual, dy, weight, bias = (t.to(device) for t in wide)
        if case == "offset":  # not on 16 bytes
            x, weight, bias = x[:, 3:1027], weight[3:1027], bias[3:1027]
            residual, dy = residual[:, :1024], dy[:, :1024]
        if case == "odd columns":  # on 16 bytes, a part of an eight at the end
            x, residual, dy, weight, bias = (t[..., :1021] for t in (x, residual, dy, weight, bias))
        if case == "no parameters":
            weight = bias = None
        if case == "wide parameters":
            weight, bias = weight.float(), bias.float()
        return results(form, (x, residual, dy, weight, bias), device, joins)

    for joins in (False, True):
        assert_same_results(part("cuda", joins), part("cpu", joins))


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("cols", [64, 128, 256])
def test_norm_of_heads_has_the_bits_of_the_cpu(cols, form):
    """q and k: dy comes with heads before positions."""
    x, _, dy, weight, bias = values.tensors(2 * 601 * 12, cols, torch.bfloat16)

    def heads(device, swapped):
        ours = x.to(device).view(2, 601, 12, cols)
        theirs = dy.to(device).view(2, 12, 601, cols).transpose(1, 2)
        first, last = (theirs, ours) if swapped else (ours, theirs)
        return results(form, (first, None, last, weight, bias), device, False)

    for swapped in (False, True):
        assert_same_results(heads("cuda", swapped), heads("cpu", swapped))


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("shape", [(8192, 4096), (65_536, 128), (500, 20_000)])
def test_norm_is_deterministic(shape, form):
    tensors = values.tensors(*shape, torch.bfloat16, device="cuda")
    first = results(form, tensors, "cuda")
    for _ in range(3):
        for a, b in zip(results(form, tensors, "cuda"), first, strict=True):
            assert_same_bits(a, b, "again")


@pytest.mark.parametrize("form", [FORMS[0], LAYER])
def test_norm_in_a_graph_on_another_stream(form):
    tensors = values.tensors(300, 1024, torch.bfloat16, device="cuda")
    expected = results(form, tensors, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = results(form, tensors, "cuda")
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(made, expected, strict=True):
        assert_same_bits(a, b, "graph")


@pytest.mark.parametrize("form", [*FORMS, LAYER])
def test_norm_launches_one_kernel_forward_and_two_backward(form):
    x, _, dy, weight, bias = values.tensors(512, 4096, torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def step():
        norm = OPS.layer_norm(*leaves) if form == LAYER else OPS.rms_norm(*leaves[:2], 1e-6, form)
        return torch.autograd.grad(norm, leaves if form == LAYER else leaves[:2], dy)

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in prof.events() if "norm_" in e.name]
    assert len(kernels) == 3, kernels


def test_layer_norm_in_autocast_is_torchs():
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours = OPS.layer_norm(x, weight, bias)
        theirs = torch.nn.functional.layer_norm(x, (256,), weight, bias)
        assert OPS.rms_norm(x).dtype == torch.bfloat16
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rms_norm_is_eagers_on_the_gpu_up_to_its_root(form):
    """Eager's rsqrt may be 2 ulp off: an element may round to its neighbour."""
    import norm_reference as reference

    x, _, dy, weight, _ = values.tensors(512, 4096, torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y, eager = OPS.rms_norm(*leaves, 1e-6, form), reference.eager(*leaves, 1e-6, form)
    assert float((y == eager).float().mean()) > 0.98
    torch.testing.assert_close(y, eager, rtol=2**-6, atol=1e-6)
    ours = torch.autograd.grad(y, leaves, dy)
    theirs = torch.autograd.grad(eager, leaves, dy)
    assert float((ours[0] == theirs[0]).float().mean()) > 0.95
    for got, expected in zip(ours, theirs, strict=True):
        atol = 2**-8 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=atol)


@pytest.mark.parametrize("cols", [1, 5, 13, 2049])
@pytest.mark.parametrize("rows", [3, 3000])
def test_columns_that_are_not_there_add_nothing_to_huge_rows(rows, cols):
    # Beyond the last column x is 0, and (0 - mean) * rstd may be Inf.
    x = torch.full((rows, cols), 1e38, dtype=torch.bfloat16)
    dy = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, expected = (
        results(LAYER, (x, None, dy, torch.ones(cols).bfloat16(), None), device)
        for device in ("cuda", "cpu")
    )
    assert_same_bits(ours[4].cpu(), expected[4], "dx")
