// Small things that every op of the torch layer needs: dtypes, extents, checks, flattening.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymInt.h>

#include "fp8/core.h"
#include "host/launch.h"
#include "torch/common/messages.h"

namespace fp8 {

inline bool is_high_precision(at::ScalarType dtype) {
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat;
}

inline bool is_fp8(at::ScalarType dtype) {
  return dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2;
}

inline core::Dtype to_core(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return core::Dtype::kFloat32;
    case at::kBFloat16:
      return core::Dtype::kBFloat16;
    case at::kHalf:
      return core::Dtype::kFloat16;
    case at::kFloat8_e4m3fn:
      return core::Dtype::kE4M3;
    case at::kFloat8_e5m2:
      return core::Dtype::kE5M2;
    default:
      FP8_CHECK_TYPE(false, "fp8: unexpected dtype ", dtype);
  }
}

// at::empty on like's device, a CPU or the current GPU, past the dispatcher: a linear layer's step
// makes about twenty tensors, and those that are not returned concern nobody else.
inline at::Tensor empty_on(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (like.is_cuda()) {
    return at::detail::empty_generic(sizes, at::detail::getCUDAHooks().getCUDADeviceAllocator(),
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype,
                                     std::nullopt);
  }
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, std::nullopt);
}

// Takes the place of a result that nobody asked for: an operator's results are tensors.
inline at::Tensor none_like(const at::Tensor& x) {
  return x.is_meta() ? at::empty({0}, x.options()) : empty_on(x, {0}, x.scalar_type());
}

inline at::Tensor or_none(const at::Tensor& t, const at::Tensor& like) {
  return t.defined() ? t : none_like(like);
}

inline bool on_16_bytes(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Extents of padded buffers; template so that symbolic extents pad too.
template <typename Int>
Int pad16(const Int& extent) {
  return (extent + (core::kPad - 1)) / core::kPad * core::kPad;
}

#define FP8_CHECK_HIGH_PRECISION(op, name, tensor)                                             \
  FP8_CHECK_TYPE(::fp8::is_high_precision((tensor).scalar_type()), "fp8::", op, ": expected ", \
                 name, " in bfloat16, float16 or float32, got ", (tensor).scalar_type())

#define FP8_CHECK_FP8(op, name, tensor)                                                   \
  FP8_CHECK_TYPE(::fp8::is_fp8((tensor).scalar_type()), "fp8::", op, ": expected ", name, \
                 " in float8_e4m3fn or float8_e5m2, got ", (tensor).scalar_type())

#define FP8_CHECK_SAME_DEVICE(op, name, tensor, other_name, other)                         \
  FP8_CHECK_VALUE((tensor).device() == (other).device(), "fp8::", op, ": expected ", name, \
                  " on the device of ", other_name, ", ", (other).device(), ", got ",      \
                  (tensor).device())

// Whether as_matrix(x) is x.
inline bool is_matrix(const at::Tensor& x) {
  return x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1);
}

// x seen as [product of leading dimensions, last dimension] with contiguous columns: a view where
// strides allow it, else a copy.
inline at::Tensor as_matrix(const at::Tensor& x) {
  const int64_t cols = x.size(-1);
  if (is_matrix(x)) return x;
  const int64_t rows =
      x.numel() == 0 ? c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)) : x.numel() / cols;
  const at::Tensor matrix = x.reshape({rows, cols});
  return matrix.stride(1) == 1 || cols == 1 ? matrix : matrix.contiguous();
}

// Whether a stack of matrices [groups, rows, cols] is stored as [groups, cols, rows].
inline bool is_stored_transposed(const at::Tensor& stack) {
  return !stack.is_contiguous() && stack.transpose(1, 2).is_contiguous();
}

// Elements between rows of a matrix from as_matrix. One row has no stride to speak of.
inline int64_t leading_dim(const at::Tensor& matrix) {
  return matrix.size(0) == 1 ? matrix.size(1) : matrix.stride(0);
}

// Strides of a tensor of these sizes whose rows (last dimension) are padded to 16 elements.
template <typename Int>
std::vector<Int> padded_strides(c10::ArrayRef<Int> sizes) {
  std::vector<Int> strides(sizes.size(), Int(1));
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; --i) {
    const bool last = i == static_cast<int64_t>(sizes.size()) - 2;
    const Int extent = last ? pad16(sizes[i + 1]) : sizes[i + 1];
    strides[i] = strides[i + 1] * std::max(extent, Int(1));
  }
  return strides;
}

}  // namespace fp8
