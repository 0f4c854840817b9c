"""Faults in grouped linears and experts: recipes in blocks, gradients into a buffer."""

from __future__ import annotations

from fault import EXPERTS, GROUPED, Fault

BLOCKWISE = f"{GROUPED}/test_grouped_blockwise.py"
MAIN_GRAD = f"{GROUPED}/test_grouped_main_grad.py"
OF_EXPERTS = f"{EXPERTS}/test_experts_main_grad.py"

GROUPS = [
    Fault(
        "grouped linears in blocks quantize whole rows",
        "csrc/cpu/grouped_rows.h",
        "granularity == core::Granularity::kBlock1x128 ? core::kScaleBlock : cols;",
        "cols;",
        BLOCKWISE,
    ),
    Fault(
        "the first copy of a token has its scales, in blocks, and no other",
        "csrc/cpu/grouped.cpp",
        "for (size_t b = 0; b < scales.size(); ++b)\n",
        "for (size_t b = 0; b < scales.size() && copy == 0; ++b)\n",
        BLOCKWISE,
    ),
    Fault(
        "squares of an expert's weight reach into the next expert's",
        "csrc/cpu/grouped.cpp",
        "x) + g * elements * dtype_bytes(a.x_dtype),\n        .x_dtype = a.x_dtype,\n"
        "        .rows = a.rows,",
        "x) + g * elements * dtype_bytes(a.x_dtype),\n        .x_dtype = a.x_dtype,\n"
        "        .rows = std::min(a.rows + 16, (a.groups - g) * a.rows),",
        BLOCKWISE,
    ),
    Fault(
        "a weight that is stored transposed is taken for one that is not, in squares",
        "csrc/torch/quantize/operand.cpp",
        "    if (transposed) std::swap(out.along_cols, out.along_rows);\n",
        "",
        BLOCKWISE,
    ),
    Fault(
        "experts in blocks make their weight gradient in FP8, by row",
        "csrc/torch/common/recipe.cpp",
        "  if (is_blockwise(recipe.granularity)) recipe.fp8_wgrad = false;\n",
        "",
        BLOCKWISE,
    ),
    Fault(
        "without a gradient of gate_up none reaches x, in blocks",
        "csrc/torch/grouped/moe_backward.cpp",
        "needs::kGateUp | needs::kGateUpBias | (blocks ? needs::kX : 0)",
        "needs::kGateUp | needs::kGateUpBias",
        BLOCKWISE,
    ),
    Fault(
        "a grouped main_grad is never overwritten",
        "csrc/torch/grouped/weight_gradient.cpp",
        "part.transpose(1, 2) : part, overwrite);",
        "part.transpose(1, 2) : part, false);",
        MAIN_GRAD,
    ),
    Fault(
        "a grouped main_grad takes the gradient rounded to the weight's dtype",
        "csrc/torch/grouped/weight_gradient.cpp",
        "main_grad.defined() ? at::kFloat : dtype,",
        "dtype,",
        MAIN_GRAD,
    ),
    Fault(
        "overwriting without rows leaves a grouped main_grad as it is",
        "csrc/torch/grouped/weight_gradient.cpp",
        "    if (overwrite) main_grad.zero_();\n",
        "",
        MAIN_GRAD,
    ),
    Fault(
        "no version counts the write of a grouped main_grad",
        "csrc/torch/grouped/autograd.cpp",
        "    count_write(main_grad);\n    return main_grad ? stand_in : dweight;\n",
        "    return main_grad ? stand_in : dweight;\n",
        MAIN_GRAD,
    ),
    Fault(
        "down's main_grad is overwritten where gate_up's should be",
        "csrc/torch/grouped/autograd.cpp",
        "(gate_up.overwrite ? needs::kOverwriteGateUp : 0)",
        "(gate_up.overwrite ? needs::kOverwriteDown : 0)",
        MAIN_GRAD,
    ),
    Fault(
        "main_grads of experts that are stored transposed are not turned",
        "python/fp8/nn/_main_grad.py",
        "    if not transposed:\n",
        "    if True:\n",
        OF_EXPERTS,
    ),
    Fault(
        "experts with a gate of their own forget their main_grads",
        "python/fp8/integrations/transformers/_experts.py",
        "            targets, turned,\n",
        "            [None, None], turned,\n",
        OF_EXPERTS,
    ),
    Fault(
        "CUDA: of a block of a row half makes the scale",
        "csrc/core/quantize/row_blocks.cuh",
        "distance < kBlockLanes; distance *= 2",
        "distance < kBlockLanes / 2; distance *= 2",
        BLOCKWISE,
        gpu=True,
    ),
    Fault(
        "CUDA: the transposed scales of squares lie as the others",
        "csrc/core/grouped/squares.cu",
        "put_square_scale(a.scale_t, group * p.across + tile_col, tile_row, a.rows,",
        "put_square_scale(a.scale_t, group * p.across + tile_row, tile_col, a.rows,",
        BLOCKWISE,
        gpu=True,
    ),
    Fault(
        "CUDA: a grouped main_grad is overwritten where it should be added to",
        "csrc/torch/grouped/grouped_mm.cpp",
        "args.accumulate = !overwrite;",
        "args.accumulate = false;",
        MAIN_GRAD,
        gpu=True,
    ),
]
