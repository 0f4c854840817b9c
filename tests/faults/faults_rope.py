"""Faults in rotary position embedding: its passes, its gradient, and the modules that take it."""

from __future__ import annotations

from fault import Fault

VALUES = "tests/python/rope/test_rope_values.py"
AUTOGRAD = "tests/python/rope/test_rope_autograd.py"
FUSION = "tests/python/rope/test_rope_fusion.py"
CHANGES = "tests/python/rope/test_rope_fusion_changes.py"
FAMILIES = "tests/python/rope/test_rope_fusion_families.py"
USES = "tests/python/rope/test_rope_fusion_uses.py"
GPU = "tests/python/rope/test_rope_cuda.py"
SPEC = "python/fp8/nn/_rope_spec.py"
PROBE = "python/fp8/nn/_rope_probe.py"
FUSED = "python/fp8/nn/_fused_rope.py"
ROTATIONS = "python/fp8/nn/_rotations.py"

ROPE = [
    Fault(
        "products of a rotation are not rounded",
        "csrc/cpu/rope.cpp",
        "return args.rounds_products ? rounded(made, args.y_dtype) : made;",
        "return made;",
        VALUES,
    ),
    Fault(
        "a gradient is rotated on, not back",
        "csrc/torch/rope/autograd.cpp",
        "form.transposed = !form.transposed;",
        "",
        f"{VALUES} {AUTOGRAD}",
    ),
    Fault(
        "zeros of a rotation's gradient keep their sign",
        "csrc/cpu/rope.cpp",
        "const bool adds_zero = args.transposed && !args.keeps_minus_zero;",
        "const bool adds_zero = false;",
        VALUES,
    ),
    Fault(
        "zeros that a rotation's gradient is rounded to keep their sign",
        "csrc/host/rope.h",
        "return rotary < cols;",
        "return false;",
        VALUES,
    ),
    Fault(
        "columns that are not rotated are lost",
        "csrc/cpu/rope.cpp",
        "  std::copy(x.begin() + args.rotary, x.end(), y.begin() + args.rotary);\n",
        "",
        VALUES,
    ),
    Fault(
        "rotated heads lie before positions",
        "csrc/torch/rope/rope.cpp",
        "return strides[a] > strides[b];",
        "return strides[a] > strides[b] && false;",
        VALUES,
    ),
    Fault(
        "the angles of a batch are those of the first",
        "csrc/torch/rope/rope.cpp",
        "strides[i] = x.size(dim) == 1 ? 0 : x.stride(dim);",
        "strides[i] = x.size(dim) == 1 || i == 0 ? 0 : x.stride(dim);",
        VALUES,
    ),
    Fault(
        "a function of another gradient is taken for a rotation",
        PROBE,
        "        return _same(\n            torch.autograd.grad(made",
        "        return True or _same(\n            torch.autograd.grad(made",
        FUSION,
    ),
    Fault(
        "a function that writes what it is given is taken for a rotation",
        PROBE,
        "return [*made] if untouched and all",
        "return [*made] if all",
        FUSION,
    ),
    Fault(
        "a rotation that was patched is not called",
        ROTATIONS,
        "if function is recognized and unchanged():",
        "if unchanged():",
        f"{CHANGES} {FAMILIES}",
    ),
    Fault(
        "what a rotation calls is patched unnoticed",
        ROTATIONS,
        "if function is recognized and unchanged():",
        "if function is recognized:",
        CHANGES,
    ),
    Fault(
        "a forward replaced in the class of a rotation is bypassed",
        FUSED,
        "        if base.forward is own:\n            return rotating",
        "        if True:\n            return rotating",
        CHANGES,
    ),
    Fault(
        "an argument that was not seen is dropped",
        ROTATIONS,
        "if name in given and given[name] is not defaults[name]:",
        "if False:",
        FUSION,
    ),
    Fault(
        "angles of one position serve all, though that was not seen",
        SPEC,
        "    if rows == angles:\n        return True\n",
        "    if rows == angles or angles[-1] == 1:\n        return True\n",
        FUSION,
    ),
    Fault(
        "angles that need gradients get none",
        SPEC,
        "if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():",
        "if False:",
        FUSION,
    ),
    Fault(
        "torch.func does not see the function",
        ROTATIONS,
        "if not torch.compiler.is_compiling() and _transformed():",
        "if False:",
        USES,
    ),
    Fault(
        "the last heads of a token are not rotated",
        "csrc/core/rope/rope.cu",
        "static_cast<int>(min(side.heads - head, static_cast<uint32_t>(kHeads)))",
        "static_cast<int>(min(side.heads - head, static_cast<uint32_t>(kHeads)) / kHeads * kHeads)",
        GPU,
        gpu=True,
    ),
    Fault(
        "rows that do not begin on 16 bytes are loaded as if",
        "csrc/core/rope/rope.cu",
        "for (int i = 0; i < count; ++i) whole = whole && strides[i] * bytes % 16 == 0;",
        "",
        GPU,
        gpu=True,
    ),
]
