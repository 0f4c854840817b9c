// Autocast: inside torch.autocast, fused_linear takes x, weight and bias in the autocast dtype, as
// F.linear does.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "fp8/ops.h"

namespace fp8::autocast {
namespace {

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  return fp8::fused_linear(at::autocast::cached_cast(dtype, x, kDevice),
                           at::autocast::cached_cast(dtype, weight, kDevice),
                           at::autocast::cached_cast(dtype, bias, kDevice), recipe);
}

}  // namespace
}  // namespace fp8::autocast

TORCH_LIBRARY_IMPL(fp8, AutocastCUDA, m) {
  m.impl("fused_linear",
         TORCH_FN((fp8::autocast::fused_linear<at::kCUDA, c10::DispatchKey::AutocastCUDA>)));
}

TORCH_LIBRARY_IMPL(fp8, AutocastCPU, m) {
  m.impl("fused_linear",
         TORCH_FN((fp8::autocast::fused_linear<at::kCPU, c10::DispatchKey::AutocastCPU>)));
}
