// Every schema. The contract of each op is in fp8/ops.h; dtype None means float8_e4m3fn where an op
// quantizes and bfloat16 where it returns high precision. Kernels: kernels.cpp.
#include <torch/library.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fp8/core.h"
#include "fp8/ops.h"
#include "torch/common/messages.h"
#include "torch/common/recipe.h"
#include "torch/quantize/memory.h"

TORCH_LIBRARY(fp8, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "quantize_tensorwise(Tensor x, ScalarType? dtype=None, Tensor? scale=None, *,"
      " bool power_of_two=False) -> (Tensor data, Tensor scale)",
      tags);
  m.def(
      "quantize_rowwise(Tensor x, ScalarType? dtype=None, *, bool power_of_two=False)"
      " -> (Tensor data, Tensor scale)",
      tags);
  m.def(
      "quantize_tensorwise_transpose(Tensor x, ScalarType? dtype=None, Tensor? scale=None, *,"
      " bool power_of_two=False) -> (Tensor data, Tensor data_t, Tensor scale)",
      tags);
  m.def(
      "quantize_rowwise_transpose(Tensor x, ScalarType? dtype=None, *, bool power_of_two=False)"
      " -> (Tensor data, Tensor data_t, Tensor scale, Tensor scale_t)",
      tags);
  m.def(
      "quantize_blockwise_1x128(Tensor x, ScalarType? dtype=None, *, bool power_of_two=False)"
      " -> (Tensor data, Tensor scale)",
      tags);
  m.def(
      "quantize_blockwise_1x128_transpose(Tensor x, ScalarType? dtype=None, *,"
      " bool power_of_two=False)"
      " -> (Tensor data, Tensor data_t, Tensor scale, Tensor scale_t)",
      tags);
  m.def(
      "quantize_blockwise_128x128(Tensor x, ScalarType? dtype=None, *, bool power_of_two=False)"
      " -> (Tensor data, Tensor scale)",
      tags);
  m.def(
      "quantize_blockwise_128x128_transpose(Tensor x, ScalarType? dtype=None, *,"
      " bool power_of_two=False)"
      " -> (Tensor data, Tensor data_t, Tensor scale, Tensor scale_t)",
      tags);
  m.def("dequantize(Tensor data, Tensor scale, ScalarType? dtype=None) -> Tensor", tags);
  m.def(
      "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None,"
      " ScalarType? out_dtype=None, bool fast_accum=True) -> Tensor",
      tags);
  m.def(
      "scaled_mm_accumulate_(Tensor(a!) out, Tensor a, Tensor b, Tensor scale_a, Tensor scale_b,"
      " bool fast_accum=False) -> Tensor(a!)",
      tags);
  m.def(
      "fused_linear(Tensor x, Tensor weight, Tensor? bias=None, str recipe=\"tensorwise\", *,"
      " Tensor? input_scale=None, Tensor(a!)? history=None) -> Tensor",
      tags);
  m.def(
      "merged_linear(Tensor x, Tensor[] weights, Tensor?[]? biases=None,"
      " str recipe=\"tensorwise\", *, Tensor(a!)? history=None) -> Tensor[]",
      tags);
  m.def(
      "linear_frozen(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None,"
      " Tensor? input_scale=None, *, str? input_granularity=None, bool power_of_two=False,"
      " bool decode=True) -> Tensor",
      tags);
  m.def(
      "grouped_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor offsets,"
      " ScalarType? out_dtype=None, bool fast_accum=True) -> Tensor",
      tags);
  const std::string grouped_recipe =
      fp8::join(" str recipe=\"", fp8::kDefaultGroupedRecipe, "\") -> Tensor");
  m.def(("grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias=None," +
         grouped_recipe)
            .c_str(),
        tags);
  m.def(("moe_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up,"
         " Tensor down, Tensor? gate_up_bias=None, Tensor? down_bias=None,"
         " str activation=\"silu\", bool interleaved=False, float alpha=1.702, float limit=7.0," +
         grouped_recipe)
            .c_str(),
        tags);
  m.def(
      "experts_frozen(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up,"
      " Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? gate_up_bias=None,"
      " Tensor? down_bias=None, str activation=\"silu\", bool interleaved=False,"
      " float alpha=1.702, float limit=7.0, *, str? input_granularity=None,"
      " bool power_of_two=False) -> Tensor",
      tags);
  m.def(
      "mlp(Tensor x, Tensor gate, Tensor? up, Tensor down, *, str activation=\"silu\","
      " str recipe=\"tensorwise\", Tensor? gate_bias=None, Tensor? up_bias=None,"
      " Tensor? down_bias=None, str save=\"bf16\", bool gate_second=False, float alpha=1.702,"
      " float limit=7.0, Tensor(a!)? gate_history=None, Tensor(b!)? up_history=None,"
      " Tensor(c!)? down_history=None) -> Tensor",
      tags);
  m.def(
      "rms_norm(Tensor x, Tensor? weight=None, float? eps=None, str form=\"scale_then_round\")"
      " -> Tensor",
      tags);
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor",
        tags);
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float? eps=None,"
      " str form=\"scale_then_round\") -> (Tensor y, Tensor sum)",
      tags);
  m.def(
      "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, str layout=\"halves\","
      " SymInt? rotary_dim=None, str rounding=\"each\") -> (Tensor q, Tensor k)",
      tags);
  // Not for direct use: scaled_mm_accumulate_ out of place, for torch.compile, and what
  // fused_linear is differentiated through.
  m.def(
      "_scaled_mm_accumulate(Tensor out, Tensor a, Tensor b, Tensor scale_a, Tensor scale_b,"
      " bool fast_accum) -> Tensor",
      tags);
  m.def(
      "_linear_forward(Tensor x, Tensor weight, Tensor? bias, int recipe, bool save_x_t,"
      " bool save_weight_amax, *, Tensor? input_scale=None, Tensor(a!)? history=None)"
      " -> (Tensor y, Tensor x_t, Tensor x_t_scale, Tensor weight_amax)",
      tags);
  // Optional arguments that may be written are named: Inductor drops one that is None from among
  // the others.
  m.def(
      "_fused_linear_functional(Tensor x, Tensor weight, Tensor? bias, str recipe,"
      " Tensor? input_scale, Tensor? history) -> (Tensor y, Tensor next_history)",
      tags);
  // The table of recipes, for Python.
  m.def("_recipes() -> (Dict(str, str)[] recipes, str[] options, str grouped_default)",
        &fp8::recipe_table);
  // Of a row of a history, for Python.
  m.def("_amax_history_size() -> int", [] { return int64_t{fp8::core::kAmaxHistorySize}; });
  // What fp8.cached_weights opens and closes: no device, no gradient.
  m.def("_cache_weights(Tensor[] weights, bool captures=False) -> ()", &fp8::memory::cache_weights);
  m.def("_uncache_weights(Tensor[] weights, bool captures=False) -> ()",
        &fp8::memory::uncache_weights);
  m.def("_forget_weights(Tensor[] weights) -> ()", &fp8::memory::forget_weights);
  m.def(
      "_linear_backward(Tensor dy, Tensor? x, Tensor? x_t_scale, Tensor? weight,"
      " Tensor? weight_amax, SymInt in_features, int recipe, bool needs_dx, bool needs_dweight,"
      " bool needs_dbias, *, Tensor(a!)? main_grad=None, bool overwrite=False,"
      " Tensor(b!)? history=None) -> (Tensor dx, Tensor dweight, Tensor dbias)",
      tags);
  // fused_linear whose backward has a main_grad.
  m.def(
      "_fused_linear_into(Tensor x, Tensor weight, Tensor? bias, str recipe, Tensor main_grad,"
      " bool overwrite, Tensor? stand_in, *, Tensor? input_scale=None, Tensor(a!)? history=None)"
      " -> Tensor",
      tags);
  // The gradient of linear_frozen's x.
  m.def(
      "_linear_frozen_backward(Tensor dy, Tensor weight, Tensor weight_scale, bool blocks,"
      " bool power_of_two) -> Tensor",
      tags);
  // What merged_linear is differentiated through, and merged_linear out of place.
  m.def(
      "_merged_forward(Tensor x, Tensor[] weights, Tensor? bias, int recipe, bool save_x_t,"
      " bool save_weight_amax, *, Tensor(a!)? history=None)"
      " -> (Tensor y, Tensor x_t, Tensor x_t_scale, Tensor weight_amax)",
      tags);
  m.def(
      "_merged_backward(Tensor[] dys, Tensor? x, Tensor? x_t_scale, Tensor[] weights,"
      " Tensor? weight_amax, SymInt in_features, int recipe, bool needs_dx, int needs_dweight,"
      " bool needs_dbias, *, Tensor(a!)? history=None)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)",
      tags);
  m.def(
      "_merged_linear_functional(Tensor x, Tensor[] weights, Tensor?[]? biases, str recipe,"
      " Tensor? history) -> (Tensor y, Tensor next_history)",
      tags);
  // What mlp is differentiated through, and mlp out of place.
  m.def(
      "_mlp_forward(Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor? gate_bias,"
      " Tensor? up_bias, Tensor? down_bias, int activation, bool gate_second, float alpha,"
      " float limit, int recipe, int needs, *, Tensor(a!)? gate_history=None,"
      " Tensor(b!)? up_history=None, Tensor(c!)? down_history=None)"
      " -> (Tensor y, Tensor gate_out, Tensor up_out, Tensor gate_out_scale, Tensor up_out_scale,"
      " Tensor x_t, Tensor x_t_scale, Tensor x_amax, Tensor gate_amax, Tensor up_amax,"
      " Tensor down_amax, Tensor h_amax)",
      tags);
  m.def(
      "_mlp_backward(Tensor dy, Tensor? x, Tensor? x_t_scale, Tensor? gate_out, Tensor? up_out,"
      " Tensor? gate_out_scale, Tensor? up_out_scale, Tensor? gate, Tensor? up, Tensor? down,"
      " Tensor? gate_bias, Tensor? up_bias, Tensor? x_amax, Tensor? gate_amax, Tensor? up_amax,"
      " Tensor? down_amax, Tensor? h_amax, SymInt in_features, SymInt features, int form,"
      " int activation, bool gate_second, float alpha, float limit, int recipe, int needs, *,"
      " Tensor(a!)? gate_history=None, Tensor(b!)? up_history=None, Tensor(c!)? down_history=None)"
      " -> (Tensor dx, Tensor dgate, Tensor dup, Tensor ddown, Tensor dgate_bias, Tensor dup_bias,"
      " Tensor ddown_bias)",
      tags);
  // What grouped_linear and moe_experts are differentiated through.
  m.def(
      "_grouped_forward(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, int recipe,"
      " bool save_x, *, bool save_amax=False)"
      " -> (Tensor y, Tensor x_t, Tensor x_t_scale, Tensor padded_offsets, Tensor weight_amax)",
      tags);
  m.def(
      "_grouped_backward(Tensor dy, Tensor? x, Tensor? x_t_scale, Tensor? padded_offsets,"
      " Tensor? weight, Tensor offsets, SymInt in_features, bool transposed, int recipe,"
      " bool needs_dx, bool needs_dweight, bool needs_dbias, *, Tensor? weight_amax=None,"
      " Tensor(a!)? main_grad=None, bool overwrite=False)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)",
      tags);
  m.def(
      "_moe_forward(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up, Tensor "
      "down,"
      " Tensor? gate_up_bias, Tensor? down_bias, int activation, bool interleaved, float alpha,"
      " float limit, int recipe, *, bool save_amax=False)"
      " -> (Tensor y, Tensor gate_up_out, Tensor offsets, Tensor place, Tensor source,"
      " Tensor gate_up_amax, Tensor down_amax)",
      tags);
  m.def(
      "_moe_backward(Tensor dy, Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up,"
      " Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor gate_up_out, Tensor offsets,"
      " Tensor place, Tensor source, int activation, bool interleaved, float alpha, float limit,"
      " int recipe, int needs, *, Tensor? gate_up_amax=None, Tensor? down_amax=None,"
      " Tensor(a!)? gate_up_main_grad=None, Tensor(b!)? down_main_grad=None)"
      " -> (Tensor dx, Tensor d_weights, Tensor d_gate_up, Tensor d_down,"
      " Tensor d_gate_up_bias, Tensor d_down_bias)",
      tags);
  // A norm, and its input for the other uses of it: their gradient joins in the norm's backward.
  m.def(
      "_norm_and_input(Tensor(a) x, Tensor? weight, Tensor? bias, float eps, int form)"
      " -> (Tensor y, Tensor(a) same)",
      tags);
  // grouped_linear and moe_experts whose backwards have main_grads.
  m.def(
      "_grouped_linear_into(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, str recipe,"
      " Tensor main_grad, bool overwrite, Tensor? stand_in) -> Tensor",
      tags);
  m.def(
      "_moe_experts_into(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up,"
      " Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved,"
      " float alpha, float limit, str recipe, Tensor? gate_up_main_grad, Tensor? down_main_grad,"
      " bool overwrite_gate_up, bool overwrite_down, Tensor? gate_up_stand_in,"
      " Tensor? down_stand_in) -> Tensor",
      tags);
  // What experts_frozen is differentiated through.
  m.def(
      "_experts_frozen_forward(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up,"
      " Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? gate_up_bias,"
      " Tensor? down_bias, int activation, bool interleaved, float alpha, float limit,"
      " bool blocks, bool power_of_two)"
      " -> (Tensor y, Tensor gate_up_out, Tensor offsets, Tensor place, Tensor source)",
      tags);
  m.def(
      "_experts_frozen_backward(Tensor dy, Tensor top_k_index, Tensor top_k_weights,"
      " Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale,"
      " Tensor? gate_up_bias, Tensor? down_bias, Tensor gate_up_out, Tensor offsets, Tensor place,"
      " Tensor source, int activation, bool interleaved, float alpha, float limit, bool blocks,"
      " bool power_of_two, int needs)"
      " -> (Tensor dx, Tensor d_weights, Tensor d_gate_up_bias, Tensor d_down_bias)",
      tags);
  // What the norms are differentiated through.
  m.def(
      "_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, int form)"
      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "_norm_backward(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? add,"
      " ScalarType? bias_dtype, int form, bool needs_dx, bool needs_dweight, bool needs_dbias)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)",
      tags);
  // What rope is differentiated through, and its gradient.
  m.def(
      "_rope(Tensor? q, Tensor? k, Tensor cos, Tensor sin, SymInt rotary_dim, int form,"
      " ScalarType? dtype, int[] q_order, int[] k_order) -> (Tensor q, Tensor k)",
      tags);
}
