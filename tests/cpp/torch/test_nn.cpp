// fp8::nn::Linear against torch::nn::Linear: same parameters, text, copies and archives; and
// fp8::nn::MergedLinear and FrozenLinear.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <sstream>

#include "fp8/nn.h"
#include "fp8/ops.h"

using fp8::nn::LinearOptions;

TEST_CASE("parameters are torch::nn::Linear's under the same seed") {
  for (const bool bias : {true, false}) {
    torch::manual_seed(3);
    const fp8::nn::Linear ours(LinearOptions(40, 24).bias(bias));
    torch::manual_seed(3);
    const torch::nn::Linear theirs(torch::nn::LinearOptions(40, 24).bias(bias));
    const auto a = ours->named_parameters();
    const auto b = theirs->named_parameters();
    REQUIRE(a.keys() == b.keys());
    REQUIRE(a.keys().size() == (bias ? 2 : 1));
    for (const auto& item : b) REQUIRE(torch::equal(a[item.key()], item.value()));
    REQUIRE(ours->bias.defined() == bias);
  }
}

TEST_CASE("reset_parameters draws new values into the same tensors") {
  fp8::nn::Linear layer(40, 24);
  const torch::Tensor before = layer->weight.detach().clone();
  const torch::Tensor same = layer->weight;
  layer->reset_parameters();
  REQUIRE(same.is_same(layer->weight));
  REQUIRE_FALSE(torch::equal(before, layer->weight));
}

TEST_CASE("forward is fused_linear with the module's recipe") {
  torch::manual_seed(0);
  fp8::nn::Linear layer(LinearOptions(48, 32).recipe("rowwise"));
  const torch::Tensor x = torch::randn({3, 5, 48});
  const torch::Tensor y = layer(x);
  REQUIRE(torch::equal(y, fp8::fused_linear(x, layer->weight, layer->bias, "rowwise")));
  REQUIRE_FALSE(torch::equal(y, fp8::fused_linear(x, layer->weight, layer->bias)));
  layer->options.recipe("rowwise:power_of_two");
  REQUIRE(torch::equal(layer(x),
                       fp8::fused_linear(x, layer->weight, layer->bias, "rowwise:power_of_two")));
  REQUIRE_FALSE(torch::equal(layer(x), y));
  y.sum().backward();
  REQUIRE(layer->weight.grad().sizes() == layer->weight.sizes());
  REQUIRE(torch::allclose(layer->bias.grad(), torch::full({32}, 15.0)));
}

TEST_CASE("pretty_print says what the layer is") {
  std::ostringstream text;
  text << fp8::nn::Linear(LinearOptions(4, 5).bias(false).recipe("rowwise_gw_hp"));
  REQUIRE(text.str() ==
          "fp8::nn::Linear(in_features=4, out_features=5, bias=false, recipe=rowwise_gw_hp)");
}

TEST_CASE("clone copies values and recipe, alone and inside a model") {
  fp8::nn::Linear layer(LinearOptions(16, 16).recipe("rowwise"));
  const auto copy = std::dynamic_pointer_cast<fp8::nn::LinearImpl>(layer->clone());
  REQUIRE(copy != nullptr);
  REQUIRE(copy->options.recipe() == "rowwise");
  REQUIRE(torch::equal(copy->weight, layer->weight));
  REQUIRE_FALSE(copy->weight.is_same(layer->weight));
  REQUIRE(copy->named_parameters()["weight"].is_same(copy->weight));

  torch::nn::Sequential model(layer, torch::nn::ReLU());
  const auto cloned = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  REQUIRE(cloned->ptr<fp8::nn::LinearImpl>(0)->options.recipe() == "rowwise");
  const torch::Tensor x = torch::randn({2, 16});
  REQUIRE(torch::equal(cloned->forward(x), model->forward(x)));
}

TEST_CASE("archives go both ways between the two classes") {
  const torch::nn::Linear theirs(16, 8);
  fp8::nn::Linear ours(16, 8);
  std::stringstream first, second;
  torch::save(theirs, first);
  torch::load(ours, first);
  REQUIRE(torch::equal(ours->weight, theirs->weight));
  REQUIRE(torch::equal(ours->bias, theirs->bias));

  torch::nn::Linear back(16, 8);
  torch::save(ours, second);
  torch::load(back, second);
  REQUIRE(torch::equal(back->weight, ours->weight));
}

TEST_CASE("a dtype and a training mode set on the module hold") {
  fp8::nn::Linear layer(16, 8);
  layer->to(torch::kBFloat16);
  layer->eval();
  REQUIRE(layer(torch::randn({2, 16}).to(torch::kBFloat16)).scalar_type() == torch::kBFloat16);
  REQUIRE_FALSE(layer->is_training());
}

TEST_CASE("a static input scale is a float32 buffer that copies and archives keep") {
  torch::manual_seed(0);
  fp8::nn::Linear layer(32, 16);
  const torch::Tensor x = torch::randn({4, 32});
  const torch::Tensor dynamic = layer(x);
  layer->set_input_scale(torch::tensor({0.5F}));
  layer->set_input_scale(torch::tensor(0.001F));
  const torch::Tensor y = layer(x);
  const auto scale = torch::tensor(0.001F);
  REQUIRE(torch::equal(y, fp8::fused_linear(x, layer->weight, layer->bias, "tensorwise", scale)));
  REQUIRE_FALSE(torch::equal(y, dynamic));
  std::ostringstream text;
  text << layer;
  REQUIRE(text.str().find("input_scale=static") != std::string::npos);

  const auto copy = std::dynamic_pointer_cast<fp8::nn::LinearImpl>(layer->clone());
  REQUIRE_FALSE(copy->input_scale.is_same(layer->input_scale));
  REQUIRE(copy->named_buffers()["input_scale"].is_same(copy->input_scale));
  REQUIRE(torch::equal(copy->forward(x), y));

  std::stringstream archive;
  torch::save(layer, archive);
  fp8::nn::Linear loaded(32, 16);
  loaded->set_input_scale(torch::tensor(1.0F));
  torch::load(loaded, archive);
  REQUIRE(torch::equal(loaded(x), y));

  layer->to(torch::kBFloat16);
  layer->to(torch::kCPU);
  REQUIRE(layer->input_scale.scalar_type() == torch::kFloat);
  REQUIRE(layer->input_scale.item<float>() == 0.001F);
  REQUIRE(layer(x.to(torch::kBFloat16)).scalar_type() == torch::kBFloat16);

  fp8::nn::Linear rowwise(LinearOptions(16, 16).recipe("rowwise"));
  REQUIRE_THROWS_WITH(rowwise->set_input_scale(scale), Catch::Contains("got 'rowwise'"));
  REQUIRE_THROWS_WITH(layer->set_input_scale(torch::ones({2})), Catch::Contains("one float32"));
}

TEST_CASE("a history moves with the layer, and is in no archive") {
  torch::manual_seed(0);
  fp8::nn::Linear layer(LinearOptions(32, 16).recipe("delayed"));
  const torch::Tensor history = fp8::make_history();
  for (int call = 0; call < 20; ++call) {
    const torch::Tensor x = torch::randn({4, 32}) * (1 + call % 3);
    const torch::Tensor y = layer(x);
    REQUIRE(torch::equal(
        y, fp8::fused_linear(x, layer->weight, layer->bias, "delayed", std::nullopt, history)));
    REQUIRE(torch::equal(layer->history, history));
  }
  layer->to(torch::kBFloat16);
  layer->to(torch::kCPU, torch::kFloat);
  REQUIRE(torch::equal(layer->history, history));

  fp8::nn::Linear trained(LinearOptions(32, 16).recipe("delayed"));
  trained->forward(torch::randn({4, 32}));
  REQUIRE(trained->named_buffers().is_empty());
  torch::nn::Linear theirs(32, 16);
  std::stringstream archive;
  torch::save(trained, archive);
  torch::load(theirs, archive);
  REQUIRE(torch::equal(theirs->weight, trained->weight));
  std::stringstream back;
  torch::save(theirs, back);
  fp8::nn::Linear loaded(LinearOptions(32, 16).recipe("delayed"));
  torch::load(loaded, back);
  REQUIRE(torch::equal(loaded->weight, trained->weight));

  const auto copy = std::dynamic_pointer_cast<fp8::nn::LinearImpl>(trained->clone());
  copy->forward(torch::randn({4, 32}));
  REQUIRE_FALSE(copy->history.is_same(trained->history));
  trained->options.recipe("tensorwise");
  REQUIRE_NOTHROW(trained->forward(torch::randn({4, 32})));
}

TEST_CASE("an unknown recipe is refused when the layer is made") {
  for (const char* recipe : {"fp4", "rowwise:", "rowwise:power_of_two:power_of_two"}) {
    REQUIRE_THROWS_AS(fp8::nn::Linear(LinearOptions(4, 4).recipe(recipe)), c10::ValueError);
  }
}

TEST_CASE("the operators are registered") { REQUIRE_NOTHROW(fp8::ensure_registered()); }

TEST_CASE("layers of one input are merged_linear on parameters of their own") {
  torch::manual_seed(0);
  fp8::nn::MergedLinear qkv(fp8::nn::MergedLinearOptions(32, {32, 8, 16}).recipe("rowwise"));
  REQUIRE(qkv->named_parameters().keys() == std::vector<std::string>{"0.weight", "0.bias",
                                                                     "1.weight", "1.bias",
                                                                     "2.weight", "2.bias"});
  const torch::Tensor x = torch::randn({3, 5, 32});
  const std::vector<torch::Tensor> outputs = qkv(x);
  REQUIRE(outputs.size() == 3);
  for (size_t i = 0; i < outputs.size(); ++i) {
    REQUIRE(torch::equal(outputs[i], qkv->layers[i](x)));  // a scale for each row
  }
  (outputs[0].sum() + outputs[2].sum()).backward();
  REQUIRE(qkv->layers[0]->weight.grad().sizes() == qkv->layers[0]->weight.sizes());
  REQUIRE_FALSE(qkv->layers[1]->weight.grad().defined());

  std::ostringstream text;
  qkv->pretty_print(text);
  REQUIRE(text.str() ==
          "fp8::nn::MergedLinear(in_features=32, out_features=[32, 8, 16], bias=true, "
          "recipe=rowwise)");

  const auto copy = std::dynamic_pointer_cast<fp8::nn::MergedLinearImpl>(qkv->clone());
  REQUIRE(torch::equal(copy->forward(x)[1], outputs[1]));
  REQUIRE_THROWS_AS(fp8::nn::MergedLinear(32, std::vector<int64_t>{}), c10::ValueError);
}

TEST_CASE("layers of one input keep one history, and step aside for a static scale") {
  torch::manual_seed(0);
  fp8::nn::MergedLinear layers(fp8::nn::MergedLinearOptions(16, {8, 8}).recipe("delayed"));
  const torch::Tensor x = torch::randn({4, 16});
  layers(x);
  REQUIRE(layers->history.defined());
  REQUIRE_FALSE(layers->layers[0]->history.defined());
  fp8::nn::MergedLinear given(fp8::nn::MergedLinearOptions(16, {8, 8}));
  given->layers[1]->set_input_scale(torch::tensor(0.01F));
  REQUIRE(torch::equal(given(x)[1], given->layers[1](x)));
}

TEST_CASE("a frozen layer has the bits of the layer that it was made of") {
  torch::manual_seed(0);
  for (const char* recipe : {"tensorwise", "rowwise", "blockwise", "rowwise:power_of_two"}) {
    fp8::nn::Linear layer(LinearOptions(200, 144).bias(recipe != std::string("rowwise")));
    layer->options.recipe(recipe);
    fp8::nn::FrozenLinear frozen = fp8::nn::freeze(layer);
    const torch::Tensor x = torch::randn({3, 5, 200}).requires_grad_();
    REQUIRE(torch::equal(frozen(x), layer(x)));
    REQUIRE(frozen->weight.scalar_type() == torch::kFloat8_e4m3fn);
    REQUIRE(frozen->named_parameters().size() == (frozen->bias.defined() ? 1 : 0));
    frozen(x).sum().backward();
    const torch::Tensor exact = torch::ones({15, 144}).mm(layer->weight.detach());
    REQUIRE((x.grad().view({15, 200}) - exact).norm().item<double>() <
            0.05 * exact.norm().item<double>());
  }
}

TEST_CASE("a frozen layer keeps a static scale") {
  fp8::nn::Linear layer(32, 16);
  layer->set_input_scale(torch::tensor(0.01));
  fp8::nn::FrozenLinear frozen = fp8::nn::freeze(layer);
  const torch::Tensor x = torch::randn({4, 32});
  REQUIRE(torch::equal(frozen(x), layer(x)));
  REQUIRE_FALSE(torch::equal(frozen(2 * x), fp8::fused_linear(2 * x, layer->weight, layer->bias)));
}

TEST_CASE("a frozen layer's codes keep their dtype, and go through archives and copies") {
  torch::manual_seed(0);
  fp8::nn::Linear layer(LinearOptions(256, 144).recipe("blockwise"));
  fp8::nn::FrozenLinear frozen = fp8::nn::freeze(layer);
  const torch::Tensor x = torch::randn({4, 256});
  const torch::Tensor y = frozen(x);
  std::stringstream archive;
  torch::save(frozen, archive);
  fp8::nn::FrozenLinear loaded(fp8::nn::FrozenLinearOptions(256, 144).recipe("blockwise"));
  REQUIRE_FALSE(torch::equal(loaded(x), y));
  torch::load(loaded, archive);
  REQUIRE(torch::equal(loaded(x), y));
  const auto copy = std::dynamic_pointer_cast<fp8::nn::FrozenLinearImpl>(frozen->clone());
  REQUIRE(torch::equal(copy->forward(x), y));
  REQUIRE_FALSE(copy->weight.is_same(frozen->weight));
  frozen->to(torch::kBFloat16);
  REQUIRE(frozen->weight.scalar_type() == torch::kFloat8_e4m3fn);
  REQUIRE(frozen->weight_scale.scalar_type() == torch::kFloat);
  REQUIRE(frozen->bias.scalar_type() == torch::kBFloat16);
  REQUIRE(torch::allclose(frozen(x.to(torch::kBFloat16)).to(torch::kFloat), y, 0.05, 0.05));
  frozen->to(torch::Device("cpu"), torch::kFloat);
  REQUIRE(frozen->weight.scalar_type() == torch::kFloat8_e4m3fn);
}

TEST_CASE("a frozen layer says what it is, and refuses what it cannot be") {
  std::ostringstream text;
  text << fp8::nn::FrozenLinear(fp8::nn::FrozenLinearOptions(4, 5).bias(false));
  REQUIRE(text.str() ==
          "fp8::nn::FrozenLinear(in_features=4, out_features=5, bias=false, recipe=rowwise)");
  REQUIRE_THROWS_AS(fp8::nn::FrozenLinear(fp8::nn::FrozenLinearOptions(4, 5).recipe("fp4")),
                    c10::ValueError);
  REQUIRE_THROWS_AS(fp8::nn::FrozenLinear(
                        fp8::nn::FrozenLinearOptions(4, 5).recipe("blockwise").static_input(true)),
                    c10::ValueError);
}
