"""What only a GPU shows of grouped products: the CPU's bits, no waiting, graphs, launches."""

from __future__ import annotations

import experts_problem as frozen
import grouped_reference as reference
import pytest
import test_experts_frozen as of_frozen
import test_moe_experts as moe
import torch
from grouped_reference import RECIPES, ROUTINGS
from reference import assert_same_bits
from sample import ROWWISE
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu
OPS = torch.ops.fp8


MANY_TILES = [*(index * 37 % 150 for index in range(130)), 1000]  # of 128 rows by 64 columns


@pytest.mark.parametrize(
    ("counts", "k"),
    [*((counts, 208) for counts in ROUTINGS.values()), (MANY_TILES, 1936)],
    ids=[*ROUTINGS, "many tiles"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_operands_have_the_bits_of_the_cpu(counts, k, dtype, poisoned_memory):
    """x's transposed copy with its padding, its scales, and where groups lie in it."""
    p = reference.problem(counts, k, 32, dtype, spare=9)
    expected = OPS._grouped_forward(p.x, p.weight, p.offsets, None, ROWWISE, True)[1:4]
    on_gpu = [t.cuda() for t in p]
    actual = OPS._grouped_forward(on_gpu[0], on_gpu[1], on_gpu[2], None, ROWWISE, True)[1:4]
    for name, a, b in zip(("x_t", "x_t_scale", "padded_offsets"), actual, expected, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("tokens", [1, 96, 5000])
@pytest.mark.parametrize("experts", [3, 128, 700])
def test_routing_has_the_bits_of_the_cpu(tokens, experts):
    tensors = moe.problem(tokens, 16, 16, experts, 2)
    tensors[1][::7, 0] = experts  # sentinels
    expected = OPS._moe_forward(*tensors, 0, False, 1.702, 7.0, ROWWISE)[2:5]
    actual = OPS._moe_forward(
        *(t if t is None else t.cuda() for t in tensors), 0, False, 1.702, 7.0, ROWWISE
    )[2:5]
    for name, a, b in zip(("offsets", "place", "source"), actual, expected, strict=True):
        assert_same_bits(a, b, name)


def experts_step(tensors, recipe):
    """A forward and backward of moe_experts on these tensors themselves."""
    y = OPS.moe_experts(*tensors, recipe=recipe)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


def leaves_of(tensors):
    return [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_experts_never_waits_for_the_gpu(recipe):
    tensors = leaves_of(moe.problem(device="cuda", bias=True))
    p = reference.problem(ROUTINGS["random"], 64, 48, device="cuda")
    experts_step(tensors, recipe)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts_step(tensors, recipe)
        reference.run(p, recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_experts_cuda_graph(recipe):
    """One graph serves every routing: the extents of groups are read on the device."""
    tensors = leaves_of(moe.problem(tokens=300, device="cuda", bias=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts_step(tensors, recipe)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts_step(tensors, recipe)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = moe.problem(tokens=300, device="cuda", bias=True)
        fresh[1][seed::5, 1] = 6 if seed else 0  # sentinels, and a skew
        with torch.no_grad():
            for old, new in zip(tensors, fresh, strict=True):
                if old is not None:
                    old.copy_(new)
        graph.replay()
        replayed = [t.detach().clone() for t in captured]
        for i, (ours, eager) in enumerate(
            zip(replayed, experts_step(tensors, recipe), strict=True)
        ):
            assert_same_bits(ours, eager.detach(), f"result {i}, seed {seed}")


def launches(run) -> list[str]:
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in recorded.events() if event.device_type == cuda]


def test_launches_of_moe_experts():
    """Forward: sort 3, quantize x 1 and weights 2, two products, activation 1, combine 1: 10, and 2
    more where products are ATen's. Transformers' grouped_mm takes about 30."""
    tensors = moe.problem(2048, 256, 128, 8, 2, device="cuda")
    with torch.no_grad():
        found = launches(lambda: OPS.moe_experts(*tensors))
    assert len(found) <= 14, found  # CUTLASS may prepare its workspace


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
def test_launches_of_experts_frozen(granularity):
    """The same without the weights' two."""
    p = frozen.problem(granularity, 2048, 256, 128, 8, 2, device="cuda")
    with torch.no_grad():
        found = launches(lambda: OPS.experts_frozen(*p.args()))
    assert len(found) <= (8 if torch.cuda.get_device_capability() == (9, 0) else 12), found


@pytest.mark.parametrize("granularity", frozen.GRANULARITIES)
def test_experts_frozen_large(granularity):
    index = (torch.rand(4000, 4).pow(3) * 32).long()  # skewed
    p = frozen.problem(granularity, 4000, 512, 256, 32, 4, device="cuda", index=index)
    of_frozen.check(p, *frozen.run(p))


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_linear_large(recipe):
    """Thousands of rows: tiles that end inside groups, more blocks than multiprocessors."""
    counts = (1000, 0, 3333, 1, 129, 4096, 17, 128)
    p = reference.problem(counts, 512, 768, device="cuda")
    reference.check_values(p, reference.run(p, recipe), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_experts_large(recipe):
    index = (torch.rand(4000, 4).pow(3) * 32).long()  # skewed
    tensors = moe.problem(4000, 512, 256, 32, 4, device="cuda", index=index)
    moe.check(tensors, recipe=recipe)


def test_moe_experts_on_another_stream():
    tensors = moe.problem(device="cuda")
    expected = OPS.moe_experts(*tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = OPS.moe_experts(*tensors)
    side.synchronize()
    assert_same_bits(y, expected)
