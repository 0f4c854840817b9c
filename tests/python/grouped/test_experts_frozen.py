"""experts_frozen: the bits of moe_experts on the same codes, and gradients of those codes."""

from __future__ import annotations

import grouped_reference as reference
import pytest
import torch
from experts_problem import (
    GRANULARITIES,
    by_parts,
    leaves_of,
    numbers,
    problem,
    quantize,
    run,
    with_leaves,
)
from reference import FLOAT_DTYPES, assert_same_bits, sqnr

OPS = torch.ops.fp8
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")


def moe(p, *options, recipe):
    """moe_experts, which quantizes the weights itself."""
    return OPS.moe_experts(*p.args()[:3], *p.originals, *p.args()[7:], *options, recipe=recipe)


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_experts_frozen_has_the_bits_of_moe_experts(device, dtype, granularity, option, bias):
    p = problem(
        granularity, features=144, dtype=dtype, device=device, bias=bias, power_of_two=bool(option)
    )
    expected = moe(p, recipe=f"{granularity}{option}")
    assert_same_bits(OPS.experts_frozen(*p.args(), power_of_two=bool(option)), expected)


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_experts_frozen_gates(device, activation, interleaved, granularity, poisoned_memory):
    p = problem(granularity, device=device, bias=True)
    form = (activation, interleaved, 1.5, 3.0)
    expected = moe(p, *form, recipe=granularity)
    assert_same_bits(OPS.experts_frozen(*p.args(), *form), expected)
    # The gate's derivative is that of moe_experts: fp64 has the rest.
    y, dy, grads = run(p, activation, interleaved)
    check(p, y, dy, grads, activation, interleaved)


def check(p, y, dy, grads, activation="silu", interleaved=False, floor=20.0):
    """Near fp64 on what the codes stand for; what is quantized on the way leaves 20 dB and more, as
    in moe_experts' tests."""
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves_of(p).items()}
    tensors = (
        exact["x"],
        p.index,
        exact["weights"],
        numbers(p.gate_up, p.gate_up_scale),
        numbers(p.down, p.down_scale),
        exact.get("gate_up_bias"),
        exact.get("down_bias"),
    )
    y64 = reference.experts_fp64(tensors, activation, interleaved)
    assert sqnr(y, y64.detach()) >= floor
    wanted = torch.autograd.grad(y64, list(exact.values()), dy.double())
    for (name, leaf), expected in zip(exact.items(), wanted, strict=True):
        assert grads[name].shape == leaf.shape
        assert grads[name].dtype == getattr(p, name).dtype
        assert sqnr(grads[name], expected) >= floor, name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_experts_frozen_against_fp64(device, dtype, granularity, poisoned_memory):
    p = problem(granularity, hidden=144, features=176, dtype=dtype, device=device, bias=True)
    check(p, *run(p))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "features", "experts", "top_k"),
    [
        (1, 16, 16, 1, 1),
        (1, 64, 32, 8, 8),
        (7, 32, 16, 40, 3),
        (300, 96, 144, 5, 4),
        (20, 256, 384, 2, 1),
        (60, 64, 32, 300, 6),
    ],
)
def test_experts_frozen_extents(device, tokens, hidden, features, experts, top_k, granularity):
    p = problem(granularity, tokens, hidden, features, experts, top_k, device=device)
    floor = 15 if tokens == 1 else 20  # eight routing weights, or one, are few for an average
    check(p, *run(p), floor=floor)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_experts_frozen_gradients_are_those_of_linear_frozen(device, granularity):
    """Of one expert, composed: the same codes of dy, but for those that an exp moves (see
    test_moe_experts.py). Scales that are not multiplied, or of other rows, give other codes nearly
    everywhere. That x has rows of one expert alone leaves the order of sums."""
    index = torch.zeros(96, 1, dtype=torch.int64)
    p = problem(granularity, features=144, experts=1, top_k=1, device=device, index=index)
    p = p._replace(weights=torch.full_like(p.weights, 0.5))  # wherever it is multiplied
    y, dy, grads = run(p)
    leaves = leaves_of(p)
    composed = by_parts(p, leaves)
    assert sqnr(y, composed.detach().double()) >= 38
    expected = torch.autograd.grad(composed, leaves["x"], dy)[0]
    assert sqnr(grads["x"], expected.double()) >= 38


def test_experts_frozen_small_gradients_in_fp16(device):
    """dy times the weights' scales is below what float16 has."""
    p = problem("rowwise", dtype=torch.float16, device=device, experts=2)
    tiny = p._replace(
        gate_up_scale=p.gate_up_scale * 2**8, x=p.x * 2**-8, down_scale=p.down_scale * 2**-8
    )
    leaves = leaves_of(tiny)
    y = OPS.experts_frozen(*with_leaves(tiny, leaves))
    dy = torch.full_like(y, 2**-4)
    (dx,) = torch.autograd.grad(y, leaves["x"], dy)
    wide = tiny._replace(x=tiny.x.float())
    other = leaves_of(wide)
    y = OPS.experts_frozen(*with_leaves(wide, other))
    (expected,) = torch.autograd.grad(y, other["x"], dy.float())
    assert sqnr(dx, expected.double()) >= 20


def routings():
    skewed = torch.stack([torch.zeros(96), torch.arange(96) % 5 + 1], 1)
    return {
        "one expert takes all": torch.full((96, 1), 4),
        "some take none": torch.tensor([[1, 3]]).expand(96, 2).clone(),
        "skewed": skewed,
        "the same expert twice": torch.full((96, 2), 2),
    }


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("routing", routings())
def test_experts_frozen_routings(device, routing, granularity, poisoned_memory):
    index = routings()[routing].long()
    p = problem(granularity, top_k=index.shape[1], device=device, bias=True, index=index)
    check(p, *run(p))


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
@pytest.mark.parametrize("sentinel", [6, 1000, -1])
def test_experts_frozen_sentinels_contribute_nothing(
    device, sentinel, granularity, poisoned_memory
):
    p = problem(granularity, device=device, bias=True)
    p.index[::3, 0] = sentinel
    p.index[5] = sentinel
    y, dy, grads = run(p)
    check(p, y, dy, grads)
    assert not y[5].any()
    assert not grads["x"][5].any()
    assert not grads["weights"][p.index == sentinel].any()
    p.index[:] = sentinel
    y, _, grads = run(p)
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())


def test_experts_frozen_without_tokens(device):
    p = problem(tokens=0, device=device, bias=True)
    y, _, grads = run(p)
    assert y.shape == (0, 64)
    assert {name: tuple(grad.shape) for name, grad in grads.items()} == {
        "x": (0, 64),
        "weights": (0, 2),
        "gate_up_bias": (6, 96),
        "down_bias": (6, 64),
    }
    assert not any(grad.any() for grad in grads.values())


def test_experts_frozen_scale_shapes_mean_the_same(device):
    p = problem("tensorwise", device=device)
    expected, _, grads = run(p)
    one = [p.gate_up_scale.reshape(6), p.down_scale.reshape(6)]
    rows = [s.expand(6, n, 1) for s, n in zip(p.args()[4:7:2], (96, 64), strict=True)]
    for up, down in (
        one,
        [s.unsqueeze(1) for s in one],
        rows,
        [s.squeeze(2) for s in rows],
        [one[0], rows[1]],
        [s.contiguous() for s in rows],
    ):
        given = p._replace(gate_up_scale=up, down_scale=down)
        y, _, others = run(given)
        assert_same_bits(y, expected)
        # A scale per row is multiplied with dy, which is rounded then; codes may differ by one.
        assert sqnr(others["x"], grads["x"].double()) >= 25


def test_experts_frozen_of_one_block_says_which(device):
    """[E, 1, 1] is of blocks where there is one, unless x is to be scaled by row: with more than
    128 columns in h the two would differ, so the shapes are told apart by what was asked."""
    p = problem("tensorwise", device=device, hidden=64, features=64)
    blocks = run(p)[0]
    assert_same_bits(run(p, input_granularity="blockwise")[0], blocks)
    rows = run(p, input_granularity="rowwise")[0]
    expanded = p._replace(
        gate_up_scale=p.gate_up_scale.expand(6, 128, 1), down_scale=p.down_scale.expand(6, 64, 1)
    )
    assert_same_bits(run(expanded)[0], rows)


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
def test_experts_frozen_codes_of_any_storage(device, granularity):
    p = problem(granularity, hidden=256, features=128, device=device)
    expected, _, grads = run(p)

    def turned(t):
        return t.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(t.dtype)

    stored = p._replace(
        gate_up=turned(p.gate_up),
        down=turned(p.down),
        gate_up_scale=p.gate_up_scale.transpose(1, 2).contiguous().transpose(1, 2),
        down_scale=torch.cat([p.down_scale, p.down_scale], 2)[:, :, : p.down_scale.size(2)],
    )
    y, _, others = run(stored)
    assert_same_bits(y, expected)
    assert_same_bits(others["x"], grads["x"])


@pytest.mark.parametrize(("hidden", "features"), [(128, 256), (256, 64), (128, 64)])
def test_experts_frozen_scales_whose_extent_of_one_has_any_stride(device, hidden, features):
    """A tensor is contiguous whatever an extent of 1 has for a stride: a transposed one too. Of
    hidden 128 those of gate_up are [E, n, 1], of 64 features [E, 1, n]; the backward turns them."""
    p = problem("blockwise", hidden=hidden, features=features, device=device)

    def strided(scale, stride):
        shape, whole = scale.shape, scale.clone(memory_format=torch.contiguous_format)
        strides = [s if n > 1 else stride for n, s in zip(shape, whole.stride(), strict=True)]
        odd = whole.as_strided(shape, strides)
        assert odd.is_contiguous()
        return odd

    y, dy, grads = run(p)
    check(p, y, dy, grads)
    for stride in (1, 5):
        given = p._replace(
            gate_up_scale=strided(p.gate_up_scale, stride), down_scale=strided(p.down_scale, stride)
        )
        again, _, others = run(given)
        assert_same_bits(again, y)
        assert_same_bits(others["x"], grads["x"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("wanted", ["x", "weights", "gate_up_bias", "down_bias"])
def test_experts_frozen_one_gradient_alone(device, wanted, granularity):
    p = problem(granularity, device=device, bias=True)
    _, dy, grads = run(p)
    leaves = {name: leaf.requires_grad_(name == wanted) for name, leaf in leaves_of(p).items()}
    OPS.experts_frozen(*with_leaves(p, leaves)).backward(dy)
    assert_same_bits(leaves[wanted].grad, grads[wanted])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_experts_frozen_weights_in_bf16(device):
    p = problem(device=device)
    narrow = p._replace(weights=p.weights.bfloat16())
    y, _, grads = run(narrow)
    wide, _, wide_grads = run(narrow._replace(weights=narrow.weights.float()))
    assert_same_bits(y, wide)
    assert_same_bits(grads["weights"], wide_grads["weights"].bfloat16())


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
def test_experts_frozen_is_deterministic(device, granularity):
    p = problem(granularity, tokens=700, device=device, bias=True)
    y, _, grads = run(p)
    for _ in range(3):
        again, _, others = run(p)
        assert_same_bits(again, y)
        for name, grad in others.items():
            assert_same_bits(grad, grads[name], name)


def test_experts_frozen_saves_nothing_of_x(device):
    """Beside parameters: the first product and the routing, also where x is let go."""
    p = problem(tokens=256, device=device)
    known = {t.data_ptr() for t in p.args() if t is not None}
    saved = []

    def pack(t):
        assert t.data_ptr() != leaf.data_ptr()
        if t.data_ptr() not in known - {leaf.data_ptr()}:
            saved.append(t.numel() * t.element_size())
        return t

    leaf = p.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OPS.experts_frozen(*p.args())
    rows, features, experts = 512, 48, 6
    assert sum(saved) <= rows * 2 * features * 2 + rows * 4 * 3 + experts * 4


def test_experts_frozen_under_autocast(device):
    p = problem(dtype=torch.float32, device=device, bias=True)
    with torch.autocast(device, torch.bfloat16):
        y = OPS.experts_frozen(*p.args())
    biases = {name: getattr(p, name).bfloat16() for name in ("gate_up_bias", "down_bias")}
    assert_same_bits(y, OPS.experts_frozen(*p._replace(x=p.x.bfloat16(), **biases).args()))


def test_experts_frozen_non_finite_values_stay_with_their_token(device):
    p = problem(device=device)
    p.x[7, 3] = torch.inf
    y = OPS.experts_frozen(*p.args())
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
def test_experts_frozen_compiles(device, granularity):
    p = problem(granularity, device=device)
    expected, dy, grads = run(p)
    leaves = leaves_of(p)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*args):
        return OPS.experts_frozen(*args)

    y = compiled(*with_leaves(p, leaves))
    assert_same_bits(y.detach(), expected)
    dx, _ = torch.autograd.grad(y, list(leaves.values()), dy)
    assert_same_bits(dx, grads["x"])


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["rowwise", "blockwise"])
def test_experts_frozen_in_a_cuda_graph(granularity):
    """Nothing waits for the host: another routing, other values, the same graph."""
    p = problem(granularity, device="cuda", tokens=32)
    y = OPS.experts_frozen(*p.args())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.experts_frozen(*p.args())
    other = problem(granularity, device="cuda", tokens=32)
    for mine, theirs in zip(p.args()[:3], other.args()[:3], strict=True):
        mine.copy_(theirs)
    graph.replay()
    assert_same_bits(y, OPS.experts_frozen(*p.args()))


@pytest.mark.gpu
def test_experts_frozen_makes_nothing_of_the_weights():
    """No copy of codes or scales: what is allocated is of the tokens alone."""
    p = problem("rowwise", tokens=4, hidden=1024, features=512, experts=64, device="cuda")
    OPS.experts_frozen(*p.args())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    OPS.experts_frozen(*p.args())
    assert torch.cuda.max_memory_allocated() - before < p.gate_up.numel() // 8


def test_experts_frozen_reads_codes_of_quantize(device):
    """What linear_frozen's tests have of the codes themselves: NaN is NaN, zeros are zeros."""
    p = problem(device=device)
    codes = p.down.view(torch.uint8).clone()
    codes[2, 5, 7] = 0x7F
    y = OPS.experts_frozen(*p._replace(down=codes.view(p.down.dtype)).args())
    hit = (p.index == 2).any(1)
    assert y[hit, 5].isnan().all()
    assert y[~hit].isfinite().all()
    assert quantize(p.originals[1], "rowwise")[0].equal(p.down)
