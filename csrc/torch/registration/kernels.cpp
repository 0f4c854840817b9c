// One table of kernels per dispatch key, for the schemas of schemas.cpp.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "host/ranges.h"
#include "torch/experts/experts_frozen.h"
#include "torch/frozen/frozen.h"
#include "torch/grouped/grouped_mm_op.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/linear/linear.h"
#include "torch/matmul/scaled_mm.h"
#include "torch/merged/merged.h"
#include "torch/mlp/mlp.h"
#include "torch/norm/norm_ops.h"
#include "torch/quantize/quantize_ops.h"
#include "torch/rope/rope_ops.h"

namespace {

// A kernel, under an NVTX range of the operator's name.
#define FP8_KERNEL(family, op) \
  m.impl(#op, TORCH_FN((fp8::Ranged<"fp8::" #op, &fp8::family::op>::call)))

// Made of the operators below, for real and for fake tensors alike.
void register_composites(torch::Library& m) {
  FP8_KERNEL(composite, fused_linear);
  FP8_KERNEL(composite, _fused_linear_into);
  FP8_KERNEL(composite, _fused_linear_functional);
  FP8_KERNEL(composite, merged_linear);
  FP8_KERNEL(composite, _merged_linear_functional);
  FP8_KERNEL(composite, mlp);
  FP8_KERNEL(composite, grouped_linear);
  FP8_KERNEL(composite, moe_experts);
  FP8_KERNEL(composite, experts_frozen);
  FP8_KERNEL(composite, _grouped_linear_into);
  FP8_KERNEL(composite, _moe_experts_into);
  FP8_KERNEL(composite, rms_norm);
  FP8_KERNEL(composite, layer_norm);
  FP8_KERNEL(composite, add_rms_norm);
  FP8_KERNEL(composite, _norm_and_input);
  FP8_KERNEL(composite, rope);
}

// CPU and CUDA share their kernels down to the device's own quantize and matmul.
void register_kernels(torch::Library& m) {
  register_composites(m);
  FP8_KERNEL(kernel, quantize_tensorwise);
  FP8_KERNEL(kernel, quantize_rowwise);
  FP8_KERNEL(kernel, quantize_tensorwise_transpose);
  FP8_KERNEL(kernel, quantize_rowwise_transpose);
  FP8_KERNEL(kernel, quantize_blockwise_1x128);
  FP8_KERNEL(kernel, quantize_blockwise_128x128);
  FP8_KERNEL(kernel, quantize_blockwise_1x128_transpose);
  FP8_KERNEL(kernel, quantize_blockwise_128x128_transpose);
  FP8_KERNEL(kernel, dequantize);
  FP8_KERNEL(kernel, scaled_mm);
  FP8_KERNEL(kernel, grouped_mm);
  FP8_KERNEL(kernel, scaled_mm_accumulate_);
  FP8_KERNEL(kernel, _scaled_mm_accumulate);
  FP8_KERNEL(kernel, _linear_forward);
  FP8_KERNEL(kernel, _linear_backward);
  FP8_KERNEL(kernel, linear_frozen);
  FP8_KERNEL(kernel, _linear_frozen_backward);
  FP8_KERNEL(kernel, _merged_forward);
  FP8_KERNEL(kernel, _merged_backward);
  FP8_KERNEL(kernel, _mlp_forward);
  FP8_KERNEL(kernel, _mlp_backward);
  FP8_KERNEL(kernel, _grouped_forward);
  FP8_KERNEL(kernel, _grouped_backward);
  FP8_KERNEL(kernel, _moe_forward);
  FP8_KERNEL(kernel, _moe_backward);
  FP8_KERNEL(kernel, _experts_frozen_forward);
  FP8_KERNEL(kernel, _experts_frozen_backward);
  FP8_KERNEL(kernel, _norm_forward);
  FP8_KERNEL(kernel, _norm_backward);
  FP8_KERNEL(kernel, _rope);
}

#undef FP8_KERNEL

}  // namespace

TORCH_LIBRARY_IMPL(fp8, CPU, m) { register_kernels(m); }

// Registered without a CUDA build too: there the kernels say what is missing.
TORCH_LIBRARY_IMPL(fp8, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fp8, Meta, m) {
  register_composites(m);
  m.impl("quantize_tensorwise", TORCH_FN(fp8::meta::quantize_tensorwise));
  m.impl("quantize_rowwise", TORCH_FN(fp8::meta::quantize_rowwise));
  m.impl("quantize_tensorwise_transpose", TORCH_FN(fp8::meta::quantize_tensorwise_transpose));
  m.impl("quantize_rowwise_transpose", TORCH_FN(fp8::meta::quantize_rowwise_transpose));
  m.impl("quantize_blockwise_1x128", TORCH_FN(fp8::meta::quantize_blockwise_1x128));
  m.impl("quantize_blockwise_128x128", TORCH_FN(fp8::meta::quantize_blockwise_128x128));
  m.impl("quantize_blockwise_1x128_transpose",
         TORCH_FN(fp8::meta::quantize_blockwise_1x128_transpose));
  m.impl("quantize_blockwise_128x128_transpose",
         TORCH_FN(fp8::meta::quantize_blockwise_128x128_transpose));
  m.impl("dequantize", TORCH_FN(fp8::meta::dequantize));
  m.impl("scaled_mm", TORCH_FN(fp8::meta::scaled_mm));
  m.impl("grouped_mm", TORCH_FN(fp8::meta::grouped_mm));
  m.impl("scaled_mm_accumulate_", TORCH_FN(fp8::meta::scaled_mm_accumulate_));
  m.impl("_scaled_mm_accumulate", TORCH_FN(fp8::meta::_scaled_mm_accumulate));
  m.impl("_linear_forward", TORCH_FN(fp8::meta::_linear_forward));
  m.impl("_linear_backward", TORCH_FN(fp8::meta::_linear_backward));
  m.impl("linear_frozen", TORCH_FN(fp8::meta::linear_frozen));
  m.impl("_linear_frozen_backward", TORCH_FN(fp8::meta::_linear_frozen_backward));
  m.impl("_merged_forward", TORCH_FN(fp8::meta::_merged_forward));
  m.impl("_merged_backward", TORCH_FN(fp8::meta::_merged_backward));
  m.impl("_mlp_forward", TORCH_FN(fp8::meta::_mlp_forward));
  m.impl("_mlp_backward", TORCH_FN(fp8::meta::_mlp_backward));
  m.impl("_grouped_forward", TORCH_FN(fp8::meta::_grouped_forward));
  m.impl("_grouped_backward", TORCH_FN(fp8::meta::_grouped_backward));
  m.impl("_moe_forward", TORCH_FN(fp8::meta::_moe_forward));
  m.impl("_moe_backward", TORCH_FN(fp8::meta::_moe_backward));
  m.impl("_experts_frozen_forward", TORCH_FN(fp8::meta::_experts_frozen_forward));
  m.impl("_experts_frozen_backward", TORCH_FN(fp8::meta::_experts_frozen_backward));
  m.impl("_norm_forward", TORCH_FN(fp8::meta::_norm_forward));
  m.impl("_norm_backward", TORCH_FN(fp8::meta::_norm_backward));
  m.impl("_rope", TORCH_FN(fp8::meta::_rope));
}

// Only the linear ops, linear_frozen, merged_linear, mlp, moe_experts, experts_frozen, the norms
// and rope have a gradient. The others say so when a backward reaches them.
TORCH_LIBRARY_IMPL(fp8, Autograd, m) {
  m.impl("fused_linear", TORCH_FN(fp8::autograd::fused_linear));
  m.impl("_linear_backward", TORCH_FN(fp8::autograd::_linear_backward));
  m.impl("_fused_linear_into", TORCH_FN(fp8::autograd::_fused_linear_into));
  m.impl("linear_frozen", TORCH_FN(fp8::autograd::linear_frozen));
  m.impl("grouped_linear", TORCH_FN(fp8::autograd::grouped_linear));
  m.impl("moe_experts", TORCH_FN(fp8::autograd::moe_experts));
  m.impl("experts_frozen", TORCH_FN(fp8::autograd::experts_frozen));
  m.impl("_grouped_linear_into", TORCH_FN(fp8::autograd::_grouped_linear_into));
  m.impl("_moe_experts_into", TORCH_FN(fp8::autograd::_moe_experts_into));
  m.impl("rms_norm", TORCH_FN(fp8::autograd::rms_norm));
  m.impl("layer_norm", TORCH_FN(fp8::autograd::layer_norm));
  m.impl("add_rms_norm", TORCH_FN(fp8::autograd::add_rms_norm));
  m.impl("_norm_and_input", TORCH_FN(fp8::autograd::_norm_and_input));
  m.impl("_norm_backward", TORCH_FN(fp8::autograd::_norm_backward));
  m.impl("rope", TORCH_FN(fp8::composite::rope));
  m.impl("_rope", TORCH_FN(fp8::autograd::_rope));
  m.impl("merged_linear", TORCH_FN(fp8::autograd::merged_linear));
  m.impl("mlp", TORCH_FN(fp8::autograd::mlp));
  for (const char* op : {"quantize_tensorwise",
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
                         "grouped_mm",
                         "_linear_forward",
                         "_linear_frozen_backward",
                         "_grouped_forward",
                         "_grouped_backward",
                         "_moe_forward",
                         "_moe_backward",
                         "_experts_frozen_forward",
                         "_experts_frozen_backward",
                         "_merged_forward",
                         "_merged_backward",
                         "_mlp_forward",
                         "_mlp_backward",
                         "_norm_forward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

// Counts the in-place write, so that autograd sees a changed tensor.
TORCH_LIBRARY_IMPL(fp8, ADInplaceOrView, m) {
  m.impl("_linear_forward", TORCH_FN(fp8::in_place::_linear_forward));
  m.impl("_merged_forward", TORCH_FN(fp8::in_place::_merged_forward));
  m.impl("_merged_backward", TORCH_FN(fp8::in_place::_merged_backward));
  m.impl("_mlp_forward", TORCH_FN(fp8::in_place::_mlp_forward));
  m.impl("_mlp_backward", TORCH_FN(fp8::in_place::_mlp_backward));
  m.impl("_grouped_backward", TORCH_FN(fp8::in_place::_grouped_backward));
  m.impl("_moe_backward", TORCH_FN(fp8::in_place::_moe_backward));
  m.impl("scaled_mm_accumulate_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}
