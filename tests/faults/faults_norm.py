"""Faults in norms: their kernels, their gradients, and the modules that take them."""

from __future__ import annotations

from fault import Fault

VALUES = "tests/python/norm/test_norm_values.py"
AUTOGRAD = "tests/python/norm/test_norm_autograd.py"
INPUTS = "tests/python/norm/test_norm_inputs.py"
FUSION = "tests/python/norm/test_norm_fusion.py"
FUSION_PROBE = "tests/python/norm/test_norm_fusion_probe.py"
FUSION_CHANGES = "tests/python/norm/test_norm_fusion_changes.py"
FUSION_CONTEXTS = "tests/python/norm/test_norm_fusion_contexts.py"
GPU = "tests/python/norm/test_norm_cuda.py"
AMAX = "tests/python/norm/test_norm_amax.py"
AMAX_GPU = "tests/python/norm/test_norm_amax_cuda.py"
LEFT_AMAX = "csrc/torch/quantize/left_amax.cpp"
PROBE = "python/fp8/conversion/_norm_probe.py"
FUSED = "python/fp8/nn/_fused_norms.py"

NORM = [
    Fault(
        "T(xhat) is not rounded before the weight",
        "csrc/cpu/norm.cpp",
        "if (norm.form == NormForm::kRoundThenScale) round_all(x, norm.dtype);",
        "",
        VALUES,
    ),
    Fault(
        "the last warp's sum of a row is left out",
        "csrc/cpu/norm.cpp",
        "total = warp == 0 ? of_warp[0] : total + of_warp[0];",
        "total = warp == 0 || warp + lanes < count ? total + of_warp[0] : total;",
        VALUES,
    ),
    Fault(
        "a short row's eights are added as they come",
        "csrc/cpu/norm.cpp",
        "plan.pairs ? 32 : plan.threads_per_row",
        "plan.threads_per_row",
        VALUES,
    ),
    Fault(
        "the residual's gradient joins before dx is rounded",
        "csrc/cpu/norm.cpp",
        "        round_all(g, norm.dtype);\n        read(args.add",
        "        read(args.add",
        VALUES,
    ),
    Fault(
        "the root's part of a norm's gradient is forgotten",
        "csrc/host/norm.h",
        "mul(mul(-0.5F, product), cube)",
        "mul(mul(0.5F, product), cube)",
        f"{VALUES} {AUTOGRAD}",
    ),
    Fault(
        "a tensor of three leading strides is read as one of two",
        "csrc/torch/norm/norm.cpp",
        ".stride0 = strides[2],",
        ".stride0 = strides[1],",
        INPUTS,
    ),
    Fault(
        "the gradient of a sum is lost where y has one",
        "csrc/torch/norm/autograd.cpp",
        "optional(saved[3]), optional(dsum),",
        "optional(saved[3]), std::nullopt,",
        AUTOGRAD,
    ),
    Fault(
        "a weight that is wider than x is rounded with it",
        "csrc/torch/norm/check.cpp",
        "return form == NormForm::kRoundThenScale && weight &&",
        "return false && weight &&",
        VALUES,
    ),
    Fault(
        "a norm of another gradient is fused",
        PROBE,
        "            if _same_gradients(asked, candidate, now):",
        "            if now:",
        FUSION,
    ),
    Fault(
        "a norm that drops in training is fused",
        PROBE,
        "for training in (True, False):",
        "for training in (False,):",
        FUSION,
    ),
    Fault(
        "the probe draws from the caller's generator",
        PROBE,
        "with torch.random.fork_rng(devices=[]), undisturbed()",
        "with undisturbed()",
        FUSION,
    ),
    Fault(
        "a changed eps is not noticed",
        FUSED,
        "if attributes.get(name, _MARK) != value:",
        "if False:",
        FUSION,
    ),
    Fault(
        "a second argument is dropped",
        FUSED,
        "if len(args) != 1 or kwargs or base.forward is not own or",
        "if base.forward is not own or",
        FUSION,
    ),
    Fault(
        "a forward replaced in the class is bypassed",
        FUSED,
        "or kwargs or base.forward is not own or spec",
        "or kwargs or spec",
        FUSION_CHANGES,
    ),
    Fault(
        "a forward on the instance is bypassed",
        "python/fp8/conversion/_classes.py",
        'if has_own_forward(module):\n        return "its forward was replaced on the instance; c',
        'if False:\n        return "its forward was replaced on the instance; c',
        FUSION,
    ),
    Fault(
        "norms that differ in a private attribute count as one",
        "python/fp8/conversion/_norm_key.py",
        "if name in _INTERNAL or name in _NOTES:",
        'if name.startswith("_") or name in _NOTES:',
        FUSION_PROBE,
    ),
    Fault(
        "a norm of images' channels is fused",
        FUSED,
        "if x.dim() not in spec.ranks:",
        "if x.dim() == 0:",
        FUSION_PROBE,
    ),
    Fault(
        "rows do not show a small eps",
        PROBE,
        "_SCALES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6,",
        "_SCALES = (1e-4, 1e-4, 1e-4, 1e-4, 1e-4,",
        FUSION_PROBE,
    ),
    Fault(
        "gradients are those of evaluation",
        PROBE,
        "for training in (False, True):",
        "for training in (False,):",
        FUSION_PROBE,
    ),
    Fault(
        "a method that the forward calls is replaced unnoticed",
        FUSED,
        "return not obstacle(self, x) and (not rest or unchanged(self, spec))",
        "return not obstacle(self, x)",
        FUSION_CHANGES,
    ),
    Fault(
        "a bias that a norm is given later is dropped",
        FUSED,
        "if parameter is not None and name != spec.weight and name != spec.bias:",
        "if False:",
        FUSION_CHANGES,
    ),
    Fault(
        "y of a transposed x is contiguous",
        FUSED,
        "if not spec.keeps_order or x.is_contiguous()",
        "if True or x.is_contiguous()",
        FUSION_CHANGES,
    ),
    Fault(
        "the probe waits for other processes",
        PROBE,
        'if "c10d" in func.namespace:',
        "if False:",
        FUSION_CONTEXTS,
    ),
    Fault(
        "autocast changes the dtype of a norm's output",
        FUSED,
        "not spec.under_autocast",
        "False",
        FUSION_CONTEXTS,
    ),
    Fault(
        "slots of a block are not all added up",
        "csrc/core/norm/backward_rows.cuh",
        "for (int g = 1; g < groups; ++g) sum",
        "for (int g = 2; g < groups; ++g) sum",
        GPU,
        gpu=True,
    ),
    Fault(
        "a row's slots do not wait for each other",
        "csrc/core/norm/norm.cuh",
        "    wait_for_row(slot_, threads_);\n",
        "",
        GPU,
        gpu=True,
    ),
    Fault(
        "dx is made of dy in place of its product with the weight",
        "csrc/core/norm/backward_rows.cuh",
        "rounded_g[i] = eight.rounded_g;",
        "rounded_g[i] = next.read(place + kBytes, i);",
        GPU,
        gpu=True,
    ),
    Fault(
        "dx of LayerNorm's long rows is made of dy in place of its product with the weight",
        "csrc/core/norm/backward_rows.cuh",
        ": mul(dy.get(j), w.get(j));",
        ": dy.get(j);",
        GPU,
        gpu=True,
    ),
    Fault(
        "an amax serves a tensor that was written since",
        LEFT_AMAX,
        "return left.place == place;",
        "return left.place.data == place.data;",
        AMAX,
    ),
    Fault(
        "an amax outlives a backward",
        "csrc/torch/quantize/memory.cpp",
        "  drop_amaxes();\n",
        "",
        AMAX,
    ),
    Fault(
        "norms leave an amax whether or not it is asked for",
        LEFT_AMAX,
        "leaves_ = norms.readers.has(norm_);",
        "leaves_ = true;",
        AMAX,
    ),
    Fault(
        "no norm leaves an amax",
        LEFT_AMAX,
        "norms.readers.found(left.norm);",
        "",
        AMAX,
    ),
    Fault(
        "an amax is that of what is not rounded yet",
        "csrc/cpu/norm.cpp",
        "      round_all(x, norm.dtype);\n      of_rows",
        "      of_rows",
        AMAX,
    ),
    Fault(
        "columns that are not there count in an amax",
        "csrc/core/norm/forward.cuh",
        "    if (valid < 8) {\n#pragma",
        "    if (valid < 0) {\n#pragma",
        AMAX,
        gpu=True,
    ),
    Fault(
        "a quantization takes the first part of an amax for all of it",
        "csrc/core/quantize/quantize_core.cpp",
        "of_parts.tensor_parts = static_cast<int>(parts_);",
        "of_parts.tensor_parts = 1;",
        AMAX_GPU,
        gpu=True,
    ),
]
