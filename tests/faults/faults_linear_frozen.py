"""Faults in linear_frozen: what its scales are of, where they go, and what it keeps."""

from __future__ import annotations

from fault import Fault

VALUES = "tests/python/frozen/test_linear_frozen_values.py"
GRADIENTS = "tests/python/frozen/test_linear_frozen_gradients.py"
ERRORS = "tests/python/frozen/test_linear_frozen_errors.py"
FROZEN = "csrc/torch/frozen/frozen.cpp"
CHECK = "csrc/torch/frozen/check.cpp"
AUTOGRAD = "csrc/torch/frozen/autograd.cpp"
DECODE = "tests/python/frozen/test_decode.py"
KERNEL = "csrc/core/matmul/decode.cuh"

LINEAR_FROZEN = [
    Fault(
        "dy is not multiplied by the scales of a frozen weight's rows",
        FROZEN,
        "operand::make(rows ? times_row_scales(matrix, weight_scale) : matrix,",
        "operand::make(matrix,",
        GRADIENTS,
    ),
    Fault(
        "scales of blocks are not transposed with the codes",
        FROZEN,
        "side.scales = square_scales(scale.t());",
        "side.scales = square_scales(scale.reshape({scale.size(1), scale.size(0)}));",
        GRADIENTS,
    ),
    Fault(
        "dy times small scales vanishes in fp16",
        FROZEN,
        "dy.scalar_type() == at::kHalf ? at::kFloat : dy.scalar_type();",
        "dy.scalar_type();",
        GRADIENTS,
    ),
    Fault(
        "rows of block scales are not padded",
        FROZEN,
        "const int64_t ld = (cols + 3) / 4 * 4;",
        "const int64_t ld = cols;",
        VALUES,
        gpu=True,
    ),
    Fault(
        "a static scale of x is not used by a frozen layer",
        FROZEN,
        "input_scale ? Scaling::given(input_scale->reshape({})) : Scaling::dynamic()",
        "Scaling::dynamic()",
        VALUES,
    ),
    Fault(
        "a frozen layer's x has scales of any size",
        FROZEN,
        "          .power_of_two = power_of_two,\n          .scaling = input_scale",
        "          .scaling = input_scale",
        VALUES,
    ),
    Fault(
        "one block's scale is taken for the whole weight's",
        CHECK,
        "if (grid && is_blocks.value_or(false)) return Granularity::kBlock128x128;",
        "",
        VALUES,
    ),
    Fault(
        "a row of scales that was named is taken for blocks",
        CHECK,
        "if (row && !is_blocks.value_or(true)) return Granularity::kRowwise;",
        "",
        VALUES,
    ),
    Fault(
        "a frozen weight's gradient is dropped in silence",
        AUTOGRAD,
        "!weight.requires_grad() && !weight_scale.requires_grad() && !wants_grad(input_scale),",
        "true,",
        GRADIENTS,
    ),
    Fault(
        "a frozen layer keeps its weight where x needs no gradient",
        AUTOGRAD,
        "ctx->save_for_backward({dx ? weight : none, dx ? weight_scale : none});",
        "ctx->save_for_backward({weight, weight_scale});",
        GRADIENTS,
    ),
    Fault(
        "input_scale and blocks go together",
        CHECK,
        'FP8_CHECK_VALUE(!blocks, "fp8::", kOp,',
        'FP8_CHECK_VALUE(true, "fp8::", kOp,',
        ERRORS,
    ),
    Fault(
        "CUDA: a decode adds the sums of all warpgroups but one",
        KERNEL,
        "group < kDecodeGroups; ++group",
        "group < kDecodeGroups - 1; ++group",
        DECODE,
        gpu=True,
    ),
    Fault(
        "CUDA: a decode takes a tile's scales of blocks from its first row",
        KERNEL,
        "row / kScaleBlock * p.weight_scale_row_stride",
        "row0 / kScaleBlock * p.weight_scale_row_stride",
        DECODE,
        gpu=True,
    ),
    Fault(
        "CUDA: a decode rounds y before the bias is added",
        KERNEL,
        "if (p.bias != nullptr) value +=",
        "if (p.bias != nullptr) value = __bfloat162float(__float2bfloat16_rn(value)) +",
        DECODE,
        gpu=True,
    ),
    Fault(
        "CUDA: a decode forgets that x's scales are to be powers of two",
        "csrc/core/matmul/decode_input.cuh",
        "scale_from_amax(bits, E4M3::kMax, p_.power_of_two)",
        "scale_from_amax(bits, E4M3::kMax)",
        DECODE,
        gpu=True,
    ),
    Fault(
        "a decode reads rows of x that lie apart as if they did not",
        "csrc/torch/frozen/decode.cpp",
        "args.ldx = leading_dim(matrix);",
        "args.ldx = k;",
        DECODE,
        gpu=True,
    ),
    Fault(
        "a decode's last box is read past shared memory",
        "csrc/host/decode_plan.h",
        "round_up(plan.tile_rows, kMmaTileRows)) - plan.tile_rows",
        "round_up(plan.tile_rows, 8)) - plan.tile_rows",
        "ctest test_decode_plan",
    ),
]
