// AdamW in one fused kernel per step, with the gradient's norm clipped first: what
// torch.optim.AdamW(fused=True) and torch.nn.utils.clip_grad_norm_(foreach=True) call in Python.
// LibTorch's own optimizer makes some ten launches per parameter and rounds in another order.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace demo {

class FusedAdamW {
 public:
  struct Options {
    double beta1 = 0.9, beta2 = 0.95, weight_decay = 0.1, eps = 1e-8;
  };

  FusedAdamW(std::vector<torch::Tensor> parameters, const Options& options)
      : parameters_(std::move(parameters)), options_(options) {
    for (const torch::Tensor& parameter : parameters_) {
      averages_.push_back(torch::zeros_like(parameter));
      squares_.push_back(torch::zeros_like(parameter));
      steps_.push_back(torch::zeros({}, parameter.options().dtype(torch::kFloat)));
    }
  }

  // Scales all gradients so that their common 2-norm is at most `clip_norm`, then updates. Every
  // parameter must have a gradient; it is gone afterwards.
  void step(double learning_rate, double clip_norm) {
    const torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> gradients;
    for (const torch::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
    const torch::Tensor norm =
        torch::linalg_vector_norm(torch::stack(torch::_foreach_norm(gradients, 2.0)), 2.0);
    torch::_foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp_max(1.0));
    torch::_foreach_add_(steps_, 1);
    torch::_fused_adamw_(parameters_, gradients, averages_, squares_, {}, steps_, learning_rate,
                         options_.beta1, options_.beta2, options_.weight_decay, options_.eps,
                         /*amsgrad=*/false, /*maximize=*/false);
    for (torch::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
  }

 private:
  std::vector<torch::Tensor> parameters_, averages_, squares_, steps_;
  Options options_;
};

}  // namespace demo
