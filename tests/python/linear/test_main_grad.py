"""weight.main_grad: what the backward of fp8.Linear adds to it, and what it leaves alone."""

from __future__ import annotations

import bounds
import linear_reference
import pytest
import torch
from linear_reference import RECIPES
from reference import FLOAT_DTYPES, as_matrix, assert_same_bits
from test_linear_values import problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fp8


def layer_of(weight: Tensor, bias: Tensor | None, recipe: str) -> fp8.Linear:
    """An fp8.Linear of copies of these values."""
    n, k = weight.shape
    layer = fp8.Linear(k, n, bias is not None, weight.device, weight.dtype, recipe=recipe)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def small(device: str, recipe: str, dtype: torch.dtype = torch.bfloat16):
    """layer, x, dy and the plain weight gradient."""
    x, weight, bias, dy = problem((48, 64), 80, dtype, device)
    expected = linear_reference.run(x, weight, bias, dy, recipe).dw
    return layer_of(weight, bias, recipe), x, dy, expected


def assert_added(
    main_grad: Tensor, before: Tensor, x: Tensor, dy: Tensor, recipe: str, what: str = "main_grad"
) -> None:
    """main_grad is before + dW: added in fp32, rounded once to its dtype."""
    x2, dy2 = as_matrix(x), as_matrix(dy)
    if linear_reference.high_precision_wgrad(recipe):
        left, right = dy2.double().t(), x2.double()
        exact = before.double() + left @ right
        magnitude = before.double().abs() + left.abs() @ right.abs()
        linear_reference.assert_sum(main_grad, exact, magnitude, dy2.shape[0] + 1, what)
        return
    _, x_t, _, x_scale = linear_reference._operands(x2, recipe)
    dtype = linear_reference.grad_dtype(recipe)
    _, dy_t, _, dy_scale = linear_reference._operands(dy2, recipe, dtype)
    product = bounds.product(dy_t, x_t, dy_scale, x_scale, addend=before)
    fast = linear_reference.accumulates_fast(recipe, "wgrad")
    bounds.assert_within(main_grad, product, bounds.accumulation_of(x.device.type, fast), what)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("buffer_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_main_grad_values(device, with_bias, dtype, buffer_dtype, recipe, poisoned_memory):
    """dW is added to what was there; everything else is as without."""
    x, weight, bias, dy = problem((128, 96), 160, dtype, device)
    if not with_bias:
        bias = None
    plain = linear_reference.run(x, weight, bias, dy, recipe)
    layer = layer_of(weight, bias, recipe)
    before = torch.randn(160, 96, device=device).to(buffer_dtype)
    layer.weight.main_grad = before.clone()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    assert layer.weight.grad is None
    assert_added(layer.weight.main_grad, before, x, dy, recipe)
    assert_same_bits(y, plain.y)
    assert_same_bits(leaf.grad, plain.dx)
    if with_bias:
        assert_same_bits(layer.bias.grad, plain.db)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_main_grad_overwrite_gives_the_plain_gradient(device, dtype, recipe):
    """Bit for bit, whatever was there: beta = 0 does not read it."""
    layer, x, dy, expected = small(device, recipe, dtype)
    layer.weight.main_grad = torch.full((80, 64), float("nan"), device=device, dtype=dtype)
    layer.weight.overwrite_main_grad = True
    layer(x).backward(dy)
    assert layer.weight.grad is None
    if linear_reference.high_precision_wgrad(recipe):  # two library matmuls may add in two orders
        zero = torch.zeros_like(expected)
        assert_added(layer.weight.main_grad, zero, x, dy, recipe)
    else:
        assert_same_bits(layer.weight.main_grad, expected)
    layer.weight.overwrite_main_grad = False
    before = layer.weight.main_grad.clone()
    layer(x).backward(dy)
    assert_added(layer.weight.main_grad, before, x, dy, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_in_fp32_is_never_rounded_to_bf16(device, recipe):
    """From bf16 x and dy: fp32 bits in the product, and 64 micro-batches added without loss."""
    layer, x, dy, once = small(device, recipe)
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    layer(x).backward(dy)
    first = layer.weight.main_grad.clone()
    assert (first != first.bfloat16().float()).float().mean() > 0.9
    high_precision = linear_reference.high_precision_wgrad(recipe)
    if device == "cpu" and not high_precision:  # one algorithm for both
        assert_same_bits(first.bfloat16(), once)
    for _ in range(63):
        layer(x).backward(dy)
    # 63 additions of partial sums of at most 64 |first|, each with half an ulp.
    allowed = 63 * 2.0**-24 * 64 * first.double().abs() + 2.0**-140
    if device == "cuda":  # beta = 1 may choose another algorithm than beta = 0
        allowed += 64 * 2.0**-10 * once.double().abs().max()
    assert ((layer.weight.main_grad.double() - 64 * first.double()).abs() <= allowed).all()
    del layer.weight.main_grad
    for _ in range(64):
        layer(x).backward(dy)
    exact = 64 * first.double()
    in_bf16 = (layer.weight.grad.double() - exact).norm() / exact.norm()
    assert in_bf16 > 2**-9, "the test's premise: bf16 gradients lose on the way"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [((96,), 32), ((1, 96), 32), ((17, 33), 65), ((1, 1), 1), ((2, 9, 48), 64), ((129, 130), 131)],
    ids=str,
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_main_grad_shapes(device, shape, n, overwrite, recipe, poisoned_memory):
    for dtype, buffer_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        x, weight, bias, dy = problem(shape, n, dtype, device)
        layer = layer_of(weight, bias, recipe)
        before = torch.randn(weight.shape, device=device).to(buffer_dtype)
        layer.weight.main_grad = before.clone()
        layer.weight.overwrite_main_grad = overwrite
        layer(x).backward(dy)
        if overwrite:
            before.zero_()
        assert_added(layer.weight.main_grad, before, x, dy, recipe, f"{dtype} {buffer_dtype}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_main_grad_without_tokens(device, shape, recipe):
    """Nothing to add; overwriting writes zeros."""
    layer = small(device, recipe)[0]
    before = torch.randn(80, 64, device=device)
    layer.weight.main_grad = before.clone()
    for overwrite, expected in ((False, before), (True, torch.zeros_like(before))):
        layer.weight.overwrite_main_grad = overwrite
        layer(torch.zeros(shape, device=device, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is None
        assert_same_bits(layer.weight.main_grad, expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_main_grad_strides(device, overwrite, buffer_dtype, recipe):
    """Rows with a gap, a transposed and a misaligned buffer; nothing around it is written."""
    layer, x, dy, _ = small(device, recipe)
    layer.weight.overwrite_main_grad = overwrite
    wide = torch.randn(90, 100, device=device).to(buffer_dtype)
    flat = torch.randn(80 * 64 + 1, device=device).to(buffer_dtype)
    for view in (
        wide.clone()[:80, :64],
        wide.clone()[1:81, 5:69],
        wide.clone()[:64, :80].t(),
        flat[1:].view(80, 64),
    ):
        whole, before = view._base.clone(), view.clone()
        layer.weight.main_grad = view
        layer(x).backward(dy)
        if overwrite:
            before.zero_()
        assert_added(view, before, x, dy, recipe, f"strides {view.stride()}")
        inside = torch.zeros(whole.shape, dtype=torch.bool, device=device)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert_same_bits(view._base[~inside], whole[~inside], "outside")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_main_grad_of_one_row_that_was_a_column(device, overwrite, recipe):
    """Its strides (1, 1) count as contiguous, but are none that cuBLAS takes for a matrix."""
    layer = fp8.Linear(2, 1, bias=False, recipe=recipe, device=device, dtype=torch.bfloat16)
    x = torch.ones(2, 2, device=device, dtype=torch.bfloat16)
    layer.weight.main_grad = torch.ones(2, 1, device=device).t()
    assert layer.weight.main_grad.is_contiguous()
    layer.weight.overwrite_main_grad = overwrite
    layer(x).backward(torch.ones(2, 1, device=device, dtype=torch.bfloat16))
    wanted = torch.full((1, 2), 2.0 if overwrite else 3.0, device=device)
    torch.testing.assert_close(layer.weight.main_grad, wanted)


def test_main_grad_is_not_touched_without_a_gradient_of_the_weight(device):
    """Frozen weight, no_grad, inference, and backwards that do not reach the weight."""
    layer, x, dy, _ = small(device, "tensorwise")
    before = torch.randn(80, 64, device=device)
    layer.weight.main_grad = before.clone()
    layer.weight.grad_added_to_main_grad = False
    x.requires_grad_()
    torch.autograd.grad(layer(x), x, dy)
    layer(x).backward(dy, inputs=[x, layer.bias])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not layer(x).requires_grad
    layer.weight.requires_grad_(False)
    layer(x).backward(dy)
    assert layer.weight.grad is None
    assert layer.weight.grad_added_to_main_grad is False
    assert_same_bits(layer.weight.main_grad, before)
    layer.weight.main_grad = torch.zeros(1, device="meta")  # nor is it looked at
    layer(x).backward(dy)


def test_main_grad_of_none_is_no_main_grad(device):
    layer, x, dy, expected = small(device, "tensorwise")
    layer.weight.main_grad = None
    layer(x).backward(dy)
    assert_same_bits(layer.weight.grad, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_once_per_backward(device, recipe):
    """A graph that is kept adds again, as it does to weight.grad."""
    layer, x, dy, _ = small(device, recipe)
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    y = layer(x)
    y.backward(dy, retain_graph=True)
    before = layer.weight.main_grad.clone()
    y.backward(dy)
    assert_added(layer.weight.main_grad, before, x, dy, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_of_tied_weights(device, recipe):
    """Two layers with one weight add to one buffer; so do two uses of one layer."""
    x, weight, _, dy = problem((48, 64), 64, torch.bfloat16, device)
    layer = layer_of(weight, None, recipe)
    other = fp8.Linear.from_linear(layer, recipe)
    for second in (layer, other):
        layer.weight.main_grad = torch.zeros(64, 64, device=device)
        hidden = layer(x)
        hidden.retain_grad()
        second(hidden).backward(dy)
        after_second = torch.zeros(64, 64, device=device)
        twin = layer_of(weight, None, recipe)
        twin.weight.main_grad = after_second
        twin(hidden.detach()).backward(dy)
        assert_added(layer.weight.main_grad, after_second, x, hidden.grad, recipe)
        assert layer.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_with_checkpointing(device, recipe, use_reentrant):
    layer, x, dy, _ = small(device, recipe)
    sums = []
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant)):
        layer.weight.main_grad = torch.zeros(80, 64, device=device)
        layer.weight.grad_added_to_main_grad = False
        run(x.clone().requires_grad_()).backward(dy)
        assert layer.weight.grad_added_to_main_grad
        sums.append(layer.weight.main_grad)
    assert_same_bits(sums[1], sums[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_under_autocast(device, recipe):
    """fp32 parameters, bf16 matmuls, and an fp32 sum that never was bf16."""
    layer, x, dy, _ = small(device, recipe, torch.float32)
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    before = layer.weight.main_grad.clone()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    y.backward(dy.bfloat16())
    assert layer.weight.grad is None
    assert_added(layer.weight.main_grad, before, x.bfloat16(), dy.bfloat16(), recipe)
    assert (layer.weight.main_grad != layer.weight.main_grad.bfloat16().float()).any()


def test_main_grad_inside_cached_weights(device):
    layer, x, dy, _ = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    with fp8.cached_weights(layer):
        for _ in range(2):
            before = layer.weight.main_grad.clone()
            layer(x).backward(dy)
            assert_added(layer.weight.main_grad, before, x, dy, "tensorwise")


def test_main_grad_counts_as_written(device):
    """The version counter moves: a graph that saved the buffer raises."""
    layer, x, dy, _ = small(device, "tensorwise")
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    factor = torch.ones(80, 64, device=device, requires_grad=True)
    product = factor * layer.weight.main_grad
    layer(x).backward(dy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_main_grad_double_backward_is_refused(device):
    layer, x, _, _ = small(device, "tensorwise", torch.float32)
    layer.weight.main_grad = torch.zeros(80, 64, device=device)
    x.requires_grad_()
    y = layer(x)
    dx, _ = torch.autograd.grad(
        y.square().sum(), [x, layer.weight], create_graph=True, allow_unused=True
    )
    assert layer.weight.main_grad.any()
    with pytest.raises(NotImplementedError, match=r"fp8::fused_linear: .*double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("overwrite", [False, True])
def test_main_grad_of_more_than_a_block_of_rows(device, overwrite):
    """In high precision a 16-bit buffer takes 2^22 elements of dW at a time."""
    x, weight, _, dy = problem((8, 1024), 5000, torch.bfloat16, device)
    layer = layer_of(weight, None, "rowwise_gw_hp")
    before = torch.randn(5000, 1024, device=device).bfloat16()
    layer.weight.main_grad = before.clone()
    layer.weight.overwrite_main_grad = overwrite
    layer(x).backward(dy)
    started = torch.zeros_like(before) if overwrite else before
    assert_added(layer.weight.main_grad, started, x, dy, "rowwise_gw_hp")


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_makes_no_gradient_tensor(recipe, buffer_dtype):
    """The peak of a backward: FP8 operands and a workspace of at most 32 MiB, but no dW."""
    m, k, n = 256, 8192, 8192
    x, weight, _, dy = problem((m, k), n, torch.bfloat16, "cuda")
    layer = layer_of(weight, None, recipe)
    layer.weight.main_grad = torch.zeros(n, k, device="cuda", dtype=buffer_dtype)
    layer(x).backward(dy)  # plans exist after this
    y = layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(dy)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 32 * 2**20 + 8 * m * n, f"{taken} bytes; dW takes {2 * n * k} or more"
    assert layer.weight.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_main_grad_in_a_cuda_graph(recipe):
    """Each replay adds once more."""
    layer, x, dy, _ = small("cuda", recipe)
    layer.weight.main_grad = torch.zeros(80, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.bias.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x).backward(dy)
    layer.weight.main_grad.zero_()
    before = layer.weight.main_grad.clone()
    for _ in range(2):
        graph.replay()
        assert_added(layer.weight.main_grad, before, x, dy, recipe)
        before = layer.weight.main_grad.clone()
