"""moe_experts: its first product bit for bit, the whole against fp64, routings of every kind."""

from __future__ import annotations

import grouped_reference as reference
import pytest
import torch
from grouped_reference import RECIPES, WITH_OPTIONS
from reference import FLOAT_DTYPES, assert_same_bits, sqnr
from sample import POWER_OF_TWO, ROWWISE

import fp8
from fp8.integrations.transformers._experts import mixture

OPS = torch.ops.fp8
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")
NAMES = ("x", "index", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def problem(
    tokens=96,
    hidden=64,
    features=48,
    experts=6,
    top_k=2,
    dtype=torch.bfloat16,
    device="cpu",
    bias=False,
    transposed=False,
    index=None,
) -> list:
    def weight(rows, cols):
        drawn = (torch.randn(experts, rows, cols) / cols**0.5).to(dtype).to(device)
        return drawn.transpose(1, 2).contiguous().transpose(1, 2) if transposed else drawn

    weights, drawn = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    biases = [torch.randn(experts, n).to(dtype).to(device) for n in (2 * features, hidden)]
    return [
        torch.randn(tokens, hidden).to(dtype).to(device),
        (drawn if index is None else index).to(device),
        weights.to(device),
        weight(2 * features, hidden),
        weight(hidden, features),
        *(biases if bias else (None, None)),
    ]


def run(tensors, activation="silu", interleaved=False, recipe="rowwise"):
    """y, dy, and gradients by name."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    y = OPS.moe_experts(*leaves, activation, interleaved, 1.702, 7.0, recipe)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    named = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None and n != "index"}
    grads = torch.autograd.grad(y, list(named.values()), dy)
    return y.detach(), dy, dict(zip(named, grads, strict=True))


def check(tensors, activation="silu", interleaved=False, recipe="rowwise", floor=20.0):
    """Near fp64. e4m3 keeps 31.5 dB of an operand; y has passed through four quantizations, which
    alone leaves 25.5, a gradient through up to six, 23.7; biases dilute the noise, gates amplify it
    where they are steep: 20 dB in all."""
    y, dy, grads = run(tensors, activation, interleaved, recipe)
    exact = [
        t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    y64 = reference.experts_fp64(exact, activation, interleaved)
    assert sqnr(y, y64.detach()) >= floor
    leaves = {n: t for n, t in zip(NAMES, exact, strict=True) if t is not None and n != "index"}
    for (name, leaf), wanted in zip(
        leaves.items(), torch.autograd.grad(y64, list(leaves.values()), dy.double()), strict=True
    ):
        assert grads[name].dtype == dict(zip(NAMES, tensors, strict=True))[name].dtype
        assert grads[name].shape == leaf.shape
        assert sqnr(grads[name], wanted) >= floor, name
    return y, grads


@pytest.mark.parametrize("recipe", WITH_OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_moe_experts_against_fp64(device, activation, interleaved, recipe, poisoned_memory):
    check(problem(device=device, bias=True), activation, interleaved, recipe)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
def test_moe_experts_dtypes_and_storage(device, dtype, transposed, recipe):
    tensors = problem(dtype=dtype, device=device, transposed=transposed)
    _, grads = check(tensors, recipe=recipe)
    for name in ("gate_up", "down"):
        weight = dict(zip(NAMES, tensors, strict=True))[name]
        assert grads[name].stride() == weight.stride()


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "features", "experts", "top_k"),
    [
        (1, 16, 16, 1, 1),
        (1, 64, 32, 8, 8),
        (7, 32, 16, 40, 3),
        (300, 96, 144, 5, 4),
        (33, 4112, 32, 3, 2),  # rows of more than one register's worth of vectors
        (20, 32, 8208, 2, 1),
        (600, 64, 32, 300, 6),  # more experts than threads in a block
    ],
)
def test_moe_experts_extents(device, tokens, hidden, features, experts, top_k, recipe):
    floor = 18 if tokens == 1 else 20  # eight routing weights are few for an average
    tensors = problem(tokens, hidden, features, experts, top_k, device=device)
    check(tensors, recipe=recipe, floor=floor)


def routings():
    torch.manual_seed(7)
    tokens = 96
    skewed = torch.stack([torch.zeros(tokens), torch.arange(tokens) % 5 + 1], 1)
    return {
        "one expert takes all": torch.full((tokens, 1), 4),
        "some take none": torch.tensor([[1, 3]]).expand(tokens, 2).clone(),
        "skewed": skewed,
        "the same expert twice": torch.full((tokens, 2), 2),
    }


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize("routing", routings())
def test_moe_experts_routings(device, routing, recipe, poisoned_memory):
    index = routings()[routing].long()
    tensors = problem(top_k=index.shape[1], device=device, bias=True, index=index)
    _, grads = check(tensors, recipe=recipe)
    idle = [e for e in range(6) if e not in index.unique().tolist()]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert not grads[name][idle].any(), f"{name} of experts without tokens"


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize("sentinel", [6, 7, 1000, -1])
def test_moe_experts_sentinels_contribute_nothing(device, sentinel, recipe, poisoned_memory):
    """As if their weight were zero, and their weight's gradient is zero; for a token of sentinels
    alone, and where all are."""
    tensors = problem(device=device, bias=True)
    tensors[1][::3, 0] = sentinel
    tensors[1][5] = sentinel
    y, grads = check(tensors, recipe=recipe)
    assert not y[5].any()
    assert not grads["x"][5].any()
    assert not grads["weights"][tensors[1] == sentinel].any()
    tensors[1][:] = sentinel
    y, _, grads = run(tensors, recipe=recipe)
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("tokens", [96, 1000])
def test_moe_experts_sorting_is_stable(device, tokens):
    tensors = problem(tokens, experts=257, hidden=16, features=16, top_k=3, device=device)
    tensors[1][::5, 1] = 257
    made = OPS._moe_forward(*tensors, 0, False, 1.702, 7.0, ROWWISE)
    offsets, place, source = made[2:5]
    index = tensors[1].reshape(-1)
    wanted, order = index.sort(stable=True)
    assert_same_bits(source, order.int())
    assert_same_bits(place[source.long()], torch.arange(index.numel(), device=device).int())
    ends = torch.searchsorted(wanted, torch.arange(1, 258, device=device)).int()
    assert_same_bits(offsets, ends)


def test_moe_experts_first_product_is_grouped_linears(device):
    """Each token quantized once and written to its experts: the same bits as gathered first."""
    tensors = problem(device=device)
    made = OPS._moe_forward(*tensors, 0, False, 1.702, 7.0, ROWWISE)
    gate_up_out, offsets, source = made[1], made[2], made[4]
    rows = tensors[0][source.long() // 2]
    assert_same_bits(gate_up_out, OPS.grouped_linear(rows, tensors[3], offsets))


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_experts_equals_its_composition(device, activation, option):
    """The second half from the same first product. h is rounded to bf16 and then to e4m3: an exp
    that differs in its last place may move a value to the next bf16 number (2^-8), and that, one
    time in sixteen at most, to the next code (2^-3): (2^-4 · 2^-3)² on average is 0.8% of y; the
    order of adding adds less."""
    tensors = problem(device=device, bias=True)
    x, index, weights, _, down, gate_up_bias, down_bias = tensors
    number = ACTIVATIONS.index(activation)
    recipe = ROWWISE | (POWER_OF_TWO if option else 0)
    made = OPS._moe_forward(*tensors, number, False, 1.702, 7.0, recipe)
    y, g, offsets, place, source = made[:5]
    expert = index.reshape(-1)[source.long()]
    h = reference.gate(g.float() + gate_up_bias[expert].float(), activation, False).bfloat16()
    out = OPS.grouped_linear(h, down, offsets, recipe=f"rowwise{option}").float()
    out += down_bias[expert].float()
    weighted = (out * weights.reshape(-1)[source.long(), None])[place.long()]
    expected = weighted.view(x.shape[0], 2, -1).sum(1)
    assert sqnr(y, expected.double()) >= 42  # 0.8%


@pytest.mark.parametrize(
    "recipe", ["rowwise", "rowwise:power_of_two", "rowwise_gw_hp:power_of_two"]
)
def test_moe_experts_gradients_equal_those_of_their_composition(device, recipe):
    """Of two grouped_linear and PyTorch's operators, with weights that are powers of two, so that
    it does not matter where they are multiplied: the same codes, but for those that an exp moves
    (above). Scales of the other kind give other codes nearly everywhere."""
    tensors = problem(device=device)
    tensors[2] = torch.full_like(tensors[2], 0.5)
    _, dy, grads = run(tensors, recipe=recipe)
    x, index, weights, gate_up, down = (
        t.requires_grad_() if t.is_floating_point() else t for t in tensors[:5]
    )
    y = mixture(
        x, index, weights, gate_up, down, None, None,
        lambda g: reference.gate(g.float(), "silu", False), recipe,
    )  # fmt: skip
    composed = torch.autograd.grad(y, [x, gate_up, down], dy.to(y.dtype))
    name, _, option = recipe.partition(":")
    _, _, others = run(tensors, recipe=name if option else f"{name}:power_of_two")
    for what, expected in zip(("x", "gate_up", "down"), composed, strict=True):
        assert sqnr(grads[what], expected.double()) >= 42, what
        assert sqnr(others[what], expected.double()) < 36, what


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_experts_is_deterministic(device, recipe):
    tensors = problem(tokens=700, device=device, bias=True)
    y, _, grads = run(tensors, recipe=recipe)
    for _ in range(3):
        again, _, others = run(tensors, recipe=recipe)
        assert_same_bits(again, y)
        for name, grad in others.items():
            assert_same_bits(grad, grads[name], name)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize("wanted", ["x", "weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_moe_experts_one_gradient_alone(device, wanted, recipe):
    tensors = problem(device=device, bias=True)
    _, dy, grads = run(tensors, recipe=recipe)
    leaves = [
        t.detach().requires_grad_(n == wanted) if n != "index" else t
        for n, t in zip(NAMES, tensors, strict=True)
    ]
    OPS.moe_experts(*leaves, recipe=recipe).backward(dy)
    assert_same_bits(leaves[NAMES.index(wanted)].grad, grads[wanted])


def test_moe_experts_weights_in_bf16(device):
    tensors = problem(device=device)
    tensors[2] = tensors[2].bfloat16()
    y, _, grads = run(tensors)
    tensors[2] = tensors[2].float()
    wide, _, wide_grads = run(tensors)
    assert_same_bits(y, wide)
    assert_same_bits(grads["weights"], wide_grads["weights"].bfloat16())


def test_moe_experts_keeps_fp8_or_nothing_of_its_own_between_the_passes(device):
    """Saved beside inputs and parameters: the first product and the routing."""
    tensors = problem(tokens=256, device=device)
    saved = []
    inputs = {t.data_ptr() for t in tensors if t is not None}

    def pack(t):
        if t.data_ptr() not in inputs:
            saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OPS.moe_experts(
            *(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors)
        )
    rows, hidden, features, experts = 512, 64, 48, 6
    maxima = experts * (hidden + features) * 4  # of the weights' columns
    assert sum(saved) <= rows * 2 * features * 2 + rows * 4 * 3 + experts * 4 + maxima


def test_moe_experts_under_autocast(device):
    tensors = problem(device=device, dtype=torch.float32, bias=True)
    with torch.autocast(device, torch.bfloat16):
        y = OPS.moe_experts(*tensors)
    cast = [
        t.bfloat16() if n not in ("index", "weights") else t
        for n, t in zip(NAMES, tensors, strict=True)
    ]
    assert_same_bits(y, OPS.moe_experts(*cast))


def test_moe_experts_non_finite_values_stay_with_their_token(device):
    tensors = problem(device=device)
    tensors[0][7, 3] = torch.inf
    y = OPS.moe_experts(*tensors)
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("x", torch.randn(2, 3, 64), ValueError, r"expected x \[T, H\]"),
        ("x", torch.randn(96, 64).double(), TypeError, "expected x in bfloat16"),
        ("index", torch.zeros(96, 2), TypeError, "top_k_index in int64, got float32"),
        ("index", torch.zeros(5, 2).long(), ValueError, "T = 96"),
        ("weights", torch.zeros(96, 3), ValueError, "top_k_weights of top_k_index's shape"),
        (
            "gate_up",
            torch.randn(6, 96, 48).bfloat16(),
            ValueError,
            r"\[E, 2 I, H\] = \[6, 96, 64\]",
        ),
        ("gate_up", torch.randn(6, 96, 64), TypeError, "gate_up in x's dtype"),
        ("down", torch.randn(6, 48, 48).bfloat16(), ValueError, r"down \[E, H, I\] with H = 64"),
        (
            "gate_up_bias",
            torch.randn(6, 64).bfloat16(),
            ValueError,
            r"gate_up_bias of shape \[6, 96\]",
        ),
        ("activation", "relu", ValueError, "activation out of 'silu', .* got 'relu'"),
        ("recipe", "tensorwise", ValueError, r"moe_experts: .* row or block, .* got 'tensorwise'"),
    ],
)
def test_moe_experts_errors(name, value, error, match):
    given = dict(zip(NAMES, problem(), strict=True)) | {"activation": "silu", "recipe": "rowwise"}
    given[name] = value
    given["top_k_index"] = given.pop("index")
    given["top_k_weights"] = given.pop("weights")
    with pytest.raises(error, match=match):
        fp8.ops.moe_experts(**given)


def test_moe_experts_refuses_extents_that_it_cannot_take():
    with pytest.raises(ValueError, match=r"multiples of 16, got H = 24, I = 48 \(grouped_linear"):
        OPS.moe_experts(*problem(hidden=24))


def test_a_nan_in_dy_stays_in_its_token(device):
    """In the routing weights' gradient too, of which the bias of down has a part."""
    generator = torch.Generator().manual_seed(7)
    x, gate_up, down, bias, dy = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((30, 48), (3, 32, 48), (3, 48, 16), (3, 48), (30, 48))
    )
    index = torch.randint(0, 3, (30, 1), generator=generator).to(device)
    weights = torch.rand(30, 1, generator=generator).to(device).requires_grad_()
    dy[9, 2] = torch.nan
    y = OPS.moe_experts(x, index, weights, gate_up, down, None, bias)
    (gradient,) = torch.autograd.grad(y, weights, dy)
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [9]
