// fp8::nn::GatedMLP, MLP and RMSNorm against the operators and compositions that they stand for.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <sstream>

#include "fp8/nn_blocks.h"
#include "fp8/ops.h"

namespace {

template <typename T>
std::string text_of(const T& printed) {
  std::ostringstream text;
  text << printed;
  return text.str();
}

torch::Tensor scale(float value) { return torch::full({}, value, torch::kFloat); }

}  // namespace

TEST_CASE("GatedMLP has the values and gradients of its layers one after the other") {
  for (const std::string recipe : {"tensorwise", "rowwise", "delayed"}) {
    for (const bool bias : {false, true}) {
      torch::manual_seed(0);
      fp8::nn::GatedMLP block(fp8::nn::GatedMLPOptions(48, 64).recipe(recipe).bias(bias));
      const auto composed = std::dynamic_pointer_cast<fp8::nn::GatedMLPImpl>(block->clone());
      const torch::Tensor x = torch::randn({3, 5, 48}).requires_grad_();
      const torch::Tensor y = block(x);
      const torch::Tensor expected =
          composed->down_proj(torch::silu(composed->gate_proj(x)) * composed->up_proj(x));
      REQUIRE(torch::equal(y, expected));
      y.sum().backward();
      expected.sum().backward();
      const auto theirs = composed->named_parameters();
      for (const auto& item : block->named_parameters()) {
        REQUIRE(torch::equal(item.value().grad(), theirs[item.key()].grad()));
      }
      REQUIRE(block->gate_proj->history.defined() == (recipe == "delayed"));
    }
  }
}

TEST_CASE("MLP has the values of its layers one after the other, whatever its activation") {
  using Function = torch::Tensor (*)(const torch::Tensor&);
  const std::vector<std::pair<std::string, Function>> activations = {
      {"silu", [](const torch::Tensor& x) { return torch::silu(x); }},
      {"gelu", [](const torch::Tensor& x) { return at::gelu(x); }},
      {"gelu_tanh", [](const torch::Tensor& x) { return at::gelu(x, "tanh"); }},
      {"relu", [](const torch::Tensor& x) { return torch::relu(x); }},
      {"relu_squared", [](const torch::Tensor& x) { return torch::square(torch::relu(x)); }},
  };
  const torch::Tensor x = torch::randn({7, 32});
  for (const auto& [name, function] : activations) {
    fp8::nn::MLP block(fp8::nn::MLPOptions(32, 96).activation(name));
    const torch::Tensor expected = block->fc2(function(block->fc1(x)));
    REQUIRE(torch::equal(block(x), expected));
    block->fc1->set_input_scale(scale(0.01F));  // layer by layer then
    const torch::Tensor clipped = block->fc2(function(block->fc1(x)));
    REQUIRE_FALSE(torch::equal(clipped, expected));
    REQUIRE(torch::equal(block(x), clipped));
  }
}

TEST_CASE("a static scale of any layer of a GatedMLP counts") {
  const torch::Tensor x = torch::randn({7, 32});
  for (const int which : {0, 1, 2}) {
    fp8::nn::GatedMLP block(32, 96);
    fp8::nn::Linear(which == 0   ? block->gate_proj
                    : which == 1 ? block->up_proj
                                 : block->down_proj)
        ->set_input_scale(scale(0.001F));
    const torch::Tensor expected =
        block->down_proj(torch::silu(block->gate_proj(x)) * block->up_proj(x));
    REQUIRE(torch::equal(block(x), expected));
  }
}

TEST_CASE("blocks have the keys of their layers, copies, and a text") {
  const fp8::nn::GatedMLP gated(16, 32);
  REQUIRE(gated->named_parameters().keys() ==
          std::vector<std::string>{"gate_proj.weight", "up_proj.weight", "down_proj.weight"});
  const fp8::nn::MLP plain(16, 32);
  REQUIRE(plain->named_parameters().keys() ==
          std::vector<std::string>{"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"});
  REQUIRE(text_of(plain).find("fp8::nn::MLP(hidden=16, intermediate=32, activation=gelu, "
                              "bias=true, recipe=tensorwise)") == 0);
  std::stringstream archive;
  torch::save(gated, archive);
  fp8::nn::GatedMLP loaded(16, 32);
  torch::load(loaded, archive);
  const torch::Tensor x = torch::randn({2, 16});
  REQUIRE(torch::equal(fp8::nn::GatedMLP(gated)(x), loaded(x)));
}

TEST_CASE("blocks refuse what they do not know") {
  using fp8::nn::GatedMLPOptions;
  REQUIRE_THROWS_AS(fp8::nn::GatedMLP(GatedMLPOptions(16, 32).recipe("int8")), c10::ValueError);
  REQUIRE_THROWS_AS(fp8::nn::GatedMLP(GatedMLPOptions(16, 32).activation("swish")),
                    c10::ValueError);
  REQUIRE_THROWS_AS(fp8::nn::GatedMLP(GatedMLPOptions(16, 32).activation("clamped_silu")),
                    c10::ValueError);
  REQUIRE_THROWS_AS(fp8::nn::RMSNorm(fp8::nn::RMSNormOptions(16).form("l2")), c10::ValueError);
}

TEST_CASE("RMSNorm is rms_norm, and with a residual add_rms_norm") {
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({3, 5, 64}).requires_grad_();
  const torch::Tensor residual = torch::randn({3, 5, 64});
  for (const std::string form : {"scale_then_round", "round_then_scale", "scale_by_one_plus"}) {
    fp8::nn::RMSNorm norm(fp8::nn::RMSNormOptions(64).eps(1e-6).form(form));
    REQUIRE(norm->weight.detach().sum().item<float>() == (form == "scale_by_one_plus" ? 0 : 64));
    const torch::Tensor y = norm(x);
    REQUIRE(torch::equal(y, fp8::rms_norm(x, norm->weight, 1e-6, form)));
    y.sum().backward();
    REQUIRE(norm->weight.grad().defined());
    const auto [normed, total] = norm->add_norm(x, residual);
    REQUIRE(torch::equal(total, x + residual));
    REQUIRE(torch::equal(normed, norm(total)));
  }
  fp8::nn::RMSNorm bare(fp8::nn::RMSNormOptions(64).elementwise_affine(false));
  REQUIRE(bare->parameters().empty());
  REQUIRE(torch::equal(bare(x), fp8::rms_norm(x)));
  REQUIRE(text_of(bare) ==
          "fp8::nn::RMSNorm(64, eps=none, elementwise_affine=false, form=scale_then_round)");
}
