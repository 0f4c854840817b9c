"""What Python adds to every operator: a batching rule, and an error for nested tensors."""

from typing import Any

import torch

from . import functorch, nested

NAMES = (
    "quantize_tensorwise",
    "quantize_rowwise",
    "quantize_tensorwise_transpose",
    "quantize_rowwise_transpose",
    "quantize_blockwise_1x128",
    "quantize_blockwise_1x128_transpose",
    "quantize_blockwise_128x128",
    "quantize_blockwise_128x128_transpose",
    "dequantize",
    "scaled_mm",
    "scaled_mm_accumulate_",
    "_scaled_mm_accumulate",
    "fused_linear",
    "_linear_forward",
    "_linear_backward",
    "_fused_linear_into",
    "_fused_linear_functional",
    "linear_frozen",
    "_linear_frozen_backward",
    "merged_linear",
    "_merged_forward",
    "_merged_backward",
    "_merged_linear_functional",
    "mlp",
    "_mlp_forward",
    "_mlp_backward",
    "grouped_mm",
    "grouped_linear",
    "_grouped_forward",
    "_grouped_backward",
    "moe_experts",
    "_moe_forward",
    "_moe_backward",
    "experts_frozen",
    "_experts_frozen_forward",
    "_experts_frozen_backward",
    "_grouped_linear_into",
    "_moe_experts_into",
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "_norm_and_input",
    "_norm_forward",
    "_norm_backward",
    "rope",
    "_rope",
)
"""Every operator that computes; asking the dispatcher takes milliseconds. A test compares."""


def install() -> None:
    """Register them, once the operators are loaded. Harmless to repeat."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fp8::{NAMES[0]}", "FuncTorchBatched"):
        return  # the package was imported before, and taken out of sys.modules
    library: Any = torch.library.Library("fp8", "IMPL")  # type: ignore[no-untyped-call]
    # A registration ends with its library. torch.library's own registrations live here too.
    torch.library._keep_alive.append(library)
    for name in NAMES:
        rule = functorch.batching_rule(getattr(torch.ops.fp8, name).default)
        library.impl(name, rule, "FuncTorchBatched")
        for key in nested.KEYS:
            library.impl(name, nested.kernel(name), key)
