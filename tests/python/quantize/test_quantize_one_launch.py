"""Tensors between 8 and 128 MB, whose maxima and cast are one launch of blocks that wait for each
other: the bits of two launches, in graphs, beside other work and on a part of the GPU."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import assert_same_bits, codes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu
OPS = torch.ops.fp8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def launches(run) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in recorded.events())


def off_by_one(x: Tensor) -> Tensor:
    """The same values from an address that no 16-byte load can take: two launches."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return flat[1:].view(x.shape).copy_(x)


def quantize(x: Tensor, dtype: torch.dtype = E4M3, **options) -> list[Tensor]:
    return [
        *OPS.quantize_tensorwise(x, dtype, **options),
        *OPS.quantize_tensorwise_transpose(x, dtype, **options),
        *OPS.quantize_rowwise_transpose(x, dtype, **options),
    ]


def assert_all_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


SHAPES = {  # with fewer, more and many more tiles than slots, whole and ragged
    torch.bfloat16: [(2048, 2048), (2500, 2072), (41, 110_000), (300_000, 24), (9000, 4096)],
    torch.float16: [(2500, 2072)],
    torch.float32: [(1500, 1500), (129, 16_500), (5000, 4100)],
}


# Per row and column two launches all the same: more columns of tiles than blocks at a time, and
# tiles that would leave a quarter of the GPU without any.
TWO_PER_ROW = {(torch.bfloat16, (41, 110_000)), (torch.float32, (1500, 1500))}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("x_dtype", "shape"), [(t, s) for t, shapes in SHAPES.items() for s in shapes], ids=str
)
def test_one_launch_gives_the_bits_of_two(x_dtype, shape, dtype):
    x = torch.randn(shape, device="cuda", dtype=x_dtype)
    other = off_by_one(x)
    assert_all_same(quantize(x, dtype), quantize(other, dtype))
    assert launches(lambda: OPS.quantize_tensorwise_transpose(x)) == 1
    assert launches(lambda: OPS.quantize_tensorwise_transpose(other)) == 2
    expected = 2 if (x_dtype, shape) in TWO_PER_ROW else 1
    assert launches(lambda: OPS.quantize_rowwise_transpose(x)) == expected
    assert launches(lambda: OPS.quantize_rowwise_transpose(other)) == 2


def test_one_launch_gives_the_bits_of_the_reference():
    x = torch.randn(2500, 2072, device="cuda", dtype=torch.bfloat16)
    expected = reference.quantize_tensorwise(x, E4M3)
    data, data_t, scale = OPS.quantize_tensorwise_transpose(x)
    assert_same_bits(scale, expected.scale)
    assert_same_bits(codes(data), expected.codes)
    assert_same_bits(codes(data_t), expected.codes.t())
    rows, columns = (reference.quantize_rowwise(t, E4M3) for t in (x, x.t()))
    data, data_t, scale, scale_t = OPS.quantize_rowwise_transpose(x)
    assert_same_bits(scale, rows.scale)
    assert_same_bits(scale_t, columns.scale)
    assert_same_bits(codes(data), rows.codes)
    assert_same_bits(codes(data_t), columns.codes)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [1601, 1603, 1605, 1607])
def test_one_launch_takes_rows_that_end_anywhere(cols, x_dtype):
    """Whole rows of 16-byte words in memory, of which a view has fewer columns."""
    wide = torch.full((3000, 1608), float("nan"), device="cuda", dtype=x_dtype)
    view = wide[:, :cols].copy_(torch.randn(3000, cols, device="cuda"))
    actual = quantize(view)
    assert not any(scale.isnan().any() for scale in actual if scale.dtype == torch.float32)
    assert_all_same(actual, quantize(off_by_one(view)))
    assert launches(lambda: OPS.quantize_tensorwise(view)) == 1
    assert launches(lambda: OPS.quantize_rowwise_transpose(view)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 3e38, 1e-38])
@pytest.mark.parametrize("place", [(0, 0), (4099, 2071), (2000, 1000)])
def test_one_launch_special_values(value, place):
    """Wherever it lies, in a slot to the end or read twice; zeros: an amax of 0."""
    x = torch.randn(4100, 2072, device="cuda", dtype=torch.bfloat16) * (1 if value else 0)
    x[place] = value
    for options in ({}, {"power_of_two": True}):
        assert_all_same(quantize(x, **options), quantize(off_by_one(x), **options))


def test_one_launch_in_a_graph_with_changed_values():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    quantize(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantize(x)
    for factor in (1.0, 3.0):
        x.normal_().mul_(factor)
        graph.replay()
        assert_all_same(captured, quantize(off_by_one(x)))


def test_one_launch_beside_itself_and_other_work():
    """Grids that wait for all their blocks, on several streams, among matmuls that fill the GPU."""
    inputs = [torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16) for n in (2048, 4096, 6000)]
    expected = [quantize(off_by_one(x)) for x in inputs]
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(6)]
    results = []
    for turn in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i >= len(inputs):
                    torch.mm(busy, busy)
                results.append((i, quantize(inputs[i % len(inputs)])))
        if turn % 4 == 3:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for i, result in results:
        assert_all_same(result, expected[i % len(inputs)])


def test_one_launch_on_a_part_of_the_gpu():
    """A green context has fewer multiprocessors than the plan counts on: two launches, then."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    expected = quantize(x)
    part = torch.cuda.green_contexts.GreenContext.create(num_sms=32, device_id=0)
    part.set_context()
    try:
        actual = quantize(x)
        torch.cuda.synchronize()
    finally:
        part.pop_context()
    assert_all_same(actual, expected)
