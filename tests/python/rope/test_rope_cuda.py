"""What only a GPU shows of rope: the CPU's bits, large tensors, graphs, no waiting, launches."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits
from rope_reference import BF16, DTYPES, FORMS, FP16, FP32, LAYOUTS, eager, problem
from torch.profiler import ProfilerActivity, profile

import fp8

pytestmark = pytest.mark.gpu
OPS = torch.ops.fp8

LARGE = (
    # batch, heads of q and of k, positions, D, R
    (2, 32, 8, 1031, 128, 128),
    (3, 13, 1, 517, 64, 64),
    (1, 40, 40, 300, 80, 32),
    (2, 7, 3, 129, 100, 100),
    (1, 64, 2, 77, 256, 192),
)


def step(q, k, cos, sin, grads, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    made = fp8.ops.rope(*leaves, cos, sin, **options)
    return [*made, *torch.autograd.grad(made, leaves, grads)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
def test_rope_has_the_bits_of_the_cpu_and_of_eager(shape, dtypes, poisoned_memory):
    for layout, rounding in FORMS:
        for per_pair in (False, True):
            q, k, cos, sin = problem(shape, dtypes, per_pair, "cpu")
            dtype = torch.promote_types(*dtypes) if rounding == "each" else dtypes[0]
            grads = [torch.randn_like(x).to(dtype) for x in (q, k)]
            options = {"layout": layout, "rounding": rounding, "rotary_dim": shape[-1]}
            expected = step(q, k, cos, sin, grads, **options)
            on_gpu = [x.cuda() for x in (q, k, cos, sin)]
            ours = step(*on_gpu, [g.cuda() for g in grads], **options)
            for name, a, b in zip(("q", "k", "dq", "dk"), ours, expected, strict=True):
                assert_same_bits(a, b, f"{name} {options}")
            for x, y in zip(on_gpu, ours[:2], strict=False):
                theirs = eager(x, *on_gpu[2:], layout, rounding, shape[-1])
                assert_same_bits(y, theirs, f"eager {options}")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_of_merged_projections_on_the_gpu(dtype, layout):
    merged = torch.randn(2, 513, (8 + 2 + 2) * 128, device="cuda").to(dtype)
    q, k, _ = merged.split([8 * 128, 2 * 128, 2 * 128], dim=-1)
    q, k = (x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in (q, k))
    cos, sin = torch.randn(2, 1, 1, 513, 128, device="cuda").to(dtype)
    grads = [torch.randn_like(x) for x in (q, k)]
    ours = step(q, k, cos, sin, grads, layout=layout)
    theirs = step(q.contiguous(), k.contiguous(), cos, sin, grads, layout=layout)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b, "merged")


def test_rope_of_more_than_two_to_the_31_elements():
    """Positions at the end lie past what 32 bits count."""
    count, size = 2**31 // (64 * 128) + 5, 128
    q = torch.randn(64 * size, device="cuda").bfloat16().repeat(count)
    q = q.view(1, count, 64, size).transpose(1, 2)
    cos, sin = torch.randn(2, count, size, device="cuda").bfloat16()
    made, _ = fp8.ops.rope(q, None, cos, sin)
    assert made.stride() == q.stride()
    for part in (slice(0, 3), slice(count - 3, count)):
        expected = eager(q[:, :, part], cos[part], sin[part], "halves", "each", size)
        assert_same_bits(made[:, :, part], expected, "part")


def test_rope_in_a_graph_on_another_stream():
    q, k, cos, sin = problem(LARGE[0], (BF16, BF16), False, "cuda")
    grads = [torch.randn_like(x) for x in (q, k)]
    expected = step(q, k, cos, sin, grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step(q, k, cos, sin, grads)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(made, expected, strict=True):
        assert_same_bits(a, b, "graph")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_launches_one_kernel_each_way(layout):
    q, k, cos, sin = problem(LARGE[0], (BF16, FP32), False, "cuda")
    grads = [torch.randn_like(x, dtype=FP32) for x in (q, k)]
    step(q, k, cos, sin, grads, layout=layout)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        step(q, k, cos, sin, grads, layout=layout)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA  # launches are events too, of the CPU
    kernels = [e.name for e in prof.events() if e.device_type == cuda]
    assert len(kernels) == 2, kernels
    assert all("rope_kernel" in name for name in kernels), kernels


def test_rope_of_two_devices_is_refused():
    q, k, cos, sin = problem(LARGE[1], (BF16, BF16), False, "cuda")
    with pytest.raises(ValueError, match="fp8::rope: expected cos on the device of q, cuda:0"):
        fp8.ops.rope(q, k, cos.cpu(), sin)
