"""rope and its gradients, bit for bit against the same formulas in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from inputs import expanded_views, strided_views
from reference import assert_same_bits
from rope_reference import BF16, DTYPES, FORMS, FP16, FP32, LAYOUTS, SHAPES, eager, heads, problem

import fp8

OPS = torch.ops.fp8


def assert_lie_alike(actual, expected):
    """Of dimensions of one element the stride means nothing."""
    strides = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
    assert all(a == b for size, a, b in strides if size > 1), (actual.stride(), expected.stride())


def check(q, k, cos, sin, layout, rounding, rotary=None, scale=1.0):
    """Values and gradients of q and k, in one call. scale: of the results' gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    theirs = [x.detach().requires_grad_() for x in (q, k)]
    options = {"layout": layout, "rounding": rounding, "rotary_dim": rotary}
    made = fp8.ops.rope(*leaves, cos, sin, **options)
    rotary = cos.shape[-1] if rotary is None else rotary
    expected = [eager(x, cos, sin, layout, rounding, rotary) for x in theirs]
    grads = [(scale * torch.randn(y.shape, device=y.device)).to(y.dtype) for y in expected]
    for grad in grads:
        torch.atleast_2d(grad)[..., ::4, :] = 0.0
    for name, a, b in zip("qk", made, expected, strict=True):
        assert_same_bits(a, b, name)
    ours = torch.autograd.grad(made, leaves, grads)
    for name, x, a, b in zip(
        "qk", leaves, ours, torch.autograd.grad(expected, theirs, grads), strict=True
    ):
        assert_same_bits(a, b, f"gradient of {name}")
        if x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous()):
            assert_lie_alike(a, x)
    return made, expected


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_pair", [False, True])
def test_rope_has_the_bits_of_eager(device, shape, dtypes, per_pair, poisoned_memory):
    rotary = shape[-1]
    for layout, rounding in FORMS:
        q, k, cos, sin = problem(shape, dtypes, per_pair, device)
        check(q, k, cos, sin, layout, rounding, rotary if per_pair else None)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rope_lies_in_memory_as_eager(device, dtype):
    """Heads before positions and the other way round; a part of wider rows."""
    cos, sin = torch.randn(2, 5, 32, device=device).to(dtype)
    joint = torch.randn(2, 5, 9 * 32, device=device).to(dtype)
    for q in (
        heads(2, 3, 5, 32, dtype, device),
        heads(2, 3, 5, 32, dtype, device).contiguous(),
        joint[..., 32 : 5 * 32].unflatten(-1, (4, 32)).transpose(1, 2),
        joint.unflatten(-1, (3, 3, 32))[..., 1, :].transpose(1, 2),
        torch.randn(3, 2, 5, 32, device=device).to(dtype).transpose(0, 1),
    ):
        made, expected = check(q, q[:, :1], cos, sin, "halves", "each")
        assert_lie_alike(made[0], expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rope_of_merged_projections(device, dtype, layout):
    """q and k are column slices of one matrix, whose rows are longer."""
    merged = torch.randn(2, 6, (4 + 2 + 2) * 64, device=device).to(dtype)
    q, k, _ = merged.split([4 * 64, 2 * 64, 2 * 64], dim=-1)
    q, k = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k))
    cos, sin = torch.randn(2, 2, 1, 6, 64, device=device).to(dtype)
    check(q, k, cos, sin, layout, "each")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rope_of_any_strides(device, dtype, layout):
    x = torch.randn(12, 56, device=device).to(dtype)
    cos, sin = torch.randn(2, 56, device=device).to(dtype)
    for view in (strided_views(x) | expanded_views(x)).values():
        angles = [t[: view.shape[-1] // 2 * 2] for t in (cos, sin)]
        check(view, view[:3], *angles, layout, "each")


@pytest.mark.parametrize(
    ("x_shape", "cos_shape"),
    [
        ((3, 5, 16), (5, 16)),
        ((5, 3, 16), (5, 1, 16)),  # heads last but one
        ((2, 3, 5, 16), (2, 3, 5, 16)),  # each head its own
        ((2, 3, 5, 16), (2, 1, 1, 16)),
        ((2, 3, 5, 16), (16,)),
        ((2, 3, 5, 16), (1, 3, 1, 8)),
        ((5, 16), (5, 16)),
        ((16,), (16,)),
    ],
)
def test_rope_broadcasts_cos_and_sin(device, x_shape, cos_shape):
    x = torch.randn(x_shape, device=device)
    cos, sin = torch.randn(2, *cos_shape, device=device)
    check(x, x.clone(), cos, sin, "interleaved", "each", 16)
    check(x, x.clone(), cos, sin.flip(-1), "halves", "once", 16)


def test_rope_of_angles_of_other_strides(device):
    """cos and sin lie differently: of a longer table, expanded, transposed."""
    x = torch.randn(2, 3, 5, 32, device=device).bfloat16()
    table = torch.randn(9, 64, device=device).bfloat16()
    cos, sin = table[2:7, :32], torch.randn(32, 5, device=device).bfloat16().t()
    check(x, x[:, :1], cos, sin, "halves", "each")
    check(x, x[:, :1], cos[:1].expand(5, 32), sin, "interleaved", "each")
    odd = table[:5, 1:33]  # no 16-byte boundary
    check(x, x[:, :1], odd, odd, "halves", "each")


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 0, 16), (2, 3, 5, 0)])
def test_rope_of_nothing(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    other = torch.randn(2, 3, shape[2], shape[3], device=device)
    cos, sin = torch.randn(2, *shape[2:], device=device)
    for q, k in ((x, other), (other, x)):
        made = fp8.ops.rope(q, k, cos, sin)
        for a, b in zip(made, (q, k), strict=True):
            assert_same_bits(a, eager(b, cos, sin, "halves", "each", shape[-1]), "nothing")
        (grad,) = torch.autograd.grad(sum(y.sum() for y in made), x)
        assert grad.shape == x.shape


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rope_of_special_values(device, dtype):
    """Infinities, NaN, zeros and the largest and smallest numbers, in x and in the angles."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4
    special = [0.0, -0.0, 1.0, -1.0, largest, -largest, smallest, float("inf"), float("nan")]
    x = torch.tensor(special, dtype=dtype, device=device)
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9)).to(device)
    pairs = x[grid]  # [81, 2]
    q = torch.cat((pairs[:, :1].expand(-1, 8), pairs[:, 1:].expand(-1, 8)), -1)
    cos, sin = (x[torch.randint(9, (81, 16))].to(device) for _ in range(2))
    for layout in LAYOUTS:
        check(q, q.flip(0), cos, sin, layout, "each")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 64, 64), (2, 3, 2, 5, 64, 48), (2, 3, 2, 5, 33, 6)])
def test_rope_of_gradients_that_become_zero(device, dtypes, shape):
    """Where they are too small for q's dtype, and of either sign."""
    smallest = torch.finfo(dtypes[0]).smallest_normal * torch.finfo(dtypes[0]).eps
    for layout, rounding in FORMS:
        tensors = problem(shape, dtypes, False, device)
        check(*tensors, layout, rounding, scale=2 * smallest)


def test_rope_of_q_alone(device):
    q, k, cos, sin = problem(SHAPES[0], (BF16, BF16), False, device)
    alone, none = fp8.ops.rope(q, None, cos, sin)
    assert none is None
    together = fp8.ops.rope(q, k, cos, sin)
    assert_same_bits(alone, together[0])
    assert_same_bits(fp8.ops.rope(k, None, cos, sin)[0], together[1])


def test_rope_of_positions_that_differ(device):
    """k may have more positions than q, where the angles are those of all."""
    cos, sin = torch.randn(2, 16, device=device)
    q, k = torch.randn(2, 4, 3, 16, device=device), torch.randn(1, 2, 7, 16, device=device)
    check(q, k, cos, sin, "halves", "each")


def test_rope_writes_none_of_its_inputs(device):
    tensors = problem(SHAPES[0], (BF16, BF16), False, device)
    before = [t.clone() for t in tensors]
    fp8.ops.rope(*tensors)
    for a, b in zip(tensors, before, strict=True):
        assert_same_bits(a, b, "input")
