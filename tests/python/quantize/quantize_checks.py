"""One check for all quantize operators, shared by the tests of values and of layouts."""

from __future__ import annotations

import reference
import torch
from reference import assert_same_bits, codes
from torch import Tensor

OPS = torch.ops.fp8


def check_all(x: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> None:
    """All quantize operators on x against the reference."""
    matrix = reference.as_matrix(x)
    whole = reference.quantize_tensorwise(x, dtype, power_of_two=power_of_two)
    rows = reference.quantize_rowwise(x, dtype, power_of_two)
    columns = reference.quantize_rowwise(matrix.t(), dtype, power_of_two)
    option = {"power_of_two": True} if power_of_two else {}

    data, scale = OPS.quantize_tensorwise(x, dtype, **option)
    assert_same_bits(scale, whole.scale, "tensorwise scale")
    assert_same_bits(codes(data), whole.codes, "tensorwise data")

    data, data_t, scale = OPS.quantize_tensorwise_transpose(x, dtype, **option)
    assert_same_bits(scale, whole.scale, "tensorwise_transpose scale")
    assert_same_bits(codes(data), whole.codes, "tensorwise_transpose data")
    assert_same_bits(codes(data_t), reference.as_matrix(whole.codes).t(), "tensorwise data_t")

    data, scale = OPS.quantize_rowwise(x, dtype, **option)
    assert_same_bits(scale, rows.scale, "rowwise scale")
    assert_same_bits(codes(data), rows.codes, "rowwise data")

    data, data_t, scale, scale_t = OPS.quantize_rowwise_transpose(x, dtype, **option)
    assert_same_bits(scale, rows.scale, "rowwise_transpose scale")
    assert_same_bits(codes(data), rows.codes, "rowwise_transpose data")
    assert_same_bits(scale_t, columns.scale, "rowwise scale_t")
    assert_same_bits(codes(data_t), columns.codes, "rowwise data_t")

    check_blocks(x, dtype, power_of_two)


def check_blocks(x: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> None:
    matrix = reference.as_matrix(x)
    option = {"power_of_two": True} if power_of_two else {}
    for blocks, block_rows in (("1x128", 1), ("128x128", 128)):
        expected = reference.quantize_blocks(x, dtype, block_rows, power_of_two)
        transposed = reference.quantize_blocks(matrix.t(), dtype, block_rows, power_of_two)
        data, scale = getattr(OPS, f"quantize_blockwise_{blocks}")(x, dtype, **option)
        assert_same_bits(scale, expected.scale, f"{blocks} scale")
        assert_same_bits(codes(data), expected.codes, f"{blocks} data")

        quantize = getattr(OPS, f"quantize_blockwise_{blocks}_transpose")
        data, data_t, scale, scale_t = quantize(x, dtype, **option)
        assert_same_bits(scale, expected.scale, f"{blocks}_transpose scale")
        assert_same_bits(codes(data), expected.codes, f"{blocks}_transpose data")
        assert_same_bits(scale_t, transposed.scale, f"{blocks} scale_t")
        assert_same_bits(codes(data_t), transposed.codes, f"{blocks} data_t")
