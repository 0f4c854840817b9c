// The demo's model, as in examples/byte_model.py: a small transformer over bytes with RMSNorm,
// rotary attention and SwiGLU. The linears of its blocks are fp8::nn::Linear and its norms
// fp8::rms_norm, as fp8.convert makes them, or torch's where the recipe is empty; names and initial
// values are those of the Python model under the same seed.
#pragma once

#include <fp8/nn.h>
#include <fp8/ops.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace demo {

struct ModelSize {
  int64_t width, hidden, layers, heads;
  int64_t vocabulary = 256;
};

inline torch::nn::AnyModule linear(int64_t in, int64_t out, const std::string& recipe) {
  if (recipe.empty()) {
    return torch::nn::AnyModule(torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false)));
  }
  return torch::nn::AnyModule(
      fp8::nn::Linear(fp8::nn::LinearOptions(in, out).bias(false).recipe(recipe)));
}

// cos and sin, [2, length, head_width / 2].
inline torch::Tensor rotary_tables(int64_t length, int64_t head_width, torch::Device device) {
  const torch::Tensor frequency =
      torch::pow(10'000.0, -torch::arange(0, head_width, 2, device).to(torch::kFloat) / head_width);
  const torch::Tensor angle =
      torch::arange(length, device).to(torch::kFloat).unsqueeze(1) * frequency;
  return torch::stack({angle.cos(), angle.sin()});
}

inline torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& tables) {
  const torch::Tensor cast = tables.to(x.scalar_type());
  const auto halves = x.chunk(2, -1);
  return torch::cat(
      {halves[0] * cast[0] - halves[1] * cast[1], halves[1] * cast[0] + halves[0] * cast[1]}, -1);
}

struct NormImpl : torch::nn::Module {
  torch::Tensor weight;
  bool fused;
  NormImpl(int64_t width, const std::string& recipe) : fused(!recipe.empty()) {
    weight = register_parameter("weight", torch::ones({width}));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return fused ? fp8::rms_norm(x, weight) : torch::rms_norm(x, weight.sizes(), weight);
  }
};
TORCH_MODULE(Norm);

struct AttentionImpl : torch::nn::Module {
  int64_t heads;
  torch::nn::AnyModule q, k, v, o;

  AttentionImpl(const ModelSize& size, const std::string& recipe) : heads(size.heads) {
    const auto make = [&](const char* name) {
      torch::nn::AnyModule module = linear(size.width, size.width, recipe);
      register_module(name, module.ptr());
      return module;
    };
    q = make("q_proj");
    k = make("k_proj");
    v = make("v_proj");
    o = make("o_proj");
  }

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& tables) {
    const auto project = [&](torch::nn::AnyModule& module) {
      return module.forward(x).unflatten(-1, {heads, -1}).transpose(1, 2);
    };
    const torch::Tensor queries = project(q), keys = project(k), values = project(v);
    const torch::Tensor rotated_queries = rotate(queries, tables);
    const torch::Tensor rotated_keys = rotate(keys, tables);
    const torch::Tensor y = torch::scaled_dot_product_attention(
        rotated_queries, rotated_keys, values, {}, 0.0, /*is_causal=*/true);
    return o.forward(y.transpose(1, 2).flatten(-2));
  }
};
TORCH_MODULE(Attention);

struct MlpImpl : torch::nn::Module {
  torch::nn::AnyModule gate, up, down;

  MlpImpl(const ModelSize& size, const std::string& recipe)
      : gate(linear(size.width, size.hidden, recipe)),
        up(linear(size.width, size.hidden, recipe)),
        down(linear(size.hidden, size.width, recipe)) {
    register_module("gate_proj", gate.ptr());
    register_module("up_proj", up.ptr());
    register_module("down_proj", down.ptr());
  }

  torch::Tensor forward(const torch::Tensor& x) {
    // In this order, as Python does: the operands of * may be evaluated in either.
    const torch::Tensor activated = torch::silu(gate.forward(x));
    return down.forward(activated * up.forward(x));
  }
};
TORCH_MODULE(Mlp);

struct BlockImpl : torch::nn::Module {
  Norm attention_norm{nullptr}, mlp_norm{nullptr};
  Attention attention{nullptr};
  Mlp mlp{nullptr};

  BlockImpl(const ModelSize& size, const std::string& recipe) {
    attention_norm = register_module("attention_norm", Norm(size.width, recipe));
    attention = register_module("attention", Attention(size, recipe));
    mlp_norm = register_module("mlp_norm", Norm(size.width, recipe));
    mlp = register_module("mlp", Mlp(size, recipe));
  }

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& tables) {
    const torch::Tensor y = x + attention(attention_norm(x), tables);
    return y + mlp(mlp_norm(y));
  }
};
TORCH_MODULE(Block);

// Token ids [batch, length] int64 to logits [batch, length, vocabulary].
struct ByteModelImpl : torch::nn::Module {
  ModelSize size;
  torch::nn::Embedding embedding{nullptr};
  torch::nn::ModuleList blocks;
  Norm norm{nullptr};
  torch::nn::Linear lm_head{nullptr};  // stays in high precision

  ByteModelImpl(const ModelSize& size_, const std::string& recipe) : size(size_) {
    embedding = register_module("embedding", torch::nn::Embedding(size.vocabulary, size.width));
    register_module("blocks", blocks);
    for (int64_t i = 0; i < size.layers; ++i) blocks->push_back(Block(size, recipe));
    norm = register_module("norm", Norm(size.width, recipe));
    lm_head = register_module(
        "lm_head",
        torch::nn::Linear(torch::nn::LinearOptions(size.width, size.vocabulary).bias(false)));
    initialize();
  }

  void initialize() {
    const torch::NoGradGuard no_grad;
    for (auto& item : named_parameters()) {
      if (!item.key().ends_with("proj.weight") && item.key() != "lm_head.weight") continue;
      const bool residual =
          item.key().ends_with("o_proj.weight") || item.key().ends_with("down_proj.weight");
      const int64_t terms = residual ? 2 * size.layers : 1;
      const auto inputs = static_cast<double>(item.value().size(1) * terms);
      torch::nn::init::normal_(item.value(), 0.0, 1 / std::sqrt(inputs));
    }
    torch::nn::init::normal_(embedding->weight);
    lm_head->weight.mul_(0.1);
  }

  torch::Tensor forward(const torch::Tensor& tokens) {
    const torch::Tensor tables =
        rotary_tables(tokens.size(1), size.width / size.heads, tokens.device());
    torch::Tensor x = embedding(tokens);
    for (const auto& block : *blocks) x = block->as<Block>()->forward(x, tables);
    return lm_head(norm(x));
  }
};
TORCH_MODULE(ByteModel);

}  // namespace demo
