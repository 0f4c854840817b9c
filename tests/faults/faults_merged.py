"""Faults in merged_linear and in the fusion of siblings."""

from __future__ import annotations

from fault import MERGED, Fault

VALUES = f"{MERGED}/test_merged_values.py"
AUTOGRAD = f"{MERGED}/test_merged_autograd.py"
MODULE = f"{MERGED}/test_merged_module.py"
ON_GPU = f"{MERGED}/test_merged_cuda.py"
NAMES = f"{MERGED}/test_sibling_names.py"
FUSION = f"{MERGED}/test_sibling_fusion.py"
SAFETY = f"{MERGED}/test_sibling_safety.py"
USES = f"{MERGED}/test_sibling_uses.py"
OPERATOR = "csrc/torch/merged/merged.cpp"
NODE = "csrc/torch/merged/autograd.cpp"
CALLS = "python/fp8/nn/_sibling_calls.py"
CODE = "python/fp8/nn/_sibling_names.py"
FUSED = "python/fp8/nn/_fused_siblings.py"

SIBLINGS = [
    Fault(
        "a part without a gradient gets zeros",
        NODE,
        "ctx->set_materialize_grads(false);",
        "ctx->set_materialize_grads(true);",
        AUTOGRAD,
    ),
    Fault(
        "a small result keeps the memory of the others",
        NODE,
        "return part.sym_size(-1) * 4 <= y.sym_size(-1);",
        "return false;",
        AUTOGRAD,
    ),
    Fault(
        "a frozen weight takes the gradient of the next",
        OPERATOR,
        "    start += rows;\n",
        "    start += wanted ? rows : 0;\n",
        AUTOGRAD,
    ),
    Fault(
        "a weight without a bias takes the next one's",
        OPERATOR,
        "    if (!bias && biases) {",
        "    if (false) {",
        VALUES,
    ),
    Fault(
        "the CPU puts parts side by side one over the other",
        "csrc/cpu/quantize.cpp",
        "const int64_t first = joined.side_by_side ? begin : begin * whole.cols;",
        "const int64_t first = joined.side_by_side ? 0 : begin * whole.cols;",
        VALUES,
    ),
    Fault(
        "what was made of a weight outlives a write that no counter sees",
        "csrc/torch/quantize/memory.cpp",
        ".state = ++weights.last_state};",
        ".state = cached.state};",
        MODULE,
    ),
    Fault(
        "the graph of a compiler has results that share memory",
        "csrc/torch/registration/functionalize.cpp",
        '  m.impl("merged_linear", TORCH_FN(fp8::functionalize::merged_linear));\n',
        "",
        AUTOGRAD,
    ),
    Fault(
        "a layer takes an output of another input",
        CALLS,
        "            if x is ready.x and _modes(x) == ready.modes",
        "            if _modes(x) == ready.modes",
        SAFETY,
    ),
    Fault(
        "an input that was written since counts as the same",
        CALLS,
        "    return x._version, torch.is_grad_enabled(), dtype",
        "    return torch.is_grad_enabled(), dtype",
        SAFETY,
    ),
    Fault(
        "a weight that was replaced since counts as the same",
        CALLS,
        "state = (weight, weight._version, weight.requires_grad,",
        "state = (weight.requires_grad,",
        SAFETY,
    ),
    Fault(
        "what was computed in vain is computed again",
        FUSED,
        "for group in scope.in_vain():",
        "for group in []:",
        SAFETY,
    ),
    Fault(
        "what a call has shown changes how an earlier one is recomputed",
        FUSED,
        "return [what for since, what in self._learned if since <= node._sequence_nr()]",
        "return [what for _, what in self._learned]",
        USES,
    ),
    Fault(
        "columns that cannot be viewed stop the model",
        FUSED,
        '"view size is not compatible" not in str(error)',
        "True",
        SAFETY,
    ),
    Fault(
        "inputs of inference mode count as never written",
        FUSED,
        "    if x.is_inference() or any(",
        "    if any(",
        SAFETY,
    ),
    Fault(
        "threads share what is computed for each other",
        CALLS,
        "class _Local(threading.local):",
        "class _Local:",
        FUSION,
    ),
    Fault(
        "an assignment in a branch is not looked at",
        CODE,
        "    nodes = list(ast.walk(statement))",
        "    nodes = [statement, *ast.iter_child_nodes(statement)]",
        NAMES,
    ),
    Fault(
        "a return in between is not looked at",
        CODE,
        "            if any(isinstance(node, _LEAVES) for node in ast.walk(statement)):",
        "            if False:",
        NAMES,
    ),
    Fault(
        "what is called in a conditional expression counts as always called",
        CODE,
        "sure = sure and not isinstance(node, _APART)",
        "sure = True",
        NAMES,
    ),
    Fault(
        "CUDA: rows of a part are counted from the matrix's beginning",
        "csrc/core/quantize/joined.cuh",
        "static_cast<uintptr_t>(begin * (args.side_by_side ? 1 : part.ld)) * sizeof(T);",
        "static_cast<uintptr_t>(args.side_by_side ? begin : 0) * sizeof(T);",
        ON_GPU,
        gpu=True,
    ),
    Fault(
        "CUDA: a part begins one eight later",
        "csrc/core/quantize/joined.cuh",
        "if (static_cast<int32_t>(at) >= begin[i]) place = places[i];",
        "if (static_cast<int32_t>(at) > begin[i]) place = places[i];",
        ON_GPU,
        gpu=True,
    ),
    Fault(
        "CUDA: kernels read parts whose rows do not lie on 16 bytes",
        "csrc/core/quantize/joined_core.cpp",
        "if (!aligned || part.extent <= 0",
        "if (part.extent <= 0",
        ON_GPU,
        gpu=True,
    ),
]
