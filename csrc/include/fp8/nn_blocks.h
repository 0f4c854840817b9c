// fp8/nn_blocks.h: parts of a transformer's layer as LibTorch modules: fp8::nn::GatedMLP and
// fp8::nn::MLP, one node of the graph each, and fp8::nn::RMSNorm.
//
//   fp8::nn::GatedMLP block(fp8::nn::GatedMLPOptions(4096, 14336).recipe("rowwise"));
//   torch::Tensor y = block(x);  // x [..., 4096] -> y [..., 4096]
#pragma once

#include <fp8/nn.h>

namespace fp8::nn {

struct GatedMLPOptions {
  GatedMLPOptions(int64_t hidden, int64_t intermediate);
  TORCH_ARG(int64_t, hidden);        // features of x and y
  TORCH_ARG(int64_t, intermediate);  // features between the products
  TORCH_ARG(std::string, activation) = "silu";
  TORCH_ARG(bool, bias) = false;  // of all layers
  TORCH_ARG(std::string, recipe) = "tensorwise";
  TORCH_ARG(std::string, save) = "bf16";  // activation and save: see fp8::mlp
};

// y = down_proj(act(gate_proj(x)) * up_proj(x)) by one fp8::mlp. Its layers are fp8::nn::Linear,
// with parameters and archive keys of their own. Layer by layer, with the same values, where one of
// them has a static input scale.
class GatedMLPImpl : public torch::nn::Cloneable<GatedMLPImpl> {
 public:
  GatedMLPImpl(int64_t hidden, int64_t intermediate);
  // Throws c10::ValueError for an unknown recipe, or an activation that is unknown or clamped.
  explicit GatedMLPImpl(const GatedMLPOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // x [..., hidden] -> y [..., hidden]; see fp8::mlp for values, gradients and errors.
  torch::Tensor forward(const torch::Tensor& x);

  GatedMLPOptions options;
  Linear gate_proj = nullptr;
  Linear up_proj = nullptr;
  Linear down_proj = nullptr;
};

TORCH_MODULE(GatedMLP);

struct MLPOptions {
  MLPOptions(int64_t hidden, int64_t intermediate);
  TORCH_ARG(int64_t, hidden);
  TORCH_ARG(int64_t, intermediate);
  TORCH_ARG(std::string, activation) = "gelu";
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::string, recipe) = "tensorwise";
  TORCH_ARG(std::string, save) = "bf16";
};

// y = fc2(act(fc1(x))); the rest as GatedMLP has it.
class MLPImpl : public torch::nn::Cloneable<MLPImpl> {
 public:
  MLPImpl(int64_t hidden, int64_t intermediate);
  explicit MLPImpl(const MLPOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  MLPOptions options;
  Linear fc1 = nullptr;
  Linear fc2 = nullptr;
};

TORCH_MODULE(MLP);

struct RMSNormOptions {
  explicit RMSNormOptions(int64_t features);
  TORCH_ARG(int64_t, features);                          // of a row
  TORCH_ARG(std::optional<double>, eps) = std::nullopt;  // none: 2^-23
  TORCH_ARG(bool, elementwise_affine) = true;
  TORCH_ARG(std::string, form) = "scale_then_round";  // see fp8::rms_norm
};

// y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, forward and backward one pass
// each. The weight begins as ones; of the form "scale_by_one_plus" as zeros.
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(int64_t features);
  // Throws c10::ValueError for an unknown form.
  explicit RMSNormImpl(const RMSNormOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // x [..., features] -> y of its shape and dtype, see fp8::rms_norm.
  torch::Tensor forward(const torch::Tensor& x);
  // The norm of total = x + residual, and total; both gradients in one pass: fp8::add_rms_norm.
  std::tuple<torch::Tensor, torch::Tensor> add_norm(const torch::Tensor& x,
                                                    const torch::Tensor& residual);

  RMSNormOptions options;
  torch::Tensor weight;  // [features]; undefined without elementwise_affine
};

TORCH_MODULE(RMSNorm);

}  // namespace fp8::nn
