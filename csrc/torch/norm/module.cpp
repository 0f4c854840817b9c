// fp8::nn::RMSNorm (fp8/nn_blocks.h).
#include "fp8/nn_blocks.h"
#include "fp8/ops.h"
#include "torch/norm/norm_ops.h"

namespace fp8::nn {

RMSNormOptions::RMSNormOptions(int64_t features) : features_(features) {}

RMSNormImpl::RMSNormImpl(int64_t features) : RMSNormImpl(RMSNormOptions(features)) {}

RMSNormImpl::RMSNormImpl(const RMSNormOptions& options_) : options(options_) {
  norm_form("nn::RMSNorm", options.form());
  RMSNormImpl::reset();
}

void RMSNormImpl::reset() {
  if (!options.elementwise_affine()) return;
  const bool one_plus = options.form() == "scale_by_one_plus";
  weight = register_parameter(
      "weight", one_plus ? torch::zeros(options.features()) : torch::ones(options.features()));
}

void RMSNormImpl::pretty_print(std::ostream& stream) const {
  stream << "fp8::nn::RMSNorm(" << options.features() << ", eps=";
  if (options.eps()) {
    stream << *options.eps();
  } else {
    stream << "none";
  }
  stream << ", elementwise_affine=" << (options.elementwise_affine() ? "true" : "false")
         << ", form=" << options.form() << ")";
}

torch::Tensor RMSNormImpl::forward(const torch::Tensor& x) {
  return rms_norm(x, weight.defined() ? std::optional(weight) : std::nullopt, options.eps(),
                  options.form());
}

std::tuple<torch::Tensor, torch::Tensor> RMSNormImpl::add_norm(const torch::Tensor& x,
                                                               const torch::Tensor& residual) {
  return add_rms_norm(x, residual, weight.defined() ? std::optional(weight) : std::nullopt,
                      options.eps(), options.form());
}

}  // namespace fp8::nn
