// Kernels of the norms. composite: made of the private operators, for real and fake tensors alike.
// kernel: CPU and CUDA. meta: shapes and dtypes only. Contracts are in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "fp8/core_norm.h"

namespace fp8 {

using OptionalTensor = std::optional<at::Tensor>;

// The form of that name; c10::ValueError, in the name of fp8::`op`, if there is none.
core::NormForm norm_form(const char* op, std::string_view name);

// eps where none is given: as F.rms_norm's, which computes in fp32.
double norm_eps(std::optional<double> eps);

// Whether w * T(xhat) has a wider dtype than x: then the product is an operator of its own.
bool scales_wider(core::NormForm form, const at::Tensor& x, const OptionalTensor& weight);

// What the norms refuse.
void check_norm(const char* op, const at::Tensor& x, const OptionalTensor& residual,
                const OptionalTensor& weight, const OptionalTensor& bias);

namespace composite {

at::Tensor rms_norm(const at::Tensor& x,           // [..., K] high precision
                    const OptionalTensor& weight,  // [K] high precision
                    std::optional<double> eps, std::string_view form);
at::Tensor layer_norm(const at::Tensor& x,           // [..., K] high precision
                      const OptionalTensor& weight,  // [K] high precision
                      const OptionalTensor& bias,    // [K] high precision
                      double eps);
// y and the sum, both of x's shape
std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x,           // [..., K]
                                                const at::Tensor& residual,    // x's shape, dtype
                                                const OptionalTensor& weight,  // [K]
                                                std::optional<double> eps, std::string_view form);
// y and x, by which other uses of x reach it: their gradient joins dx in the backward's pass.
// form: a core::NormForm.
std::tuple<at::Tensor, at::Tensor> _norm_and_input(const at::Tensor& x,           // [..., K]
                                                   const OptionalTensor& weight,  // [K]
                                                   const OptionalTensor& bias,    // [K]
                                                   double eps, int64_t form);

}  // namespace composite

namespace kernel {

// y; x + residual, or an empty tensor; mean [M] fp32 of LayerNorm, or an empty one; rstd [M] fp32.
// M: the product of x's leading extents. form: a core::NormForm.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _norm_forward(
    const at::Tensor& x,             // [..., K] high precision
    const OptionalTensor& residual,  // x's shape and dtype
    const OptionalTensor& weight,    // [K] high precision
    const OptionalTensor& bias,      // [K] high precision
    double eps, int64_t form);

// dx in dy's dtype, dweight and dbias in weight's and bias's; empty where not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> _norm_backward(
    const at::Tensor& dy,          // [..., K]
    const at::Tensor& x,           // [..., K], what was normed, in dy's dtype
    const OptionalTensor& mean,    // [M] fp32, of LayerNorm
    const at::Tensor& rstd,        // [M] fp32
    const OptionalTensor& weight,  // [K]
    const OptionalTensor& add,     // [..., K], added to dx
    std::optional<at::ScalarType> bias_dtype, int64_t form, bool needs_dx, bool needs_dweight,
    bool needs_dbias);

}  // namespace kernel

namespace meta {
decltype(kernel::_norm_forward) _norm_forward;
decltype(kernel::_norm_backward) _norm_backward;
}  // namespace meta

namespace autograd {
decltype(composite::rms_norm) rms_norm;
decltype(composite::layer_norm) layer_norm;
decltype(composite::add_rms_norm) add_rms_norm;
decltype(composite::_norm_and_input) _norm_and_input;
decltype(kernel::_norm_backward) _norm_backward;
}  // namespace autograd

}  // namespace fp8
