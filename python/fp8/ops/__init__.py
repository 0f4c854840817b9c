"""Typed wrappers of the operators `torch.ops.fp8.*`: what they compute, shapes, errors.

Words: `scale` is the dequantization factor, x ≈ data · scale. e4m3 is torch.float8_e4m3fn (largest
value 448), e5m2 is torch.float8_e5m2 (57344). M tokens, N out-features, K in-features. Every
operator runs on CUDA, CPU and meta tensors; CPU and CUDA quantize to the same bits. Errors are
TypeError (dtypes), ValueError (shapes, devices, unknown recipe) and NotImplementedError (double
backward); each names the operator, what it expected and what came.

Quantization, with amax = max |x| over a scaling group, in fp32:

    quant_multiplier = fp8_max / amax        (1 if amax is 0; at most the largest fp32)
    data = saturate(round_to_nearest_even(float(x) · quant_multiplier))
    scale = 1 / quant_multiplier

torch.vmap calls an operator once per example, so its results are those of a loop. Nested tensors
are taken by `fused_linear` alone. torch.utils.flop_counter counts the products. `MATMUL_OPS` is for
policies of selective activation checkpointing, `make_history` for delayed scaling.

With `power_of_two` quant_multiplier is rounded down to a power of two, and scale is one too
(between 2^-127 and 2^120). A NaN or Inf in a group makes the group's scale NaN or Inf, so that
everything computed from the group is non-finite.
"""

from ._checkpointing import MATMUL_OPS as MATMUL_OPS
from ._experts import experts_frozen
from ._frozen import linear_frozen
from ._grouped import grouped_linear, grouped_mm, moe_experts
from ._linear import fused_linear
from ._linear import make_history as make_history
from ._matmul import scaled_mm, scaled_mm_accumulate_
from ._merged import merged_linear
from ._mlp import mlp
from ._norms import add_rms_norm, layer_norm, rms_norm
from ._quantize import (
    dequantize,
    quantize_blockwise_1x128,
    quantize_blockwise_1x128_transpose,
    quantize_blockwise_128x128,
    quantize_blockwise_128x128_transpose,
    quantize_rowwise,
    quantize_rowwise_transpose,
    quantize_tensorwise,
    quantize_tensorwise_transpose,
)
from ._rope import rope

__all__ = [  # the operators
    "add_rms_norm",
    "dequantize",
    "experts_frozen",
    "fused_linear",
    "grouped_linear",
    "grouped_mm",
    "layer_norm",
    "linear_frozen",
    "merged_linear",
    "mlp",
    "moe_experts",
    "quantize_blockwise_1x128",
    "quantize_blockwise_1x128_transpose",
    "quantize_blockwise_128x128",
    "quantize_blockwise_128x128_transpose",
    "quantize_rowwise",
    "quantize_rowwise_transpose",
    "quantize_tensorwise",
    "quantize_tensorwise_transpose",
    "rms_norm",
    "rope",
    "scaled_mm",
    "scaled_mm_accumulate_",
]
