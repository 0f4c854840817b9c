// Kernels of `merged_linear` and of the private ops that it is differentiated through, as in
// linear.h: a linear layer whose weight lies in several tensors, one below the other. N is the sum
// of the weights' rows; the private ops make the whole y, whose columns the callers hand out.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace fp8 {

using OptionalTensors = std::optional<c10::List<std::optional<at::Tensor>>>;

namespace kernel {

// As _linear_forward: y [..., N], x_t, x_t_scale, weight_amax.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _merged_forward(
    const at::Tensor& x,                    // [..., K]
    at::TensorList weights,                 // [N_i, K] each
    const std::optional<at::Tensor>& bias,  // [N]
    int64_t recipe, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& history);  // [3, kAmaxHistorySize] int32, `delayed`

// dx [..., K], dweight [sum of the rows that want one, K], dbias [sum of the rows of all parts];
// an empty tensor where one is not asked for. The parts are those that have a gradient, in order.
std::tuple<at::Tensor, at::Tensor, at::Tensor> _merged_backward(
    at::TensorList dys,                            // [..., N_i] each
    const std::optional<at::Tensor>& x,            // x_t, or x without FP8 wgrad
    const std::optional<at::Tensor>& x_t_scale,    // see _linear_forward
    at::TensorList weights,                        // [N_i, K], as many as dys; none without dx
    const std::optional<at::Tensor>& weight_amax,  // [] fp32, tensorwise: of all of the forward's
    c10::SymInt in_features, int64_t recipe, bool needs_dx,
    int64_t needs_dweight,  // bit i: of the i-th part
    bool needs_dbias,
    const std::optional<at::Tensor>& history);  // [3, kAmaxHistorySize] int32, `delayed`

}  // namespace kernel

namespace meta {
decltype(kernel::_merged_forward) _merged_forward;
decltype(kernel::_merged_backward) _merged_backward;
}  // namespace meta

namespace in_place {  // count the write of history
decltype(kernel::_merged_forward) _merged_forward;
decltype(kernel::_merged_backward) _merged_backward;
}  // namespace in_place

namespace composite {

// y_i [..., N_i] each, without a graph.
std::vector<at::Tensor> merged_linear(
    const at::Tensor& x,            // [..., K]
    at::TensorList weights,         // [N_i, K] each
    const OptionalTensors& biases,  // [N_i] or none each, as many as weights
    std::string_view recipe,
    const std::optional<at::Tensor>& history);  // [3, kAmaxHistorySize] int32, `delayed`

// The same out of place: y [..., N], and the history that comes next ([0] without one). What
// functionalization makes of merged_linear, whose results share memory.
std::tuple<at::Tensor, at::Tensor> _merged_linear_functional(
    const at::Tensor& x,            // [..., K]
    at::TensorList weights,         // [N_i, K] each
    const OptionalTensors& biases,  // [N_i] or none each, as many as weights
    std::string_view recipe,
    const std::optional<at::Tensor>& history);  // [3, kAmaxHistorySize] int32

}  // namespace composite

namespace autograd {
decltype(composite::merged_linear) merged_linear;
}  // namespace autograd

namespace merged {

inline constexpr size_t kMaxParts = 62;  // bits of needs_dweight

// That of the i-th weight, if there is one.
inline std::optional<at::Tensor> bias_of(const OptionalTensors& biases, size_t i) {
  return biases ? biases->get(i) : std::nullopt;
}

// The biases as one, zeros where a weight has none; none where none has.
std::optional<at::Tensor> joined_bias(at::TensorList weights, const OptionalTensors& biases);

// The columns of y that are each weight's.
std::vector<at::Tensor> parts_of(const at::Tensor& y, at::TensorList weights);

}  // namespace merged

// What merged_linear accepts, of one dtype on one device.
void check_merged(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                  int64_t recipe, const std::optional<at::Tensor>& history);

}  // namespace fp8
