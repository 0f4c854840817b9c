"""Faults in what inference may ask for: rows that depend on nothing else, codes that graphs read,
and the kernel of few rows."""

from __future__ import annotations

from fault import Fault

INVARIANT = "tests/python/linear/test_batch_invariant.py"
KEPT = "ctest test_graph_codes"
GRAPHS = "tests/python/linear/test_graph_codes.py"
DECODE = "tests/python/frozen/test_decode.py"
SWITCH = "csrc/torch/matmul/batch_invariant.cpp"
MEMORY = "csrc/torch/quantize/memory.cpp"
CODES = "csrc/torch/quantize/graph_codes.cpp"

INFERENCE = [
    Fault(
        "a frozen layer's rows depend on their number inside batch_invariant",
        "csrc/torch/frozen/frozen.cpp",
        ".batch_invariant = invariant",
        ".batch_invariant = false",
        INVARIANT,
    ),
    Fault(
        "a linear layer's rows depend on their number inside batch_invariant",
        "csrc/torch/linear/linear.cpp",
        ".batch_invariant = invariant",
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
        "if (decode && !invariant) {",
        "if (decode) {",
        INVARIANT,
        gpu=True,
    ),
    Fault(
        "the last rows of a weight are padded by its neighbour's inside batch_invariant",
        "csrc/torch/frozen/frozen.cpp",
        "(rows % 8 == 0 || !invariant);",
        "true;",
        INVARIANT,
        gpu=True,
    ),
    Fault(
        "a graph's codes go with the context",
        CODES,
        "  if (known) return;",
        "  if (!known) return;",
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
        "the maxima that a graph reads go with the context",
        CODES,
        "covers(kept.operand.amax, operand.amax);",
        "true;",
        KEPT,
    ),
    Fault(
        "a call that needs one side leaves the other one that a graph reads old",
        MEMORY,
        "for_graphs ? graph_codes::with_kept(weights, request) : request;",
        "request;",
        KEPT,
    ),
    Fault(
        "codes of another kind are written where a graph reads",
        CODES,
        "return kind == kind_of(request) &&",
        "return (kind == kind_of(request) || true) &&",
        KEPT,
    ),
    Fault(
        "codes of a weight beside another one are written where a graph reads",
        CODES,
        "return !weight.expired() && weight._unsafe_get_target() == other.unsafeGetTensorImpl();",
        "return !weight.expired() && other.defined();",
        KEPT,
    ),
    Fault(
        "what was made while no context captured reaches no graph",
        MEMORY,
        "if (covers(made.operand, request) && (made.in_graphs || !for_graphs)) return;",
        "if (covers(made.operand, request)) return;",
        KEPT,
    ),
    Fault(
        "each call writes what graphs read again",
        MEMORY,
        "  made.in_graphs = for_graphs;\n",
        "",
        KEPT,
    ),
    Fault(
        "a graph reads codes that nobody asked it to read",
        MEMORY,
        "if (captures && current && covers(made.operand, request) && known->place.capture == 0)",
        "if (current && covers(made.operand, request) && known->place.capture == 0)",
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
        "            if not by_decode:\n",
        "            if False:\n",
        DECODE,
    ),
    Fault(
        "a converted layer that is frozen adds in another order",
        "python/fp8/conversion/_freeze.py",
        "not isinstance(module, Linear) if decode is None else decode",
        "True if decode is None else decode",
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
