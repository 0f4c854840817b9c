// fp8::nn::Linear (fp8/nn.h). Parameters are made and filled as in torch::nn::Linear, in the same
// order of random numbers.
#include <torch/nn/init.h>

#include <cmath>

#include "fp8/nn.h"
#include "fp8/ops.h"
#include "linear/recipe.h"

namespace fp8::nn {

LinearOptions::LinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features)
    : LinearImpl(LinearOptions(in_features, out_features)) {}

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) {
  recipe_id(options.recipe());
  LinearImpl::reset();
}

void LinearImpl::reset() {
  weight =
      register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_features()}))
                        : register_parameter("bias", {}, /*requires_grad=*/false);
  reset_parameters();
}

void LinearImpl::reset_parameters() {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
  if (!bias.defined()) return;
  const double bound = 1 / std::sqrt(static_cast<double>(options.in_features()));
  torch::nn::init::uniform_(bias, -bound, bound);
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "fp8::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features()
         << ", bias=" << (options.bias() ? "true" : "false") << ", recipe=" << options.recipe()
         << ")";
}

torch::Tensor LinearImpl::forward(const torch::Tensor& input) {
  return fused_linear(input, weight,
                      bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt,
                      options.recipe());
}

}  // namespace fp8::nn
