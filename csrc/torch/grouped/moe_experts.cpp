// moe_experts: the experts of a mixture with the routing given; the backward is in
// moe_backward.cpp.
//
// forward: sort slots by expert; quantize x once a token and write its codes to its k rows; product
// with gate_up; activation and quantization; product with down; weight and add a token's rows.
//
// Saved for the backward: x, which the router keeps alive too, the first product, and the routing:
// 4 I bytes a row of bf16 where the composition of ATen's ops keeps about 4 H + 8 I. The product's
// gradient takes its place where the graph is not kept. Weight gradients come last, when that and
// the quantized weights are gone.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/grouped/grouped_mm.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/grouped/moe_passes.h"

namespace fp8 {

using grouped::Gate;
using grouped::Routing;

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_moe_forward(const at::Tensor& given_x, const at::Tensor& top_k_index,
             const at::Tensor& top_k_weights, const at::Tensor& gate_up, const at::Tensor& down,
             const std::optional<at::Tensor>& given_gate_up_bias,
             const std::optional<at::Tensor>& given_down_bias, int64_t activation, bool interleaved,
             double alpha, double limit, int64_t recipe_id, bool save_amax) {
  check_moe_experts(given_x, top_k_index, top_k_weights, gate_up, down, given_gate_up_bias,
                    given_down_bias);
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const c10::DeviceGuard guard(given_x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor x = as_matrix(given_x);
  const at::ScalarType dtype = x.scalar_type();
  const at::Tensor experts = top_k_index.contiguous();
  const at::Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const int64_t tokens = x.size(0);
  const int64_t top_k = experts.size(1);
  const int64_t groups = gate_up.size(0);
  const int64_t features = down.size(2);
  if (experts.numel() == 0) {
    const auto ints = x.options().dtype(at::kInt);
    const auto no_amax = [&](const at::Tensor& weight) {
      return save_amax ? grouped::kept_amax_like(weight, recipe).zero_() : none_like(x);
    };
    return {at::zeros_like(x, at::MemoryFormat::Contiguous),
            at::empty({0, 2 * features}, x.options()),
            at::zeros({groups}, ints),
            at::empty({0}, ints),
            at::empty({0}, ints),
            no_amax(gate_up),
            no_amax(down)};
  }
  const at::Tensor gate_up_bias = grouped::contiguous(given_gate_up_bias);
  const at::Tensor down_bias = grouped::contiguous(given_down_bias);
  const Routing routing = grouped::sort_by_expert(experts, groups);

  // y = rows W^T; the maxima of the weight's columns go to `amax`.
  const auto multiply = [&](const Side& rows, const at::Tensor& weight, at::Tensor& amax) {
    const bool keep_amax = save_amax && grouped::keeps_amax(weight, recipe);
    auto [codes, kept] = grouped::weight_for_fprop(weight, recipe, keep_amax);
    amax = keep_amax ? kept : none_like(x);
    return grouped::multiply_rows(rows, codes, routing.offsets, dtype, recipe.fast_fprop);
  };
  at::Tensor gate_up_out;
  at::Tensor gate_up_amax;
  at::Tensor down_amax;
  {
    const Side qx = grouped::quantize_rows(x, recipe, routing.place, top_k);
    gate_up_out = multiply(qx, gate_up, gate_up_amax);
  }
  const Gate gate{static_cast<core::Activation>(activation), interleaved, alpha, limit};
  const Side qh = grouped::gated_rows(gate, gate_up_out, gate_up_bias, routing.offsets, recipe);
  const at::Tensor out = multiply(qh, down, down_amax);
  const at::Tensor y = grouped::combine_rows(out, tokens, routing, weights, experts, down_bias);
  return {y, gate_up_out, routing.offsets, routing.place, routing.source, gate_up_amax, down_amax};
}

}  // namespace kernel

at::Tensor composite::moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                                  const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                                  const at::Tensor& down,
                                  const std::optional<at::Tensor>& gate_up_bias,
                                  const std::optional<at::Tensor>& down_bias,
                                  std::string_view activation, bool interleaved, double alpha,
                                  double limit, std::string_view recipe) {
  const auto forward = x.is_meta() ? meta::_moe_forward : kernel::_moe_forward;
  return std::get<0>(forward(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias,
                             activation_index(activation), interleaved, alpha, limit,
                             grouped_recipe_id("moe_experts", recipe), /*save_amax=*/false));
}

at::Tensor composite::_moe_experts_into(
    const at::Tensor& x, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
    const at::Tensor& gate_up, const at::Tensor& down,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    std::string_view activation, bool interleaved, double alpha, double limit,
    std::string_view recipe, const std::optional<at::Tensor>& /*gate_up_main_grad*/,
    const std::optional<at::Tensor>& /*down_main_grad*/, bool /*overwrite_gate_up*/,
    bool /*overwrite_down*/, const std::optional<at::Tensor>& /*gate_up_stand_in*/,
    const std::optional<at::Tensor>& /*down_stand_in*/) {
  return moe_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias,
                     activation, interleaved, alpha, limit, recipe);
}

}  // namespace fp8
