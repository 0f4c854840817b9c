"""linear_frozen of few rows on compute capability 9.0, where a kernel of its own makes the product
of a large weight: values, the codes of quantize_*, rows whose bits depend on nothing else, and when
it does not run."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from frozen_reference import dequantized, problem, quantized_input
from reference import assert_same_bits

import fp8
from fp8.nn import _frozen as frozen_module

FORMS = (  # of the weight, of x; a static scale of x is "static"
    ("rowwise", "rowwise"),
    ("tensorwise", "rowwise"),
    ("tensorwise", "static"),
    ("rowwise", "static"),
    ("blockwise", "blockwise"),
)
ROWS = (1, 2, 4, 5, 7, 8, 9, 16, 17, 32, 33, 63, 64)  # most that the kernel takes, see most_rows
# K, N: whole tiles; odd N, and rows of blocks that end within one; K that is no multiple of a
# stage, of 128, of 16; x that is not kept in shared memory
SHAPES = ((1024, 1024), (1024, 8192), (2064, 1001), (1040, 6152), (1003, 1100), (14336, 304))


@pytest.fixture(autouse=True)
def _needs_hopper(request):
    gpu = request.node.get_closest_marker("gpu") is not None
    if gpu and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for compute capability 9.0")


def most_rows(of_weight, of_x, elements=0):
    """More are faster by cuBLASLt."""
    one_scale = (of_weight, of_x) == ("tensorwise", "static")
    return 32 if one_scale or (of_weight == "blockwise" and elements > 2**25) else 64


def kernels(call):
    """Names of those that it launches."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in recorded.events() if event.device_type == cuda]


def run(p, rows, of_x, **options):
    scale = torch.full((1,), 0.01, device=p.x.device) if of_x == "static" else None
    return fp8.ops.linear_frozen(p.x[:rows], p.codes, p.scale, p.bias, scale, **options)


def expected(p, of_x):
    if of_x == "static":
        scale = torch.tensor(0.01, device=p.x.device)
        data, _ = fp8.ops.quantize_tensorwise(p.x, scale=scale)
        x = fp8.ops.dequantize(data, scale, torch.float32).double()
    else:
        x = quantized_input(p.x, of_x)
    weight = dequantized(p.codes, p.scale)
    y, size = x @ weight.t(), x.abs() @ weight.abs().t()
    return (y, size) if p.bias is None else (y + p.bias.double(), size + p.bias.double().abs())


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decode_values(of_weight, of_x, dtype, poisoned_memory):
    """The tensor cores drop what is below 2^-13 of the largest in each step of 32: of random signs
    about 1e-4 of the norm, with a promotion every 128 or 256."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    for k, n in SHAPES:
        p = problem(((64,), k, n), of_weight, dtype, bias=True, device="cuda")
        exact, size = expected(p, of_x)
        for rows in (1, 5, 8, 13, 32, most_rows(of_weight, of_x)):
            y = run(p, rows, of_x).double()
            error = (y - exact[:rows]).abs()
            assert bool((error <= (1e-3 + rounding) * size[:rows] + 2.0**-24).all()), (k, n, rows)
            of_norm = float(error.norm() / exact[:rows].norm())
            assert of_norm < 5e-4 + rounding, (k, n, rows, of_norm)


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
def test_decode_rows_have_the_same_bits_for_any_number_of_them(of_weight, of_x):
    for k, n in SHAPES:
        p = problem(((64,), k, n), of_weight, device="cuda", bias=True)
        most = most_rows(of_weight, of_x)
        all_rows = run(p, most, of_x)
        for rows in (rows for rows in ROWS if rows <= most):
            assert_same_bits(run(p, rows, of_x), all_rows[:rows], f"K={k} N={n} M={rows}")
            assert_same_bits(run(p, rows, of_x), run(p, rows, of_x), f"again, M={rows}")


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
@pytest.mark.parametrize(("k", "n"), [(1024, 1024), (4096, 8320)])
def test_rows_beyond_which_there_is_no_decode(of_weight, of_x, k, n):
    p = problem(((65,), k, n), of_weight, device="cuda", bias=True)
    most = most_rows(of_weight, of_x, k * n)
    assert_same_bits(run(p, most, of_x)[:1], run(p, 1, of_x))
    ordinary = run(p, most + 1, of_x, decode=False)
    assert_same_bits(run(p, most + 1, of_x), ordinary)
    for rows in (1, most, most + 1):
        by_decode = [name for name in kernels(partial(run, p, rows, of_x)) if "decode_" in name]
        assert bool(by_decode) == (rows <= most), (rows, by_decode)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_decode_quantizes_as_the_operators_do(dtype, power_of_two):
    """A weight of ones on its diagonal shows the codes, and the scales."""
    k = 1040
    codes = torch.eye(k, device="cuda").to(torch.float8_e4m3fn)
    x = torch.randn(64, k, device="cuda") * torch.logspace(-30, 30, 64, device="cuda")[:, None]
    if dtype == torch.float16:
        x = torch.randn(64, k, device="cuda") * torch.logspace(-6, 3, 64, device="cuda")[:, None]
    x = x.to(dtype)
    x[2] = 0
    x[3, 7:] = 0
    one = torch.ones(1, device="cuda")
    blocks = torch.ones(9, 9, device="cuda")
    data, scale = fp8.ops.quantize_rowwise(x, power_of_two=power_of_two)
    of_rows = fp8.ops.dequantize(data, scale, torch.float32).to(dtype)
    data, scale = fp8.ops.quantize_blockwise_1x128(x, power_of_two=power_of_two)
    of_blocks = fp8.ops.dequantize(data, scale, torch.float32).to(dtype)
    for rows in ROWS:
        y = fp8.ops.linear_frozen(x[:rows], codes, one, power_of_two=power_of_two)
        assert_same_bits(y + 0, of_rows[:rows] + 0, f"M={rows}")  # -0 is a sum's 0
        y = fp8.ops.linear_frozen(x[:rows], codes, blocks, power_of_two=power_of_two)
        assert_same_bits(y + 0, of_blocks[:rows] + 0, f"blocks, M={rows}")


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
def test_decode_hides_no_nan(of_weight, of_x):
    p = problem(((64,), 1024, 1100), of_weight, device="cuda")
    for rows in (3, 8, 40):
        clean = run(p, rows, of_x)
        assert bool(clean.isfinite().all())
        for value in (torch.nan, torch.inf):
            if of_x == "static" and value == torch.inf:
                continue  # saturates
            kept = p.x[1, 5].clone()
            p.x[1, 5] = value
            y = run(p, rows, of_x)
            assert not bool(y[1].isfinite().any())
            assert_same_bits(y[0], clean[0])
            assert_same_bits(y[2:], clean[2:])
            p.x[1, 5] = kept
        p.scale.view(-1)[-1] = torch.nan
        assert bool(run(p, rows, of_x)[:, -1].isnan().all())
        p.scale.view(-1)[-1] = 1.0


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
def test_decode_reads_tensors_that_lie_anywhere(of_weight, of_x):
    p = problem(((64,), 1040, 1100), of_weight, device="cuda", bias=True)
    for rows in (3, 20):
        y = run(p, rows, of_x)
        kept = p.x
        wide = torch.full((64, 1100), torch.nan, device="cuda", dtype=p.x.dtype)
        wide[:, 5:1045] = kept
        p.x = wide[:, 5:1045]  # rows apart, off 16 bytes
        assert_same_bits(run(p, rows, of_x), y)
        p.x = kept.t().contiguous().t()
        assert_same_bits(run(p, rows, of_x), y)
        p.x = kept
        scale, bias, codes = p.scale, p.bias, p.codes
        storage = torch.full((2 * scale.numel() + 1,), torch.nan, device="cuda")
        storage[1::2] = scale.flatten()
        p.scale = storage[1::2].view(scale.shape)
        p.bias = torch.stack([bias, bias * 0], 1)[:, 0]
        shifted = torch.zeros(codes.numel() + 3, dtype=torch.uint8, device="cuda")
        shifted[3:] = codes.view(torch.uint8).flatten()
        p.codes = shifted[3:].view(torch.float8_e4m3fn).view(codes.shape)
        assert_same_bits(run(p, rows, of_x), y)
        p.scale, p.bias, p.codes = scale, bias, codes


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 8, 24, 64])
def test_decode_reads_what_was_written_just_before(rows):
    """Parts of its launches overlap with those before; not with what writes an operand."""
    p = problem(((64,), 4096, 4096), "rowwise", device="cuda")
    other = torch.randn_like(p.weight)
    ready = [fp8.ops.quantize_rowwise(w) for w in (p.weight, other)]
    inputs = [p.x[:rows].clone(), torch.randn_like(p.x[:rows])]
    wanted = [[fp8.ops.linear_frozen(x, codes, scale) for x in inputs] for codes, scale in ready]
    codes, scale = ready[0][0].clone(), ready[0][1].clone()
    x = inputs[0].clone()
    torch.cuda.synchronize()
    found = []
    for i in range(20):
        a, b = i % 2, i // 2 % 2
        x.copy_(inputs[b])
        if i % 4 == 0:  # a kernel of ours, which lets the next one start early
            codes, scale = fp8.ops.quantize_rowwise((p.weight, other)[a])
        else:
            scale.copy_(ready[a][1])
            codes.view(torch.uint8).copy_(ready[a][0].view(torch.uint8))
        found.append((a, b, fp8.ops.linear_frozen(x, codes, scale)))
    for a, b, y in found:
        assert_same_bits(y, wanted[a][b])


@pytest.mark.gpu
@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
def test_decode_in_a_graph_and_on_another_stream(of_weight, of_x):
    p = problem(((64,), 1024, 1100), of_weight, device="cuda", bias=True)
    values = torch.randn_like(p.x)
    for rows in (4, 48):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(p, rows, of_x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(p, rows, of_x)
        p.x.copy_(values)
        graph.replay()
        assert_same_bits(y, run(p, rows, of_x))


@pytest.mark.gpu
def test_decode_of_no_rows_and_of_leading_dimensions():
    p = problem(((2, 3), 1024, 1100), "rowwise", device="cuda", bias=True)
    y = fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias)
    assert y.shape == (2, 3, 1100)
    flat = fp8.ops.linear_frozen(p.x.view(6, 1024), p.codes, p.scale, p.bias)
    assert_same_bits(y.view(6, 1100), flat)
    assert fp8.ops.linear_frozen(p.x[:0], p.codes, p.scale, p.bias).shape == (0, 3, 1100)
    one = fp8.ops.linear_frozen(p.x[0, 0], p.codes, p.scale, p.bias)
    assert one.shape == (1100,)
    assert_same_bits(one, y[0, 0])


@pytest.mark.gpu
def test_decode_in_a_ring_that_turns_often():
    """Large weights, again and again: a stage that is read before it is there would show."""
    for k, n in ((4096, 6144), (4096, 14336), (14336, 4096), (4096, 4096)):
        p = problem(((64,), k, n), "rowwise", device="cuda")
        wanted = {rows: run(p, rows, "rowwise") for rows in (1, 2, 8, 16, 32, 64)}
        exact, _ = expected(p, "rowwise")
        for rows, y in wanted.items():
            assert float((y - exact[:rows]).norm() / exact[:rows].norm()) < 5e-3, (k, n, rows)
            assert_same_bits(y, wanted[64][:rows], f"K={k} N={n} M={rows}")
        for _ in range(30):
            for rows, y in wanted.items():
                assert_same_bits(run(p, rows, "rowwise"), y, f"again, K={k} N={n} M={rows}")


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "launches"), [(2, 1), (64, 2)])
def test_launches_of_a_decode(rows, launches):
    p = problem(((64,), 4096, 1024), "rowwise", device="cuda", bias=True)
    run(p, rows, "rowwise")
    names = kernels(lambda: run(p, rows, "rowwise"))
    assert len(names) == launches, names
    assert "decode_kernel" in names[-1], names


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_without_decode_few_rows_have_the_bits_of_fused_linear(recipe):
    p = problem(((65,), 1024, 1152), recipe, device="cuda", bias=True)
    for rows in (1, 4, 64, 65):
        x = p.x[:rows]
        expected = fp8.ops.fused_linear(x, p.weight, p.bias, recipe)
        assert_same_bits(fp8.ops.linear_frozen(x, p.codes, p.scale, p.bias, decode=False), expected)
        if rows > 64:
            assert_same_bits(fp8.ops.linear_frozen(x, p.codes, p.scale, p.bias), expected)
    layer = torch.nn.Linear(1024, 1152, device="cuda", dtype=torch.float32)
    given = torch.randn(4, 1024, device="cuda")
    converted = fp8.Linear(1024, 1152, device="cuda", dtype=torch.float32, recipe=recipe)
    converted.load_state_dict(layer.state_dict())
    with torch.no_grad():
        expected = converted(given)
        frozen = fp8.freeze(torch.nn.Sequential(converted))
        assert_same_bits(frozen(given), expected)
        frozen[0].decode = True
        assert not torch.equal(frozen(given), expected)


def test_decode_is_an_attribute_that_travels():
    """On any device: of the layer, not of its class, copied and pickled with it."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    assert all(layer.decode for layer in fp8.freeze(copy.deepcopy(model)))
    everything = partial(fp8.convert, filter=lambda module, name: True)
    for decode, expected in ((None, False), (True, True), (False, False)):  # a converted one's bits
        converted = fp8.freeze(everything(copy.deepcopy(model)), decode=decode)
        assert [layer.decode for layer in converted] == [expected, expected]
    frozen = fp8.freeze(model, decode=False)
    for made in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert not any(layer.decode for layer in made)
        assert "decode=False" in repr(made)
    assert fp8.FrozenLinear.decode is True
    assert "decode" not in repr(fp8.FrozenLinear(16, 16))


def test_decode_reaches_the_operator(monkeypatch):
    seen = []
    op = frozen_module._linear_frozen

    def record(*args, **options):
        seen.append(options["decode"])
        return op(*args, **options)

    monkeypatch.setattr(frozen_module, "_linear_frozen", record)
    for decode in (True, False):
        layer = fp8.freeze(torch.nn.Sequential(torch.nn.Linear(64, 64)), decode=decode)
        layer(torch.randn(2, 64))
    assert seen == [True, False]


def test_freeze_error_decode_is_no_bool():
    with pytest.raises(
        TypeError, match=r"fp8.freeze: expected decode True, False or None, got 'yes'"
    ):
        fp8.freeze(torch.nn.Linear(64, 64), decode="yes")
