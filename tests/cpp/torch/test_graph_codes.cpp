// Codes of weights that CUDA graphs read, and what an eager call makes of them later. No graph is
// needed: what graph_codes::keep was given is what one reads.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <vector>

#include "torch/quantize/graph_codes.h"
#include "torch/quantize/memory.h"

using fp8::Operand;
using fp8::QuantizeRequest;
using fp8::Side;
using fp8::core::Granularity;
using fp8::operand::remembered_weight;
using fp8::operand::remembered_weights;

namespace {

// fp8.cached_weights
class Context {
 public:
  Context(std::vector<torch::Tensor> weights, bool captures)
      : weights_(std::move(weights)), captures_(captures) {
    fp8::memory::cache_weights(weights_, captures_);
  }
  ~Context() { fp8::memory::uncache_weights(weights_, captures_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 private:
  std::vector<torch::Tensor> weights_;
  bool captures_;
};

bool same(const torch::Tensor& a, const torch::Tensor& b) {
  return torch::equal(a.reshape({-1}).view(torch::kByte), b.reshape({-1}).view(torch::kByte));
}
bool same(const Side& a, const Side& b) {
  return same(a.codes, b.codes) && same(a.scales, b.scales);
}

const QuantizeRequest kRows{.granularity = Granularity::kRowwise};

}  // namespace

TEST_CASE("a call makes every side that a graph reads") {
  for (const auto granularity :
       {Granularity::kTensorwise, Granularity::kRowwise, Granularity::kBlock128x128}) {
    const torch::Tensor weight = torch::randn({48, 64});
    const QuantizeRequest forward{.granularity = granularity};
    QuantizeRequest both = forward;
    both.along_rows = true;
    const Context context({weight}, /*captures=*/true);
    const Operand read = remembered_weight(weight, both);
    fp8::graph_codes::keep(weight, both, read);
    weight.mul_(-3);
    const Operand made = remembered_weight(weight, forward);
    both.keep_amax = granularity == Granularity::kTensorwise;
    const Operand expected = fp8::operand::make(weight, both);
    CHECK(same(made.along_cols, expected.along_cols));
    CHECK(same(read.along_cols, expected.along_cols));
    CHECK(same(read.along_rows, expected.along_rows));
    if (both.keep_amax) CHECK(same(read.amax, expected.amax));
  }
}

TEST_CASE("the maxima that a graph reads outlive the context, and are made again") {
  const torch::Tensor stack = torch::randn({2, 32, 48});
  QuantizeRequest with_amax = kRows;
  with_amax.keep_amax = true;
  REQUIRE(fp8::operand::keeps_amax(stack));
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> amax(
      torch::empty({0}).getIntrusivePtr());
  {
    const Context context({stack}, /*captures=*/true);
    fp8::graph_codes::keep(stack, kRows, remembered_weight(stack, kRows));
    const Operand read = remembered_weight(stack, with_amax);
    fp8::graph_codes::keep(stack, with_amax, read);
    amax = decltype(amax)(read.amax.getIntrusivePtr());
  }
  REQUIRE(!amax.expired());
  stack.mul_(-3);
  const Context context({stack}, /*captures=*/true);
  remembered_weight(stack, kRows);
  const torch::Tensor read(amax.lock());
  CHECK(same(read, fp8::operand::make_stack(stack, with_amax).amax));
}

TEST_CASE("a graph's codes are written by codes of the same kind and weights alone") {
  const std::vector<torch::Tensor> weights = {torch::randn({16, 64}), torch::randn({32, 64})};
  const std::vector<torch::Tensor> others = {weights[0], torch::randn({32, 64})};
  QuantizeRequest powers = kRows;
  powers.power_of_two = true;
  QuantizeRequest delayed;
  delayed.scaling.delayed = true;
  const Context context({weights[0], weights[1], others[1]}, /*captures=*/true);
  const auto check = [](const Operand& read, const auto& call) {
    const Side before{read.along_cols.codes.clone(), read.along_cols.scales.clone()};
    call();
    CHECK(same(read.along_cols, before));
  };

  const Operand rows = remembered_weight(weights[0], kRows);
  fp8::graph_codes::keep(weights[0], kRows, rows);
  check(rows, [&] { remembered_weight(weights[0], powers); });

  const Operand whole = remembered_weight(weights[0], {});
  fp8::graph_codes::keep(weights[0], {}, whole);
  weights[0].mul_(-3);
  check(whole, [&] { remembered_weight(weights[0], delayed); });
  remembered_weight(weights[0], {});
  CHECK(same(whole.along_cols, fp8::operand::make(weights[0], {}).along_cols));

  const Operand joined = remembered_weights(weights, kRows);
  fp8::graph_codes::keep(weights, kRows, joined);
  check(joined, [&] { remembered_weights(others, kRows); });
  weights[1].mul_(-3);
  remembered_weights(weights, kRows);
  CHECK(same(joined.along_cols, fp8::operand::make(torch::cat(weights), kRows).along_cols));
}

TEST_CASE("an inner context that captures brings graphs up to date, once") {
  const torch::Tensor weight = torch::randn({48, 64});
  Operand read;
  {
    const Context context({weight}, /*captures=*/true);
    read = remembered_weight(weight, kRows);
    fp8::graph_codes::keep(weight, kRows, read);
  }
  const Context outer({weight}, /*captures=*/false);
  weight.mul_(-3);
  const Side expected = fp8::operand::make(weight, kRows).along_cols;
  const Operand other = remembered_weight(weight, kRows);
  CHECK(same(other.along_cols, expected));
  CHECK(!same(read.along_cols, expected));
  fp8::graph_codes::keep(weight, kRows, other);  // another graph
  const Context inner({weight}, /*captures=*/true);
  CHECK(same(remembered_weight(weight, kRows).along_cols, expected));
  CHECK(same(read.along_cols, expected));
  CHECK(same(other.along_cols, expected));
  read.along_cols.scales.zero_();
  other.along_cols.scales.fill_(1);
  remembered_weight(weight, kRows);
  const torch::Tensor ones = torch::ones({48});  // nothing was written
  CHECK(same(read.along_cols.scales, ones * 0));
  CHECK(same(other.along_cols.scales, ones));
}
