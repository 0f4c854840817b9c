// experts_frozen: moe_experts on codes and scales that are given; the backward is in backward.cpp.
//
// forward: sort slots by expert; quantize x once a token and write its codes to its k rows; product
// with gate_up; activation and quantization; product with down; weight and add a token's rows. The
// weights are read where they lie, those of experts that have no rows not at all.
//
// Saved for the backward: the first product and the routing, and nothing of x.
#include "torch/experts/experts_frozen.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/grouped/grouped_mm.h"
#include "torch/grouped/grouped_ops.h"

namespace fp8 {

using core::Granularity;
using grouped::Gate;
using grouped::Routing;

namespace {

// Scales of blocks without gaps. Products take the distance of their rows from a stride, and an
// extent of 1 may have any in a tensor that is contiguous: where it is another, a copy.
at::Tensor without_gaps(const at::Tensor& scale) {
  return scale.is_contiguous() && scale.stride(1) == scale.size(2)
             ? scale
             : scale.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

Recipe experts::recipe_of(bool blocks, bool power_of_two) {
  Recipe recipe =
      grouped_recipe_at(grouped_recipe_id("experts_frozen", blocks ? "blockwise" : "rowwise"));
  recipe.power_of_two = power_of_two;
  return recipe;
}

Side experts::given_side(const at::Tensor& codes, const at::Tensor& scale, bool blocks) {
  const int64_t groups = codes.size(0);
  const int64_t rows = codes.size(1);
  const at::Tensor lying = grouped::contiguous(codes);
  if (blocks) {
    return {lying, without_gaps(scale), Granularity::kBlock128x128, rows};
  }
  const at::Tensor of_rows =
      scale.numel() == groups ? scale.reshape({groups, 1}).expand({groups, rows}) : scale;
  return {lying, of_rows.reshape({groups, rows}).contiguous(), Granularity::kRowwise, rows};
}

Side experts::transposed_side(const at::Tensor& codes, const at::Tensor& scale, bool blocks) {
  const int64_t groups = codes.size(0);
  const int64_t features = codes.size(2);
  // As bytes: a copy of float8 goes by way of numbers.
  const at::Tensor turned =
      codes.view(at::kByte).transpose(1, 2).contiguous().view(codes.scalar_type());
  if (blocks) {
    return {turned, without_gaps(scale.transpose(1, 2)), Granularity::kBlock128x128, features};
  }
  const at::Tensor of_rows =
      scale.numel() == groups ? scale.reshape({groups, 1}).expand({groups, features}).contiguous()
                              : at::ones({groups, features}, scale.options());
  return {turned, of_rows, Granularity::kRowwise, features};
}

at::Tensor experts::times_scales(const at::Tensor& rows, const at::Tensor& scale,
                                 const Routing& routing, const at::Tensor& experts) {
  const int64_t groups = routing.offsets.size(0);
  // Rows of no expert take the scale of any: nobody reads them.
  const at::Tensor expert =
      experts.view({-1}).index_select(0, routing.source).clamp_(0, groups - 1);
  const at::Tensor scales = scale.reshape({groups, -1}).index_select(0, expert);
  const at::ScalarType dtype = rows.scalar_type() == at::kHalf ? at::kFloat : rows.scalar_type();
  at::Tensor out = empty_on(rows, rows.sizes(), dtype);
  return at::mul_out(out, rows, scales);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
kernel::_experts_frozen_forward(const at::Tensor& given_x, const at::Tensor& top_k_index,
                                const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                                const at::Tensor& gate_up_scale, const at::Tensor& down,
                                const at::Tensor& down_scale,
                                const OptionalTensor& given_gate_up_bias,
                                const OptionalTensor& given_down_bias, int64_t activation,
                                bool interleaved, double alpha, double limit, bool blocks,
                                bool power_of_two) {
  experts::checked_blocks(given_x, top_k_index, top_k_weights, gate_up, gate_up_scale, down,
                          down_scale, given_gate_up_bias, given_down_bias,
                          blocks ? "blockwise" : "rowwise");
  const Recipe recipe = experts::recipe_of(blocks, power_of_two);
  const c10::DeviceGuard guard(given_x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor x = as_matrix(given_x);
  const at::ScalarType dtype = x.scalar_type();
  const at::Tensor experts = top_k_index.contiguous();
  const at::Tensor weights = experts::in_float(top_k_weights).contiguous();
  const int64_t top_k = experts.size(1);
  const int64_t groups = gate_up.size(0);
  const int64_t features = down.size(2);
  if (experts.numel() == 0) {
    const auto ints = x.options().dtype(at::kInt);
    return {at::zeros_like(x, at::MemoryFormat::Contiguous),
            at::empty({0, 2 * features}, x.options()), at::zeros({groups}, ints),
            at::empty({0}, ints), at::empty({0}, ints)};
  }
  const at::Tensor gate_up_bias = grouped::contiguous(given_gate_up_bias);
  const at::Tensor down_bias = grouped::contiguous(given_down_bias);
  const Routing routing = grouped::sort_by_expert(experts, groups);

  at::Tensor gate_up_out;
  {
    const Side qx = grouped::quantize_rows(x, recipe, routing.place, top_k);
    gate_up_out = grouped::multiply_rows(qx, experts::given_side(gate_up, gate_up_scale, blocks),
                                         routing.offsets, dtype, recipe.fast_fprop);
  }
  const Gate gate{static_cast<core::Activation>(activation), interleaved, alpha, limit};
  const Side qh = grouped::gated_rows(gate, gate_up_out, gate_up_bias, routing.offsets, recipe);
  const at::Tensor out = grouped::multiply_rows(qh, experts::given_side(down, down_scale, blocks),
                                                routing.offsets, dtype, recipe.fast_fprop);
  const at::Tensor y = grouped::combine_rows(out, x.size(0), routing, weights, experts, down_bias);
  return {y, gate_up_out, routing.offsets, routing.place, routing.source};
}

at::Tensor composite::experts_frozen(
    const at::Tensor& x, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
    const at::Tensor& gate_up, const at::Tensor& gate_up_scale, const at::Tensor& down,
    const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, std::string_view activation, bool interleaved, double alpha,
    double limit, std::optional<std::string_view> input_granularity, bool power_of_two) {
  const bool blocks =
      experts::checked_blocks(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down,
                              down_scale, gate_up_bias, down_bias, input_granularity);
  const auto forward =
      x.is_meta() ? meta::_experts_frozen_forward : kernel::_experts_frozen_forward;
  return std::get<0>(forward(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down,
                             down_scale, gate_up_bias, down_bias,
                             activation_index(activation, "experts_frozen"), interleaved, alpha,
                             limit, blocks, power_of_two));
}

}  // namespace fp8
