// The operators from C++ without Python: values, gradients, autocast, errors.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <array>
#include <catch2/catch.hpp>

#include "fp8/ops.h"

namespace {

double sqnr(const at::Tensor& exact, const at::Tensor& approximate) {
  const at::Tensor reference = exact.to(at::kDouble);
  const at::Tensor noise = approximate.to(at::kDouble) - reference;
  return 20 * std::log10(reference.norm().item<double>() / noise.norm().item<double>());
}

struct Problem {
  at::Tensor x, weight, bias;
  Problem() {
    at::manual_seed(0);
    x = at::randn({3, 33, 80}).requires_grad_();
    weight = at::randn({48, 80}).requires_grad_();
    bias = at::randn({48}).requires_grad_();
  }
};

}  // namespace

TEST_CASE("fused_linear and its gradients follow the exact ones") {
  for (const char* recipe : {"tensorwise", "rowwise", "rowwise_gw_hp", "blockwise"}) {
    Problem p;
    const at::Tensor y = fp8::fused_linear(p.x, p.weight, p.bias, recipe);
    const at::Tensor dy = at::randn_like(y);
    y.backward(dy);
    const at::Tensor x = p.x.detach().flatten(0, 1);
    const at::Tensor w = p.weight.detach();
    const at::Tensor g = dy.flatten(0, 1);
    INFO(recipe);
    REQUIRE(sqnr(at::linear(p.x.detach(), w, p.bias.detach()), y.detach()) > 25);
    REQUIRE(sqnr(g.mm(w).view_as(p.x), p.x.grad()) > 21);
    REQUIRE(sqnr(g.t().mm(x), p.weight.grad()) > 21);
    REQUIRE(at::allclose(g.sum(0), p.bias.grad(), 1e-5, 1e-5));
  }
}

TEST_CASE("norms and their gradients follow torch's") {
  at::manual_seed(0);
  const at::Tensor x = at::randn({3, 33, 80}).requires_grad_();
  const at::Tensor residual = at::randn({3, 33, 80});
  const at::Tensor weight = at::randn({80}).requires_grad_();
  const at::Tensor bias = at::randn({80}).requires_grad_();
  const at::Tensor dy = at::randn({3, 33, 80});
  const auto gradients = [&](const at::Tensor& y) {
    y.backward(dy);
    std::vector<at::Tensor> made;
    for (const at::Tensor& t : {x, weight, bias}) {
      made.push_back(t.grad().defined() ? t.grad() : at::zeros({1}));
      t.mutable_grad().reset();
    }
    return made;
  };
  const auto check = [&](const at::Tensor& ours, const at::Tensor& theirs) {
    REQUIRE(at::allclose(ours, theirs, 1e-5, 1e-5));
    const auto a = gradients(ours);
    const auto b = gradients(theirs);
    for (size_t i = 0; i < a.size(); ++i) REQUIRE(at::allclose(a[i], b[i], 1e-4, 1e-4));
  };
  check(fp8::rms_norm(x, weight, 1e-6), at::rms_norm(x, {80}, weight, 1e-6));
  check(fp8::rms_norm(x, weight, 1e-6, "scale_by_one_plus"),
        at::rms_norm(x, {80}, weight + 1, 1e-6));
  check(fp8::layer_norm(x, weight, bias, 1e-6), at::layer_norm(x, {80}, weight, bias, 1e-6));
  const auto [y, sum] = fp8::add_rms_norm(x, residual, weight, 1e-6);
  REQUIRE(at::equal(sum, x + residual));
  check(y + sum, at::rms_norm(x + residual, {80}, weight, 1e-6) + (x + residual));
  REQUIRE_THROWS_WITH(fp8::rms_norm(x, bias.slice(0, 1)),
                      Catch::Contains("fp8::rms_norm: expected weight of shape [K] = [80]"));
}

TEST_CASE("rope has the bits of its formula") {
  at::manual_seed(1);
  const at::Tensor q = at::randn({2, 5, 4, 32}).transpose(1, 2).requires_grad_();
  const at::Tensor k = at::randn({2, 5, 1, 32}).transpose(1, 2).requires_grad_();
  const at::Tensor cos = at::randn({5, 32});
  const at::Tensor sin = at::randn({5, 32});
  const auto eager = [&](const at::Tensor& x) {
    const std::vector<at::Tensor> halves = x.chunk(2, -1);
    return x * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
  };
  const auto [q_rotated, k_rotated] = fp8::rope(q, k, cos, sin);
  REQUIRE(at::equal(q_rotated, eager(q)));
  REQUIRE(at::equal(k_rotated, eager(k)));
  REQUIRE(q_rotated.strides() == q.strides());
  const at::Tensor dq = at::randn({2, 4, 5, 32});
  q_rotated.backward(dq);
  const at::Tensor grad = q.grad().clone();
  q.mutable_grad().reset();
  eager(q).backward(dq);
  REQUIRE(at::equal(grad, q.grad()));
  const auto [alone, none] =
      fp8::rope(q, std::nullopt, cos.narrow(1, 0, 8), sin.narrow(1, 0, 8), "interleaved", 16);
  REQUIRE(none.numel() == 0);
  REQUIRE(at::equal(alone.narrow(3, 16, 16), q.narrow(3, 16, 16)));
  REQUIRE_THROWS_WITH(fp8::rope(q, k, cos, sin, "pairs"),
                      Catch::Contains("fp8::rope: expected layout 'halves'"));
}

TEST_CASE("fused_linear_into adds the weight gradient to a buffer") {
  for (const char* recipe : {"tensorwise", "rowwise", "rowwise_gw_hp", "blockwise"}) {
    Problem p;
    const at::Tensor dy = at::randn({3, 33, 48});
    fp8::fused_linear(p.x, p.weight, p.bias, recipe).backward(dy);
    const at::Tensor expected = p.weight.grad();
    p.weight.mutable_grad().reset();
    const at::Tensor buffer = at::ones({48, 80});
    for (const bool overwrite : {false, false, true}) {
      fp8::fused_linear_into(p.x, p.weight, p.bias, recipe, buffer, overwrite).backward(dy);
    }
    INFO(recipe);
    REQUIRE(at::allclose(buffer, expected, 1e-4, 1e-4));
    fp8::fused_linear_into(p.x, p.weight, p.bias, recipe, buffer).backward(dy);
    REQUIRE(at::allclose(buffer, 2 * expected, 1e-4, 1e-4));
    REQUIRE(!p.weight.grad().defined());
  }
  Problem p;
  REQUIRE_THROWS_WITH(fp8::fused_linear_into(p.x, p.weight, p.bias, "rowwise", at::ones({80, 48})),
                      Catch::Contains("expected main_grad of weight's shape [48, 80]"));
}

TEST_CASE("the ops compose to fused_linear's forward") {
  Problem p;
  const at::NoGradGuard no_grad;
  const at::Tensor x = p.x.flatten(0, 1);
  const auto [x_data, x_scale] = fp8::quantize_rowwise(x);
  const auto [w_data, w_scale] = fp8::quantize_rowwise(p.weight);
  const at::Tensor y = fp8::scaled_mm(x_data, w_data, x_scale, w_scale, p.bias, at::kFloat);
  REQUIRE(at::equal(y.view({3, 33, 48}), fp8::fused_linear(p.x, p.weight, p.bias, "rowwise")));
  REQUIRE(at::allclose(fp8::dequantize(x_data, x_scale, at::kFloat), x, 0.07, 0.01));

  at::Tensor twice = y.clone() - p.bias;
  const at::Tensor once = twice.clone();
  fp8::scaled_mm_accumulate_(twice, x_data, w_data, x_scale, w_scale);
  REQUIRE(at::allclose(twice, 2 * once, 1e-4, 1e-4));
}

TEST_CASE("power_of_two gives scales that are powers of two, in operators and recipes") {
  Problem p;
  const at::NoGradGuard no_grad;
  const at::Tensor x = p.x.flatten(0, 1);
  const auto [x_data, x_scale] = fp8::quantize_rowwise(x, at::kFloat8_e4m3fn, true);
  const auto [w_data, w_scale] = fp8::quantize_rowwise(p.weight, at::kFloat8_e4m3fn, true);
  REQUIRE(at::equal(std::get<0>(at::frexp(x_scale)), at::full_like(x_scale, 0.5)));
  const at::Tensor y = fp8::scaled_mm(x_data, w_data, x_scale, w_scale, p.bias, at::kFloat);
  REQUIRE(at::equal(y.view({3, 33, 48}),
                    fp8::fused_linear(p.x, p.weight, p.bias, "rowwise:power_of_two")));
  const at::Tensor scale = std::get<1>(
      fp8::quantize_tensorwise(x, at::kFloat8_e5m2, std::nullopt, /*power_of_two=*/true));
  REQUIRE(std::get<0>(at::frexp(scale)).item<float>() == 0.5F);
  REQUIRE_THROWS_AS(fp8::quantize_tensorwise(x, at::kFloat8_e4m3fn, scale, true), c10::ValueError);
}

TEST_CASE("fused_linear with an input scale is the product of a static quantization") {
  Problem p;
  const at::Tensor scale = at::full({}, 0.01F);
  const at::Tensor y = fp8::fused_linear(p.x, p.weight, p.bias, "tensorwise", scale);
  const at::Tensor x = p.x.detach().flatten(0, 1);
  const auto [x_data, x_scale] = fp8::quantize_tensorwise(x, at::kFloat8_e4m3fn, scale);
  const auto [w_data, w_scale] = fp8::quantize_tensorwise(p.weight.detach());
  REQUIRE(at::equal(y.detach().view({99, 48}),
                    fp8::scaled_mm(x_data, w_data, x_scale, w_scale, p.bias.detach(), at::kFloat)));
  y.sum().backward();
  REQUIRE(p.weight.grad().defined());
  const at::Tensor buffer = at::zeros({48, 80});
  const at::Tensor same =
      fp8::fused_linear_into(p.x, p.weight, p.bias, "tensorwise", buffer, false, scale);
  REQUIRE(at::equal(same, y));
  same.sum().backward();
  REQUIRE(at::allclose(buffer, p.weight.grad(), 1e-6, 1e-6));
  REQUIRE_THROWS_WITH(fp8::fused_linear(p.x, p.weight, p.bias, "rowwise", scale),
                      Catch::Contains("expected a recipe of one scale per tensor"));
}

TEST_CASE("the ops compose to fused_linear's forward, in blocks") {
  Problem p;
  const at::NoGradGuard no_grad;
  const at::Tensor x = p.x.flatten(0, 1);
  const auto [x_data, x_data_t, x_scale, x_scale_t] = fp8::quantize_blockwise_1x128_transpose(x);
  const auto [w_data, w_data_t, w_scale, w_scale_t] =
      fp8::quantize_blockwise_128x128_transpose(p.weight);
  REQUIRE(x_scale_t.sizes() == at::IntArrayRef({80, 1}));
  REQUIRE(w_scale.sizes() == at::IntArrayRef({1, 1}));
  const at::Tensor y = fp8::scaled_mm(x_data, w_data, x_scale, w_scale, p.bias, at::kFloat);
  REQUIRE(at::equal(y.view({3, 33, 48}), fp8::fused_linear(p.x, p.weight, p.bias, "blockwise")));
  REQUIRE(at::equal(fp8::dequantize(w_data, w_scale).t(), fp8::dequantize(w_data_t, w_scale_t)));
  REQUIRE(at::equal(x_scale, std::get<1>(fp8::quantize_blockwise_1x128(x))));
  REQUIRE(at::equal(w_scale, std::get<1>(fp8::quantize_blockwise_128x128(p.weight))));
}

TEST_CASE("power_of_two gives scales that are powers of two in blocks") {
  Problem p;
  const at::NoGradGuard no_grad;
  const at::Tensor x = p.x.flatten(0, 1);
  const auto e4m3 = at::kFloat8_e4m3fn;
  const auto [x_data, x_data_t, x_scale, x_scale_t] =
      fp8::quantize_blockwise_1x128_transpose(x, e4m3, true);
  const auto [w_data, w_data_t, w_scale, w_scale_t] =
      fp8::quantize_blockwise_128x128_transpose(p.weight, e4m3, true);
  for (const at::Tensor& scale : {x_scale, x_scale_t, w_scale, w_scale_t}) {
    REQUIRE(at::equal(std::get<0>(at::frexp(scale)), at::full_like(scale, 0.5)));
  }
  REQUIRE(at::equal(x_scale, std::get<1>(fp8::quantize_blockwise_1x128(x, e4m3, true))));
  REQUIRE(at::equal(w_scale, std::get<1>(fp8::quantize_blockwise_128x128(p.weight, e4m3, true))));
  const at::Tensor y = fp8::scaled_mm(x_data, w_data, x_scale, w_scale, p.bias, at::kFloat);
  REQUIRE(at::equal(y.view({3, 33, 48}),
                    fp8::fused_linear(p.x, p.weight, p.bias, "blockwise:power_of_two")));
}

TEST_CASE("grouped_linear is fused_linear group by group") {
  at::manual_seed(1);
  const at::Tensor x = at::randn({30, 64}).requires_grad_();
  const at::Tensor weight = at::randn({3, 32, 64}).requires_grad_();
  const at::Tensor bias = at::randn({3, 32}).requires_grad_();
  const at::Tensor offsets = at::tensor({12, 12, 25}, at::kInt);
  const at::Tensor y = fp8::grouped_linear(x, weight, offsets, bias);
  const at::Tensor dy = at::randn_like(y);
  y.backward(dy);
  REQUIRE(y.narrow(0, 25, 5).eq(0).all().item<bool>());
  REQUIRE(x.grad().narrow(0, 25, 5).eq(0).all().item<bool>());
  REQUIRE(weight.grad()[1].eq(0).all().item<bool>());
  for (const auto& [group, begin, rows] : {std::array{0, 0, 12}, std::array{2, 12, 13}}) {
    const at::Tensor part = x.detach().narrow(0, begin, rows).requires_grad_();
    const at::Tensor w = weight.detach()[group].requires_grad_();
    const at::Tensor expected =
        fp8::fused_linear(part, w, bias.detach()[group], fp8::kDefaultGroupedRecipe);
    expected.backward(dy.narrow(0, begin, rows));
    REQUIRE(at::allclose(y.narrow(0, begin, rows), expected, 1e-5, 1e-4));
    REQUIRE(at::allclose(x.grad().narrow(0, begin, rows), part.grad(), 1e-5, 1e-4));
    REQUIRE(at::allclose(weight.grad()[group], w.grad(), 1e-5, 1e-4));
  }
}

TEST_CASE("grouped linears have one default, and take options") {
  at::manual_seed(3);
  const at::Tensor x = at::randn({30, 64});
  const at::Tensor weight = at::randn({3, 32, 64});
  const at::Tensor offsets = at::tensor({12, 12, 25}, at::kInt);
  const auto weight_gradient = [&](auto... recipe) {
    const at::Tensor leaf = weight.clone().requires_grad_();
    fp8::grouped_linear(x, leaf, offsets, std::nullopt, recipe...).sum().backward();
    return leaf.grad();
  };
  REQUIRE(at::equal(weight_gradient(), weight_gradient(fp8::kDefaultGroupedRecipe)));
  REQUIRE(!at::equal(weight_gradient(), weight_gradient("rowwise_gw_hp")));
  REQUIRE(!at::equal(weight_gradient("rowwise:power_of_two"), weight_gradient("rowwise")));
  REQUIRE_THROWS_WITH(fp8::grouped_linear(x, weight, offsets, std::nullopt, "tensorwise"),
                      Catch::Contains("scales per row or block") &&
                          Catch::Contains("'rowwise_fast_gw_hp'") &&
                          Catch::Contains("got 'tensorwise'"));
}

TEST_CASE("moe_experts follows the exact one") {
  at::manual_seed(2);
  const at::Tensor x = at::randn({20, 32}).requires_grad_();
  const at::Tensor gate_up = at::randn({4, 32, 32}).div_(6).requires_grad_();
  const at::Tensor down = at::randn({4, 32, 16}).div_(4).requires_grad_();
  const auto [weights, index] = at::randn({20, 4}).softmax(-1).topk(2);
  const at::Tensor y = fp8::moe_experts(x, index, weights, gate_up, down);
  at::Tensor exact = at::zeros({20, 32});
  for (int64_t token = 0; token < 20; ++token) {
    for (int64_t choice = 0; choice < 2; ++choice) {
      const auto expert = index[token][choice].item<int64_t>();
      const auto halves = gate_up.detach()[expert].mv(x.detach()[token]).chunk(2);
      const at::Tensor h = at::silu(halves[0]) * halves[1];
      exact[token] += weights[token][choice] * down.detach()[expert].mv(h);
    }
  }
  REQUIRE(sqnr(exact, y.detach()) > 20);
  y.sum().backward();
  REQUIRE(x.grad().isfinite().all().item<bool>());
  REQUIRE(gate_up.grad().sizes() == gate_up.sizes());
}

TEST_CASE("experts_frozen has the bits of moe_experts") {
  at::manual_seed(2);
  const at::Tensor x = at::randn({20, 32}).requires_grad_();
  const at::Tensor gate_up = at::randn({4, 32, 32}).div_(6);
  const at::Tensor down = at::randn({4, 32, 16}).div_(4);
  const at::Tensor bias = at::randn({4, 32}).requires_grad_();
  const auto [weights, index] = at::randn({20, 4}).softmax(-1).topk(2);
  const auto [up_codes, up_scale] = fp8::quantize_rowwise(gate_up);
  const auto [down_codes, down_scale] = fp8::quantize_rowwise(down);
  const at::Tensor y = fp8::experts_frozen(x, index, weights, up_codes, up_scale, down_codes,
                                           down_scale, {.down_bias = bias, .activation = "gelu"});
  REQUIRE(at::equal(y, fp8::moe_experts(x, index, weights, gate_up, down, std::nullopt, bias,
                                        "gelu", false, 1.702, 7.0, "rowwise")));
  y.sum().backward();
  REQUIRE(x.grad().isfinite().all().item<bool>());
  REQUIRE(bias.grad().sizes() == bias.sizes());
  REQUIRE_THROWS_WITH(
      fp8::experts_frozen(x, index, weights, gate_up, up_scale, down_codes, down_scale),
      Catch::Contains("fp8::experts_frozen: expected gate_up in float8_e4m3fn, got float32"));
}

TEST_CASE("mlp has the bits of its layers") {
  at::manual_seed(3);
  const at::Tensor x = at::randn({20, 32}).requires_grad_();
  const at::Tensor gate = at::randn({48, 32}).div_(6).requires_grad_();
  const at::Tensor up = at::randn({48, 32}).div_(6).requires_grad_();
  const at::Tensor down = at::randn({24, 48}).div_(7).requires_grad_();
  const at::Tensor y = fp8::mlp(x, gate, up, down, {.recipe = "rowwise", .save = "recompute"});
  const at::Tensor h = at::silu(fp8::fused_linear(x, gate, std::nullopt, "rowwise")) *
                       fp8::fused_linear(x, up, std::nullopt, "rowwise");
  REQUIRE(at::equal(y, fp8::fused_linear(h, down, std::nullopt, "rowwise")));
  y.sum().backward();
  REQUIRE(x.grad().isfinite().all().item<bool>());
  REQUIRE(up.grad().sizes() == up.sizes());
  const at::Tensor again = fp8::mlp(x, gate, up, down, {.recipe = "rowwise", .save = "fp8"});
  REQUIRE(at::equal(again, y));
  const at::Tensor before = up.grad().clone();
  up.mutable_grad().reset();
  again.sum().backward();
  REQUIRE(sqnr(before, up.grad()) > 20);
  REQUIRE(!at::equal(before, up.grad()));
}

TEST_CASE("autocast decides the dtype") {
  Problem p;
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor y = fp8::fused_linear(p.x, p.weight, p.bias);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  REQUIRE(y.scalar_type() == at::kBFloat16);
  y.sum().backward();
  REQUIRE(p.weight.grad().scalar_type() == at::kFloat);
}

TEST_CASE("errors have types and say what came") {
  Problem p;
  REQUIRE_THROWS_AS(fp8::fused_linear(p.x, p.weight, p.bias, "fp4"), c10::ValueError);
  REQUIRE_THROWS_WITH(fp8::fused_linear(p.x, p.weight.t(), p.bias),
                      Catch::Contains("x and weight must share K"));
  REQUIRE_THROWS_AS(fp8::fused_linear(p.x, p.weight.to(at::kDouble), p.bias), c10::TypeError);
  REQUIRE_THROWS_AS(fp8::quantize_rowwise(p.x.to(at::kInt)), c10::TypeError);
}

TEST_CASE("merged_linear is fused_linear on joined weights, split") {
  at::manual_seed(0);
  const at::Tensor x = at::randn({6, 32}).set_requires_grad(true);
  const at::Tensor w = at::randn({16, 32}).set_requires_grad(true);
  const at::Tensor v = at::randn({8, 32}).set_requires_grad(true);
  const at::Tensor b = at::randn({8}).set_requires_grad(true);
  const std::vector<at::Tensor> ys = fp8::merged_linear(x, {w, v}, {std::nullopt, b});
  const at::Tensor bias = at::cat({at::zeros({16}), b.detach()});
  const at::Tensor y = fp8::fused_linear(x, at::cat({w, v}), bias);
  REQUIRE(at::equal(at::cat(ys, 1), y));
  (ys[0].sum() + ys[1].sum()).backward();
  REQUIRE(w.grad().sizes() == w.sizes());
  REQUIRE(at::equal(b.grad(), at::full({8}, 6.0)));
  REQUIRE_THROWS_AS(fp8::merged_linear(x, {w, at::randn({8, 16})}), c10::ValueError);
}
