"""Faults in what inference may ask for: rows that depend on nothing else, codes that graphs read,
and the kernel of few rows."""

from __future__ import annotations

from fault import Fault

INVARIANT = "tests/python/linear/test_batch_invariant.py"
GRAPHS = "tests/python/linear/test_graph_codes.py"
DECODE = "tests/python/frozen/test_decode.py"
SWITCH = "csrc/torch/matmul/batch_invariant.cpp"
MEMORY = "csrc/torch/quantize/memory.cpp"
CODES = "csrc/torch/quantize/graph_codes.cpp"

INFERENCE = [
    Fault(
        "a frozen layer's rows depend on their number inside batch_invariant",
        "csrc/torch/frozen/frozen.cpp",
        ".batch_invariant = batch_invariant::enabled()",
        ".batch_invariant = false",
        INVARIANT,
    ),
    Fault(
        "a linear layer's rows depend on their number inside batch_invariant",
        "csrc/torch/linear/linear.cpp",
        ".batch_invariant = batch_invariant::enabled()",
        ".batch_invariant = false",
        INVARIANT,
    ),
    Fault(
        "batch_invariant takes scales of all rows",
        SWITCH,
        "const bool of_all_rows = recipe.granularity == Granularity::kTensorwise && !static_input;",
        "const bool of_all_rows = false;",
        INVARIANT,
    ),
    Fault(
        "the end of an inner batch_invariant ends the outer one",
        SWITCH,
        "void close_scope() { scopes.fetch_sub(1, std::memory_order_relaxed); }",
        "void close_scope() { scopes.store(0, std::memory_order_relaxed); }",
        INVARIANT,
    ),
    Fault(
        "the last 128 columns of a product in fixed order are left out",
        "csrc/cpu/quantize.cpp",
        "for (int64_t start = 0; start < k; start += kDepth) {",
        "for (int64_t start = 0; start + kDepth <= k; start += kDepth) {",
        INVARIANT,
    ),
    Fault(
        "few rows are decoded inside batch_invariant",
        "csrc/torch/frozen/frozen.cpp",
        "if (decode && !batch_invariant::enabled()) {",
        "if (decode) {",
        INVARIANT,
        gpu=True,
    ),
    Fault(
        "the last rows of a weight are padded by its neighbour's inside batch_invariant",
        "csrc/torch/frozen/frozen.cpp",
        "(rows % 8 == 0 || !batch_invariant::enabled());",
        "true;",
        INVARIANT,
        gpu=True,
    ),
    Fault(
        "a graph's codes go with the context",
        CODES,
        "  if (!known) {",
        "  if (known) {",
        GRAPHS,
        gpu=True,
    ),
    Fault(
        "a graph's codes stay as they were",
        CODES,
        "    move(operand.along_cols, kept.operand.along_cols);",
        "",
        GRAPHS,
        gpu=True,
    ),
    Fault(
        "a graph reads codes that nobody asked it to read",
        MEMORY,
        "if (captures && current && covers && known->place.capture == 0)",
        "if (current && covers && known->place.capture == 0)",
        GRAPHS,
        gpu=True,
    ),
    Fault(
        "a decode takes rows that matmul multiplies faster",
        "csrc/host/decode_plan.h",
        "problem.one_scale || (problem.blocks && weight > kDecodeMostBlocks) ? 32",
        "problem.blocks && weight > kDecodeMostBlocks ? 32",
        "ctest test_decode_plan",
    ),
    Fault(
        "a decode with one scale for each operand does not know that",
        "csrc/core/matmul/decode_core.cpp",
        "args.weight_scale_row_stride == 0",
        "false",
        DECODE,
        gpu=True,
    ),
    Fault(
        "freeze's decode is not heard",
        "python/fp8/conversion/_freeze.py",
        "            if not decode:\n",
        "            if False:\n",
        DECODE,
    ),
    Fault(
        "a frozen layer's decode does not reach the operator",
        "python/fp8/nn/_frozen.py",
        "            decode=self.decode,\n",
        "            decode=True,\n",
        DECODE,
    ),
]
