"""grouped_mm: groups against fp64 of the dequantized operands; sizes by enumeration; errors."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import bounds
import pytest
import torch
from reference import E4M3, E5M2, FLOAT_DTYPES, assert_same_bits
from torch import Tensor

import fp8

OPS = torch.ops.fp8
GRANULARITIES = ("tensorwise", "rowwise", "blockwise")
PAD = 32  # columns: core::kGroupPad
SKEWED = (700, 0, 0, 1, 0, 3, 0, 0, 650, 2, 0, 0)


class Problem(NamedTuple):
    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    offsets: Tensor


def codes(*shape: int, positive: bool = False) -> Tensor:
    drawn = torch.randn(shape) * 100
    return (drawn.abs() if positive else drawn).clamp(-448, 448).to(E4M3)


def rows(counts, n, k, granularity="rowwise", device="cpu", spare=0, positive=False) -> Problem:
    """Made on the CPU, so that every device sees the same values. `spare` rows lie behind."""
    total, groups, blocks = sum(counts) + spare, len(counts), -(-k // 128)
    shapes = {
        "tensorwise": ((), ()),
        "rowwise": ((total, 1), (groups, n, 1)),
        "blockwise": ((total, blocks), (groups, -(-n // 128), blocks)),
    }[granularity]
    scales = [torch.rand(shape) / 64 + 2**-8 for shape in shapes]
    made = (codes(total, k, positive=positive), codes(groups, n, k, positive=positive), *scales)
    return Problem(*(t.to(device) for t in (*made, torch.tensor(counts).cumsum(0).int())))


def columns(counts, m, n, device="cpu", positive=False) -> Problem:
    """Groups of columns with zeros behind their own, and poison behind the last group."""
    parts = [
        torch.nn.functional.pad(
            codes(m + n, count, positive=positive).view(torch.uint8),
            (0, max(-(-count // PAD) * PAD, PAD) - count),
        )
        for count in counts
    ]
    behind = torch.full((m + n, 48), 0x7F, dtype=torch.uint8)
    both = torch.cat([*parts, behind], 1).view(E4M3)
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0).int()
    scales = (torch.rand(len(counts), extent) / 64 + 2**-8 for extent in (m, n))
    made = (both[:m].contiguous(), both[m:].contiguous(), *scales, ends)
    return Problem(*(t.to(device) for t in made))


def check(p: Problem, actual: Tensor, fast_accum: bool) -> None:
    """Each group within the bound of scaled_mm (../bounds.py); zeros where there is nothing."""
    blockwise = p.scale_a.dim() == 2 and p.b.dim() == 3 and p.scale_a.shape[1] > 1
    way = bounds.accumulation_of(p.a.device.type, fast_accum and not blockwise)
    rounded = actual.dtype
    ends = [0, *p.offsets.tolist()]
    for g, (begin, end) in enumerate(pairwise(ends)):
        if p.b.dim() == 2:
            operands = (p.a[:, begin:end], p.b[:, begin:end])
            scales = (p.scale_a[g][:, None], p.scale_b[g][:, None])
            result, out = bounds.product(*operands, *scales), actual[g]
        elif begin == end:
            continue
        else:
            of_rows = p.scale_a.dim() > 0
            scales = (p.scale_a[begin:end], p.scale_b[g]) if of_rows else (p.scale_a, p.scale_b)
            result, out = bounds.product(p.a[begin:end], p.b[g], *scales), actual[begin:end]
        bounds.assert_within(out, result, way, f"group {g}, rounded to {rounded}")
    if p.b.dim() == 3:
        assert not actual[ends[-1] :].any()


@pytest.mark.parametrize("fast_accum", [True, False], ids=["fast", "split"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_grouped_mm_rows(device, out_dtype, granularity, fast_accum, poisoned_memory):
    p = rows((37, 0, 300, 1, 64, 130), 272, 400, granularity, device, spare=9)
    check(p, OPS.grouped_mm(*p, out_dtype, fast_accum), fast_accum)


@pytest.mark.parametrize("fast_accum", [True, False], ids=["fast", "split"])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_grouped_mm_columns(device, out_dtype, fast_accum, poisoned_memory):
    p = columns((37, 0, 300, 1, 64, 130), 144, 272, device)
    check(p, OPS.grouped_mm(*p, out_dtype, fast_accum), fast_accum)


@pytest.mark.parametrize(
    ("granularity", "order"),
    [("rowwise", "ascending"), ("rowwise", "descending"), ("blockwise", "ascending")],
)
def test_grouped_mm_every_size_of_rows(device, granularity, order, poisoned_memory):
    """0 to 300 rows, in one call: every place of a group's end in a tile, and of its beginning."""
    counts = range(301) if order == "ascending" else range(300, -1, -1)
    p = rows(tuple(counts), 48, 160, granularity, device)
    check(p, OPS.grouped_mm(*p, torch.bfloat16, False), False)


@pytest.mark.parametrize("fast_accum", [True, False], ids=["fast", "split"])
def test_grouped_mm_every_size_of_columns(device, fast_accum, poisoned_memory):
    p = columns(tuple(range(301)), 80, 48, device)
    check(p, OPS.grouped_mm(*p, torch.float32, fast_accum), fast_accum)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("counts", [SKEWED, (0, 0, 1500, 0), (0,) * 1022 + (5,), (1,) * 60])
def test_grouped_mm_skewed_rows(device, counts, granularity, poisoned_memory):
    p = rows(counts, 144, 272, granularity, device)
    check(p, OPS.grouped_mm(*p, torch.bfloat16, False), False)


def test_grouped_mm_skewed_columns(device, poisoned_memory):
    p = columns(SKEWED, 144, 272, device)
    check(p, OPS.grouped_mm(*p, torch.bfloat16, False), False)


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("k", [128, 1024, 4096, 16384])
@pytest.mark.parametrize("fast_accum", [True, False], ids=["fast", "split"])
def test_grouped_mm_long_sums(device, fast_accum, k, positive):
    """Sums of one sign lose most in the tensor cores: the flag must reach them."""
    p = rows((40, 24), 64, k, "rowwise", device, positive=positive)
    actual = OPS.grouped_mm(*p, torch.float32, fast_accum)
    check(p, actual, fast_accum)
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and positive and k > 1024:
        exact = bounds.product(p.a[:40], p.b[0], p.scale_a[:40], p.scale_b[0])
        error = bounds.relative_rms(actual[:40], exact)
        split = bounds.expected_rms(k, True, "split")
        assert error > 4 * split if fast_accum else error < 2 * split


@pytest.mark.parametrize("extent", [(16, 16), (7, 33), (264, 8), (20, 130)], ids=str)
def test_grouped_mm_extents(device, extent, poisoned_memory):
    """Also those that no kernel takes as they are."""
    n, k = extent
    for granularity in GRANULARITIES:
        p = rows((19, 0, 50), n, k, granularity, device, spare=2)
        check(p, OPS.grouped_mm(*p, torch.bfloat16, False), False)
    p = columns((19, 0, 50), n, k, device)
    check(p, OPS.grouped_mm(*p, torch.bfloat16, False), False)


def test_grouped_mm_strided_operands(device):
    p = rows((30, 34), 48, 272, "blockwise", device)
    expected = OPS.grouped_mm(*p)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (p.scale_a, p.scale_b)]
    a, b = (t.view(torch.uint8).repeat_interleave(2, -1)[..., ::2].view(E4M3) for t in (p.a, p.b))
    assert_same_bits(OPS.grouped_mm(a, b, *spread, p.offsets), expected)


def test_grouped_mm_scales_of_one_block_with_strides_of_their_own(device, poisoned_memory):
    """Strides of extents that are 1 mean nothing, and do not make a tensor less contiguous."""
    p = rows((0, 1), 2, 16, "blockwise", device)
    expected = OPS.grouped_mm(*p)
    scale_b = p.scale_b.flatten().as_strided((2, 1, 1), (1, 2, 2))
    assert scale_b.is_contiguous()
    assert_same_bits(OPS.grouped_mm(*p._replace(scale_b=scale_b)), expected)


def test_grouped_mm_nan_stays_in_its_group(device):
    """Tiles and the 128s of a contraction run into the next group: nothing of it may be seen."""
    p = rows((60, 61), 48, 64, "rowwise", device)
    p.a.view(torch.uint8)[60:] = 0x7F
    actual = OPS.grouped_mm(*p)
    assert actual[:60].isfinite().all()
    assert actual[60:].isnan().all()
    p = columns((40, 33), 48, 64, device)
    p.a.view(torch.uint8)[:, 64:] = 0x7F
    actual = OPS.grouped_mm(*p)
    assert actual[0].isfinite().all()
    assert actual[1].isnan().all()


@pytest.mark.parametrize("make", [rows, columns])
def test_grouped_mm_repeats_bits(device, make):
    p = make(SKEWED, 144, 272, device=device)
    first = OPS.grouped_mm(*p)
    for _ in range(3):
        assert_same_bits(OPS.grouped_mm(*p), first)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_grouped_mm_does_not_depend_on_the_other_groups(device, granularity):
    p = rows((50, 300, 7), 144, 272, granularity, device)
    together = OPS.grouped_mm(*p, torch.bfloat16, False)
    scaled = p.scale_a.dim() > 0
    alone = OPS.grouped_mm(
        p.a[50:350],
        p.b[1:2],
        p.scale_a[50:350] if scaled else p.scale_a,
        p.scale_b[1:2] if scaled else p.scale_b,
        torch.tensor([300], device=device).int(),
        torch.bfloat16,
        False,
    )
    assert_same_bits(together[50:350], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [rows, columns])
def test_grouped_mm_graph_follows_the_offsets(make):
    p = make((64, 128, 0, 32), 144, 272, device="cuda")
    OPS.grouped_mm(*p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS.grouped_mm(*p)
    for ends in ([32, 96, 160, 224], [0, 0, 0, 224], [96, 128, 128, 192]):
        if make is columns and 0 in ends:
            continue
        p.offsets.copy_(torch.tensor(ends))
        graph.replay()
        assert_same_bits(out, OPS.grouped_mm(*p))


@pytest.mark.gpu
def test_grouped_mm_on_two_streams():
    p, q = rows(SKEWED, 144, 272, device="cuda"), columns(SKEWED, 144, 272, device="cuda")
    expected = [OPS.grouped_mm(*p), OPS.grouped_mm(*q)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        found = []
        for stream, problem in zip(streams, (p, q), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(OPS.grouped_mm(*problem))
        torch.cuda.synchronize()
        for actual, wanted in zip(found, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.gpu
def test_grouped_mm_beyond_32_bits_of_elements():
    """More than 2^31 results, the last of them in the last group."""
    n, counts = 32768, (65536, 1000)
    p = rows(counts, n, 32, "tensorwise", "cuda")
    out = OPS.grouped_mm(*p)
    assert out.numel() > 2**31
    last = slice(65536, 66536)
    alone = OPS.scaled_mm(p.a[last], p.b[1], p.scale_a, p.scale_b)
    torch.testing.assert_close(out[last], alone, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("counts", "n", "k"), [((0, 0), 16, 32), ((3, 4), 0, 32), ((3, 4), 16, 0)], ids=str
)
def test_grouped_mm_without_elements(device, counts, n, k):
    p = rows(counts, n, k, "tensorwise", device)
    out = OPS.grouped_mm(*p)
    assert out.shape == (sum(counts), n)
    assert not out.any()


def test_grouped_mm_errors(device):
    p = rows((3, 5), 32, 256, "rowwise", device)

    def refuses(error, text, **changed):
        with pytest.raises(error, match=re.escape(text)):
            fp8.ops.grouped_mm(**(p._asdict() | changed))

    refuses(TypeError, "expected a in float8_e4m3fn, got float8_e5m2", a=p.a.to(E5M2))
    refuses(ValueError, "expected a=[R, K] and b=[E, N, K]", a=p.a[0])
    refuses(ValueError, "must share the last dimension, got a=[8, 128]", a=p.a[:, :128])
    refuses(TypeError, "expected offsets in int32, got int64", offsets=p.offsets.long())
    refuses(ValueError, "expected offsets of shape [E] = [2], got [1]", offsets=p.offsets[:1])
    refuses(TypeError, "float32, got scale_a float64", scale_a=p.scale_a.double())
    refuses(ValueError, "(rowwise), or [R, ceil(K / 128)]", scale_a=p.scale_a[:, 0])
    flat = {"b": p.b[0], "offsets": torch.zeros(8, device=device, dtype=torch.int32)}
    refuses(ValueError, "expected scale_a [E, M] and scale_b [E, N]", **flat)
    refuses(TypeError, "float16 or float32, got float64", out_dtype=torch.double)
    many = torch.zeros(1024, device=device, dtype=torch.int32)
    wide = p.b[:1].expand(1024, -1, -1)
    refuses(ValueError, "at most 1023 groups, got 1024", b=wide, offsets=many)
