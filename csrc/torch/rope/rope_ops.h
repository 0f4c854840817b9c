// Kernels of rotary position embedding. composite: made of the private operator, for real and fake
// tensors alike. kernel: CPU and CUDA. meta: shapes and dtypes only. Contracts are in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "fp8/core_rope.h"

namespace fp8 {

using OptionalTensor = std::optional<at::Tensor>;

// Where the results are rounded, as fp8/ops.h names it.
enum class RopeRounding : uint8_t { kEach, kSum, kOnce };

// What a call computes beside its tensors; an integer, as operators take it.
struct RopeForm {
  core::RopeLayout layout = core::RopeLayout::kHalves;
  RopeRounding rounding = RopeRounding::kEach;
  bool transposed = false;        // as core::RopeArgs has it
  bool keeps_minus_zero = false;  // the same

  int64_t packed() const {
    return static_cast<int64_t>(layout) | static_cast<int64_t>(rounding) << 2 |
           static_cast<int64_t>(transposed) << 4 | static_cast<int64_t>(keeps_minus_zero) << 5;
  }
};

// The form of that number, or of these names; c10::ValueError, in the name of fp8::`op`, if there
// is none.
RopeForm rope_form(const char* op, int64_t packed);
RopeForm rope_form(const char* op, std::string_view layout, std::string_view rounding);

// What is refused.
void check_rope(const char* op, const OptionalTensor& q, const OptionalTensor& k,
                const at::Tensor& cos, const at::Tensor& sin, const c10::SymInt& rotary);

// The dimensions of x from the outermost in memory to the innermost, but for the last, which stays.
std::vector<int64_t> order_of(const at::Tensor& x);

namespace composite {

// q and k, rotated; k is an empty tensor where there was none.
std::tuple<at::Tensor, at::Tensor> rope(const at::Tensor& q,      // [..., D] high precision
                                        const OptionalTensor& k,  // [..., D] in q's dtype
                                        const at::Tensor& cos,    // broadcasts to [..., R]
                                        const at::Tensor& sin,    // or to [..., R / 2]
                                        std::string_view layout,
                                        std::optional<c10::SymInt> rotary_dim,
                                        std::string_view rounding);

}  // namespace composite

namespace kernel {

// The rotation, or with a form that is transposed its gradient, itself differentiable: q and k,
// each an empty tensor where there was none. form: RopeForm, packed. dtype: of the results; none:
// as the form's rounding has it. q_order, k_order: their dimensions from the outermost to the
// innermost; empty: as those of q and k lie.
std::tuple<at::Tensor, at::Tensor> _rope(const OptionalTensor& q,  // [..., D]
                                         const OptionalTensor& k,  // [..., D]
                                         const at::Tensor& cos,    // as rope has it
                                         const at::Tensor& sin, c10::SymInt rotary_dim,
                                         int64_t form, std::optional<at::ScalarType> dtype,
                                         at::IntArrayRef q_order, at::IntArrayRef k_order);

}  // namespace kernel

namespace meta {
decltype(kernel::_rope) _rope;
}  // namespace meta

namespace autograd {
decltype(kernel::_rope) _rope;
}  // namespace autograd

}  // namespace fp8
