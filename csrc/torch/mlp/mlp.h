// Kernels of `mlp` and of the private ops that it is differentiated through, as in linear.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fp8 {

namespace mlp_needs {  // bits: what a backward is for, and how
inline constexpr int64_t kX = 1;
inline constexpr int64_t kGate = 2;
inline constexpr int64_t kUp = 4;
inline constexpr int64_t kDown = 8;
inline constexpr int64_t kGateBias = 16;
inline constexpr int64_t kUpBias = 32;
inline constexpr int64_t kDownBias = 64;
inline constexpr int64_t kRecompute = 128;  // the products of gate and up are made again
inline constexpr int64_t kFp8 = 256;        // they are kept as FP8 codes
inline constexpr int64_t kToH = kX | kGate | kUp | kGateBias | kUpBias;  // what dh is for
}  // namespace mlp_needs

namespace kernel {

// y [..., H], and what a backward for `needs` takes beside the arguments; empty tensors where it
// takes none, or the recipe has no use for it.
//   gate_out, up_out  [M, I] each, the products; merged one [M, 2 I] and an empty one. kFp8: e4m3
//                     codes of them, extents padded to 16
//   gate_out_scale, up_out_scale   kFp8: [padded M] fp32, a scale for each row
//   x_t, x_t_scale    as _linear_forward has them
//   x_amax, gate_amax, up_amax, down_amax, h_amax   [] fp32, tensorwise: what made a scale
// Shapes, the forms and the activation: fp8/ops.h. Of each history the rows of input and weight
// move on; x is quantized once, with gate's.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_forward(const at::Tensor& x,                         // [..., K]
             const at::Tensor& gate,                      // [I, K], or merged [2 I, K]
             const std::optional<at::Tensor>& up,         // [I, K]
             const at::Tensor& down,                      // [H, I]
             const std::optional<at::Tensor>& gate_bias,  // [I] or [2 I]
             const std::optional<at::Tensor>& up_bias,    // [I]
             const std::optional<at::Tensor>& down_bias,  // [H]
             int64_t activation,                          // mlp_node::Activation
             bool gate_second, double alpha, double limit, int64_t recipe, int64_t needs,
             const std::optional<at::Tensor>& gate_history,  // [3, kAmaxHistorySize] int32 each
             const std::optional<at::Tensor>& up_history,
             const std::optional<at::Tensor>& down_history);

// dx [..., K], dgate, dup, ddown, dgate_bias, dup_bias, ddown_bias; an empty tensor where one is
// not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_backward(const at::Tensor& dy,                             // [..., H]
              const std::optional<at::Tensor>& x,               // x_t; x itself to recompute, or
                                                                // without FP8 wgrad
              const std::optional<at::Tensor>& x_t_scale,       // with x_t
              const std::optional<at::Tensor>& gate_out,        // unless recomputed
              const std::optional<at::Tensor>& up_out,          // the same
              const std::optional<at::Tensor>& gate_out_scale,  // kFp8
              const std::optional<at::Tensor>& up_out_scale,    // the same
              const std::optional<at::Tensor>& gate,            // for dx, or to recompute
              const std::optional<at::Tensor>& up,              // the same
              const std::optional<at::Tensor>& down,            // for what lies before h
              const std::optional<at::Tensor>& gate_bias,       // to recompute
              const std::optional<at::Tensor>& up_bias,         // the same
              const std::optional<at::Tensor>& x_amax,          // [] fp32 each, tensorwise
              const std::optional<at::Tensor>& gate_amax,       //
              const std::optional<at::Tensor>& up_amax,         //
              const std::optional<at::Tensor>& down_amax,       //
              const std::optional<at::Tensor>& h_amax,          //
              c10::SymInt in_features, c10::SymInt features, int64_t form, int64_t activation,
              bool gate_second, double alpha, double limit, int64_t recipe, int64_t needs,
              const std::optional<at::Tensor>& gate_history,
              const std::optional<at::Tensor>& up_history,
              const std::optional<at::Tensor>& down_history);

}  // namespace kernel

namespace meta {
decltype(kernel::_mlp_forward) _mlp_forward;
decltype(kernel::_mlp_backward) _mlp_backward;
}  // namespace meta

namespace in_place {  // count the writes of histories
decltype(kernel::_mlp_forward) _mlp_forward;
decltype(kernel::_mlp_backward) _mlp_backward;
}  // namespace in_place

namespace composite {

// y [..., H], without a graph.
at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
               const at::Tensor& down, std::string_view activation, std::string_view recipe,
               const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& up_bias,
               const std::optional<at::Tensor>& down_bias, std::string_view save, bool gate_second,
               double alpha, double limit, const std::optional<at::Tensor>& gate_history,
               const std::optional<at::Tensor>& up_history,
               const std::optional<at::Tensor>& down_history);

}  // namespace composite

namespace autograd {
decltype(composite::mlp) mlp;
}  // namespace autograd

namespace mlp_node {

enum class Form : uint8_t { kPlain, kSeparate, kMerged };

// Where gate and up come from, by the shapes that check_mlp accepted.
Form form_of(const at::Tensor& gate, const std::optional<at::Tensor>& up, const at::Tensor& down);

int64_t activation_index(std::string_view name);
int64_t save_bit(std::string_view save);  // of mlp_needs; 0 to keep the products

}  // namespace mlp_node

// What mlp accepts, of one dtype on one device.
void check_mlp(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
               const at::Tensor& down, const std::optional<at::Tensor>& gate_bias,
               const std::optional<at::Tensor>& up_bias, const std::optional<at::Tensor>& down_bias,
               int64_t activation, int64_t recipe, const std::optional<at::Tensor>& gate_history,
               const std::optional<at::Tensor>& up_history,
               const std::optional<at::Tensor>& down_history);

}  // namespace fp8
