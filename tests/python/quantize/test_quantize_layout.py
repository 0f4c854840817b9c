"""Quantize: shapes, strides and padding of results, strided inputs, static scales, errors."""

from __future__ import annotations

import inputs
import pytest
import reference
import torch
from quantize_checks import check_all
from reference import E4M3, E5M2, FP8_DTYPES, assert_same_bits, codes

OPS = torch.ops.fp8
QUANTIZE_OPS = (
    "quantize_tensorwise",
    "quantize_rowwise",
    "quantize_tensorwise_transpose",
    "quantize_rowwise_transpose",
    "quantize_blockwise_1x128",
    "quantize_blockwise_128x128",
    "quantize_blockwise_1x128_transpose",
    "quantize_blockwise_128x128_transpose",
)
TENSORWISE_OPS = ("quantize_tensorwise", "quantize_tensorwise_transpose")


def padded(extent: int) -> int:
    return (extent + 15) // 16 * 16


def assert_padding_is_zero(data: torch.Tensor) -> None:
    """Each row of `data` lies in memory followed by zeros up to its stride."""
    matrix = data if data.dim() == 2 else data.flatten(0, -2)
    rows, cols = matrix.shape
    if rows == 0 or cols == 0:
        return
    ld = padded(cols)
    memory = matrix.view(torch.uint8).as_strided((rows, ld), (ld, 1)).cpu()
    assert int(memory[:, cols:].count_nonzero()) == 0, "padding is not zero"


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (17, 33), (40, 64), (16, 16), (130, 250), (2, 3, 20)], ids=str
)
def test_quantize_rows_are_padded_with_zeros(device, shape, x_dtype, poisoned_memory):
    x = inputs.make("normal", shape, x_dtype, device)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    for name in QUANTIZE_OPS:
        data, *rest = getattr(OPS, name)(x)
        assert data.shape == x.shape
        assert data.dtype == E4M3, "the default format"
        assert data.stride(-1) == 1
        assert data.stride(-2) == padded(k)
        assert data.data_ptr() % 16 == 0
        assert_padding_is_zero(data)
        if name.endswith("_transpose"):
            data_t = rest[0]
            assert data_t.shape == (k, m)
            assert data_t.stride() == (padded(m), 1)
            assert data_t.data_ptr() % 16 == 0
            assert_padding_is_zero(data_t)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40), (3, 0), (2, 0, 5)], ids=str)
def test_quantize_scale_shapes(device, shape):
    x = torch.randn(shape, device=device)
    rows = (*shape[:-1], 1)
    m = reference.as_matrix(x).shape[0]
    assert OPS.quantize_tensorwise(x)[1].shape == ()
    assert OPS.quantize_tensorwise_transpose(x)[2].shape == ()
    assert OPS.quantize_rowwise(x)[1].shape == rows
    data, data_t, scale, scale_t = OPS.quantize_rowwise_transpose(x)
    assert (data.shape, data_t.shape) == (shape, (shape[-1], m))
    assert (scale.shape, scale_t.shape) == (rows, (shape[-1], 1))
    for tensor in (scale, scale_t, OPS.quantize_tensorwise(x)[1]):
        assert tensor.dtype == torch.float32
        assert tensor.device == x.device


@pytest.mark.parametrize(
    "shape", [(40,), (3, 40), (2, 3, 300), (130, 515), (0, 40), (3, 0), (2, 0, 5)], ids=str
)
def test_quantize_block_scales_lie_as_cublaslt_reads_them(device, shape, poisoned_memory):
    """1x128: [blocks, rows padded to 16]; squares: [blocks, blocks padded to 4]. With ones
    in the padding."""
    x = torch.randn(shape, device=device)
    m, k = reference.as_matrix(x).shape
    for name in ("1x128", "128x128"):
        data, data_t, *found = getattr(OPS, f"quantize_blockwise_{name}_transpose")(x)
        assert (data.shape, data_t.shape) == (shape, (k, m))
        for scale, (rows, cols) in zip(found, ((m, k), (k, m)), strict=True):
            across = -(-cols // 128)
            assert scale.dtype == torch.float32
            assert scale.data_ptr() % 16 == 0
            if name == "1x128":
                assert scale.shape == (rows, across)
                strides, memory = (1, padded(rows)), (across, padded(rows))
            else:
                assert scale.shape == (-(-rows // 128), across)
                ld = -(-across // 4) * 4
                strides, memory = (ld, 1), (scale.shape[0], ld)
            if scale.numel() == 0:
                continue
            assert scale.stride() == strides
            whole = scale.as_strided(memory, (memory[1], 1))
            assert int((whole == 1).sum()) >= whole.numel() - scale.numel(), "ones in the padding"


@pytest.mark.parametrize("view", list(inputs.strided_views(torch.zeros(2, 2))))
@pytest.mark.parametrize("shape", [(40, 48), (37, 29), (64, 130)], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_quantize_strided_input(device, view, shape, x_dtype):
    x = inputs.make("normal", shape, x_dtype, device)
    strided = inputs.strided_views(x)[view]
    assert_same_bits(strided, x)
    check_all(strided, E4M3)


@pytest.mark.parametrize("view", list(inputs.expanded_views(torch.zeros(2, 2))))
def test_quantize_expanded_input(device, view):
    x = inputs.make("normal", (35, 52), torch.bfloat16, device)
    check_all(inputs.expanded_views(x)[view], E4M3)


def test_quantize_strided_leading_dimensions(device):
    x = torch.randn(4, 6, 5, 24, device=device)
    for view in (
        x.permute(2, 0, 1, 3),
        x[:, 1::2],
        x.transpose(1, 3),
        x[:, :, :1].expand(-1, -1, 7, -1),
        x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
    ):
        check_all(view, E5M2)


def test_quantize_does_not_change_its_input(device):
    x = torch.randn(33, 47, device=device)
    before = x.clone()
    for name in QUANTIZE_OPS:
        getattr(OPS, name)(x)
    assert_same_bits(x, before)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("value", [1.0, 0.01, 3.7e-3, 1e-30, 1e30, float("inf"), float("nan")])
def test_quantize_static_scale(device, value, dtype):
    x = inputs.make("student_t", (37, 53), torch.float32)
    x[3, 4], x[5, 6], x[7, 8] = float("inf"), float("-inf"), float("nan")
    x = x.to(device)
    scale = torch.tensor(value, device=device)
    expected = reference.quantize_tensorwise(x, dtype, scale)
    data, returned = OPS.quantize_tensorwise(x, dtype, scale)
    assert_same_bits(codes(data), expected.codes, "data")
    assert_same_bits(returned, scale, "scale")
    data, data_t, returned = OPS.quantize_tensorwise_transpose(x, dtype, scale)
    assert_same_bits(codes(data), expected.codes, "data")
    assert_same_bits(codes(data_t), expected.codes.t(), "data_t")
    assert_same_bits(returned, scale, "scale")


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_quantize_static_scale_saturates(device, dtype):
    x = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, float("nan")], device=device)
    data, _ = OPS.quantize_tensorwise(x, dtype, torch.tensor(1.0, device=device))
    largest = reference.magnitudes(dtype).size - 1
    assert codes(data).tolist() == [largest, largest | 0x80, largest, largest | 0x80, 0x7F]


@pytest.mark.parametrize("name", TENSORWISE_OPS)
def test_quantize_static_scale_errors(device, name):
    operator = getattr(OPS, name)
    x = torch.randn(4, 16, device=device)
    with pytest.raises(TypeError, match=rf"fp8::{name}: .*scale.*(float32|Float).*"):
        operator(x, E4M3, torch.tensor(1.0, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=rf"fp8::{name}: .*scale.*\[2\]"):
        operator(x, E4M3, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=rf"fp8::{name}: .*scale.*meta"):
        operator(x, E4M3, torch.ones((), device="meta"))


@pytest.mark.parametrize("name", QUANTIZE_OPS)
def test_quantize_errors(device, name):
    operator = getattr(OPS, name)
    for dtype, shown in (
        (torch.float64, "float64|Double"),
        (torch.int32, "int32|Int"),
        (torch.complex64, "complex64|ComplexFloat"),
        (torch.bool, "bool|Bool"),
        (E4M3, "float8_e4m3fn|Float8_e4m3fn"),
    ):
        x = torch.zeros(4, 16, device=device).to(dtype)
        with pytest.raises(TypeError, match=rf"fp8::{name}: .*x.*({shown})"):
            operator(x)
    x = torch.zeros(4, 16, device=device)
    for dtype, shown in ((torch.float16, "float16|Half"), (torch.int8, "int8|Char")):
        with pytest.raises(TypeError, match=rf"fp8::{name}: .*dtype.*({shown})"):
            operator(x, dtype)
    with pytest.raises(ValueError, match=rf"fp8::{name}: .*x.*dimension"):
        operator(torch.zeros((), device=device))


@pytest.mark.gpu
def test_quantize_on_another_stream():
    """The kernels run on the current stream: work queued before them there is seen."""
    x = torch.zeros(2048, 2048, device="cuda", dtype=torch.bfloat16)
    fresh = torch.randn_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(fresh)
        results = [getattr(OPS, name)(x) for name in QUANTIZE_OPS]
    stream.synchronize()
    for name, result in zip(QUANTIZE_OPS, results, strict=True):
        for actual, expected in zip(result, getattr(OPS, name)(fresh), strict=True):
            assert_same_bits(actual, expected, name)
