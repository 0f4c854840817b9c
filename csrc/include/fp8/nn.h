// fp8/nn.h: fp8::nn::Linear, a LibTorch module like torch::nn::Linear whose products run in FP8;
// fp8::nn::MergedLinear, several of one input; and fp8::nn::FrozenLinear, whose weight is FP8.
//
//   fp8::nn::Linear layer(fp8::nn::LinearOptions(4096, 14336).bias(false).recipe("rowwise"));
//   torch::Tensor y = layer(x);  // x [..., 4096] -> y [..., 14336]
//
// Parameters have torch::nn::Linear's names, shapes and initial values (the same ones under the
// same seed), so an archive that torch::save wrote of one loads into the other. The recipe is no
// part of an archive; a static input scale is, where one is set.
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace fp8::nn {

struct LinearOptions {
  LinearOptions(int64_t in_features, int64_t out_features);
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  // A recipe as fp8::fused_linear takes it: "tensorwise", "rowwise:power_of_two", ...
  TORCH_ARG(std::string, recipe) = "tensorwise";
};

class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features);
  // Throws c10::ValueError for an unknown recipe.
  explicit LinearImpl(const LinearOptions& options_);

  // Makes the parameters anew and fills them; reset_parameters only fills them: both uniform
  // within 1 / sqrt(in_features).
  void reset() override;
  void reset_parameters();

  // fp8::nn::Linear(in_features=4096, out_features=14336, bias=false, recipe=rowwise)
  void pretty_print(std::ostream& stream) const override;

  // From now on static scaling of the input with this scale, one float32 element; see
  // fp8::fused_linear. The layer keeps a copy as the buffer "input_scale", in float32 also where
  // the module's dtype changes; a second call overwrites it. torch::load reads it into a layer that
  // has one, whatever its value. Throws c10::ValueError for a recipe that is not tensorwise.
  void set_input_scale(const torch::Tensor& scale);

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  // input [..., in_features] bf16, fp16 or fp32, of the parameters' dtype -> [..., out_features].
  // One fp8::fused_linear: see there for values, gradients and errors.
  torch::Tensor forward(const torch::Tensor& input);

  // The history that the next call takes and moves on, with the recipe "delayed"; none with others.
  std::optional<torch::Tensor> current_history();

  LinearOptions options;
  torch::Tensor weight;       // [out_features, in_features]
  torch::Tensor bias;         // [out_features]; undefined without a bias
  torch::Tensor input_scale;  // []; undefined where the input is scaled dynamically
  // [3, ..] int32, fp8::make_history: with the recipe "delayed", made where it is needed. No
  // buffer: an archive has none, and a clone begins anew.
  torch::Tensor history;

 private:
  void keep_float32(const torch::Tensor& scale);
  void move_history(torch::Device device, bool non_blocking);
};

// fp8::nn::Linear: a shared pointer to the module, as all of LibTorch's.
TORCH_MODULE(Linear);

struct MergedLinearOptions {
  MergedLinearOptions(int64_t in_features, std::vector<int64_t> out_features);
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(std::vector<int64_t>, out_features);  // of each layer
  TORCH_ARG(bool, bias) = true;                   // of all of them
  TORCH_ARG(std::string, recipe) = "tensorwise";
};

// Layers that read one input, computed by one fp8::merged_linear; each an fp8::nn::Linear with
// parameters of its own, under the names "0", "1", ...
//
//   fp8::nn::MergedLinear qkv(fp8::nn::MergedLinearOptions(4096, {4096, 1024, 1024}).bias(false));
//   std::vector<torch::Tensor> outputs = qkv(x);  // x [..., 4096] -> [..., 4096], [..., 1024], ..
class MergedLinearImpl : public torch::nn::Cloneable<MergedLinearImpl> {
 public:
  MergedLinearImpl(int64_t in_features, std::vector<int64_t> out_features);
  // Throws c10::ValueError for an unknown recipe, or no layers.
  explicit MergedLinearImpl(const MergedLinearOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // See fp8::merged_linear. One by one where a layer has a static input scale.
  std::vector<torch::Tensor> forward(const torch::Tensor& input);

  MergedLinearOptions options;
  std::vector<Linear> layers;
  torch::Tensor history;  // of all of them, as a layer's
};

TORCH_MODULE(MergedLinear);

struct FrozenLinearOptions {
  FrozenLinearOptions(int64_t in_features, int64_t out_features);
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  // A recipe's: what of the weight, and of the input, shares a scale. "rowwise", "tensorwise",
  // "blockwise", with ":power_of_two" or not. "delayed" is "tensorwise".
  TORCH_ARG(std::string, recipe) = "rowwise";
  TORCH_ARG(bool, static_input) = false;  // the input has a static scale; not with blocks
  TORCH_ARG(bool, decode) = true;         // few rows by a kernel of their own, see linear_frozen
};

// A layer whose weight is FP8 and takes half the memory; for inference, and as the base of layers
// that are trained beside it. With decode(false), as freeze() makes it, it has the bits of the
// fp8::nn::Linear that it was made of. Gradients of the input and the bias. Codes and scales are
// buffers: no optimizer sees them.
//
//   fp8::nn::FrozenLinear frozen = fp8::nn::freeze(layer);
class FrozenLinearImpl : public torch::nn::Cloneable<FrozenLinearImpl> {
 public:
  FrozenLinearImpl(int64_t in_features, int64_t out_features);
  // Codes of zero, to be loaded. Throws c10::ValueError for an unknown recipe.
  explicit FrozenLinearImpl(const FrozenLinearOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // Codes stay e4m3 and scales float32, whatever the dtype: it is the bias's.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  // input [..., in_features] bf16, fp16 or fp32, of the bias's dtype -> [..., out_features]. One
  // fp8::linear_frozen.
  torch::Tensor forward(const torch::Tensor& input);

  FrozenLinearOptions options;
  torch::Tensor weight;        // [out_features, in_features] e4m3
  torch::Tensor weight_scale;  // float32: [], [out_features, 1] or a grid of 128x128 blocks
  torch::Tensor bias;          // [out_features]; undefined without one
  torch::Tensor input_scale;   // []; undefined where the input is scaled dynamically

 private:
  void to_all(std::optional<torch::Device> device, std::optional<torch::Dtype> dtype,
              bool non_blocking);
};

TORCH_MODULE(FrozenLinear);

// The layer with its weight quantized as its recipe says, and its bias; its static input scale, if
// it has one. A copy: the layer stays as it is. Its bits, with decode(false); few rows are faster
// with `frozen->options.decode(true)`.
FrozenLinear freeze(const Linear& layer);

}  // namespace fp8::nn
