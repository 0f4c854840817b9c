// Delayed scaling in fp8_core, on a GPU: codes, scales and records over more than a turn of the
// ring.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "common/formats.h"
#include "common/launch.h"
#include "device_memory.h"
#include "fp8/core.h"

using namespace fp8::core;

namespace {

// Of finite values.
float amax_of(const std::vector<float>& x) {
  float amax = 0.0F;
  for (const float v : x) {
    if (std::isfinite(v)) amax = std::max(amax, std::fabs(v));
  }
  return amax;
}

// Codes in `found` that are not those of x [rows, cols], or of its transpose, and padding that is
// not zero.
int64_t count_wrong(const std::vector<uint8_t>& found, const std::vector<float>& x, int64_t rows,
                    int64_t cols, float multiplier, bool transposed) {
  const int64_t ld = pad16(transposed ? rows : cols);
  int64_t wrong = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(found.size()); ++i) {
    const int64_t row = transposed ? i % ld : i / ld;
    const int64_t col = transposed ? i / ld : i % ld;
    uint8_t expected = 0;
    if (row < rows && col < cols) {
      const float value = x[row * cols + col];
      expected = std::isinf(value) ? fp8::kNanCode : fp8::encode<fp8::E4M3>(value * multiplier);
    }
    wrong += found[i] != expected;
  }
  return wrong;
}

}  // namespace

// One block and many, ragged tiles, each of the three kernels. compute-sanitizer's racecheck runs
// this case.
TEST_CASE("a delayed scale is that of the window's largest amax where that suits", "[quantize]") {
  const auto [rows, cols] = GENERATE(std::pair<int64_t, int64_t>{1, 1}, std::pair{130, 1040},
                                     std::pair{1000, 530}, std::pair{2500, 72});
  const auto [with_data, with_data_t] =
      GENERATE(std::pair{true, true}, std::pair{true, false}, std::pair{false, true});
  const bool power_of_two = rows % 20 == 0;
  CAPTURE(rows, cols, with_data, with_data_t, power_of_two);
  const std::vector<float> base = random_matrix(rows * cols, 9);
  Buffer<float> x(base);
  Buffer<uint8_t> data(pad16(rows) * pad16(cols));
  Buffer<uint8_t> data_t(pad16(rows) * pad16(cols));
  Buffer<float> scale(1);
  Buffer<float> used(1);
  const Buffer<float> history(std::vector<float>(kAmaxHistorySize, 0.0F));
  QuantizeArgs args{
      .x = x.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
  args.power_of_two = power_of_two;
  if (with_data) args.data = {data.data, pad16(rows), pad16(cols)};
  if (with_data_t) args.data_t = {data_t.data, pad16(cols), pad16(rows)};
  args.scale = scale.data;
  args.amax_out = used.data;
  args.amax_history = history.data;
  Buffer<uint8_t> workspace(quantize_workspace_bytes(args) + 16);
  args.workspace = workspace.data;

  std::deque<float> window;
  std::set<float> at_once;  // an x of such an amax may be one of those
  std::map<std::vector<float>, std::pair<int, float>> seen;  // x -> its last call, and what it used
  int cast_again = 0;
  constexpr int kCalls = kAmaxRecords + 9;
  for (int call = 0; call < kCalls; ++call) {
    // Where the largest element lies changes from call to call: any block may have it.
    std::vector<float> host = base;
    const float factor = call % 13 == 6 ? 0.0F : std::ldexp(1.0F, (call * 7) % 11 + call / 4 - 16);
    for (float& v : host) v *= factor;
    host[static_cast<size_t>(call) * 7919 % host.size()] = 9.0F * factor;
    const bool infinite = call == 25 && rows > 1;
    if (infinite) host[3] = -std::numeric_limits<float>::infinity();
    check(cudaMemcpy(x.data, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice));

    args.amax_call = static_cast<uint64_t>(call);
    quantize(args, nullptr);
    check(cudaDeviceSynchronize());

    const float own = amax_of(host);
    float expected = own;
    if (call >= kAmaxWindow) {
      expected = *std::max_element(window.begin(), window.end());
      window.pop_front();
      const auto same = seen.find(host);
      if (same != seen.end() && call - same->second.first < kAmaxRecords) {
        expected = same->second.second;  // it keeps its scale
      } else if (at_once.contains(own) || !fp8::suits(expected, own)) {
        expected = own;
        ++cast_again;
      }
    }
    window.push_back(own);
    if (call < kAmaxWindow) at_once.insert(own);
    if (call >= kAmaxWindow) seen[host] = {call, expected};
    INFO("call " << call);
    const float multiplier = fp8::quant_multiplier(expected, 448.0F, power_of_two);
    REQUIRE(used.host()[0] == expected);
    REQUIRE(scale.host()[0] == 1.0F / multiplier);
    const std::vector<float> ring = history.host();
    const int slot = call % kAmaxRecords;
    REQUIRE(ring[slot] == own);
    REQUIRE(ring[fp8::kHistoryUsed + slot] == expected);
    const auto print = std::bit_cast<uint32_t>(ring[fp8::kHistoryFingerprint + slot]);
    REQUIRE((print == 0) == (call < kAmaxWindow));
    if (with_data) REQUIRE(count_wrong(data.host(), host, rows, cols, multiplier, false) == 0);
    if (with_data_t) REQUIRE(count_wrong(data_t.host(), host, rows, cols, multiplier, true) == 0);

    // The same x again, as activation checkpointing has it: the same scale, and no record.
    if (call < kAmaxWindow) continue;
    check(cudaMemset(data.data, 0xEE, data.count));
    check(cudaMemset(data_t.data, 0xEE, data_t.count));
    QuantizeArgs again = args;
    again.amax_call = static_cast<uint64_t>(call) + 1;
    again.recomputes = true;
    quantize(again, nullptr);
    check(cudaDeviceSynchronize());
    REQUIRE(used.host()[0] == expected);
    const std::vector<float> after = history.host();  // fingerprints may be the bits of a NaN
    REQUIRE(std::memcmp(after.data(), ring.data(), ring.size() * sizeof(float)) == 0);
    if (with_data) REQUIRE(count_wrong(data.host(), host, rows, cols, multiplier, false) == 0);
    if (with_data_t) REQUIRE(count_wrong(data_t.host(), host, rows, cols, multiplier, true) == 0);
  }
  REQUIRE(cast_again > 4);
  REQUIRE(cast_again < kCalls - kAmaxWindow - 8);
}

namespace {

// Calls of one history with matrices of 300 x 160, which come from the host.
struct Calls {
  static constexpr int64_t kRows = 300;
  static constexpr int64_t kCols = 160;
  std::vector<float> base = random_matrix(kRows * kCols, 11);
  Buffer<float> x{base};
  Buffer<uint8_t> data{pad16(kRows) * kCols};
  Buffer<float> scale{1};
  Buffer<float> history{std::vector<float>(kAmaxHistorySize, 0.0F)};
  QuantizeArgs args{
      .x = x.data, .x_dtype = Dtype::kFloat32, .rows = kRows, .cols = kCols, .ld = kCols};
  Buffer<uint8_t> workspace{1 << 16};

  Calls() {
    args.data = {data.data, pad16(kRows), kCols};
    args.scale = scale.data;
    args.amax_history = history.data;
    args.amax_call = kAmaxWindow;
    REQUIRE(quantize_workspace_bytes(args) <= workspace.count);
    args.workspace = workspace.data;
  }

  std::vector<float> scaled(float factor) const {
    std::vector<float> values = base;
    for (float& v : values) v *= factor;
    return values;
  }

  float scale_of(const std::vector<float>& values, uint64_t call, bool recomputes) {
    check(cudaMemcpy(x.data, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice));
    args.amax_call = call;
    args.recomputes = recomputes;
    quantize(args, nullptr);
    check(cudaDeviceSynchronize());
    return scale.host()[0];
  }
};

}  // namespace

// Two tensors of one amax, scaled differently: the fingerprint tells which is repeated.
TEST_CASE("a recomputation finds its own record among those of one amax", "[quantize]") {
  Calls calls;
  std::vector<float> first = calls.base;
  std::vector<float> second = calls.base;
  first[77] = second[second.size() - 5] = 4.0F;
  first[100] = second[100] = 1.0F;
  uint64_t call = 0;
  const std::vector<float> small = calls.scaled(0.5F);  // of another amax: theirs is taken at once
  for (; call < kAmaxWindow; ++call) calls.scale_of(small, call, false);
  std::vector<float> large = calls.base;
  large[3] = 40.0F;
  const float scale_of_first = calls.scale_of(first, call++, false);
  calls.scale_of(large, call++, false);
  const float scale_of_second = calls.scale_of(second, call++, false);
  REQUIRE(scale_of_first != scale_of_second);
  for (int i = 0; i < 2; ++i) {
    REQUIRE(calls.scale_of(first, call, true) == scale_of_first);
    REQUIRE(calls.scale_of(second, call, true) == scale_of_second);
  }
}

// One record further back lies that of the call itself, which a block writes while others search.
TEST_CASE("a tensor keeps its scale for 63 calls", "[quantize]") {
  const bool kept = GENERATE(true, false);
  Calls calls;
  uint64_t call = 0;
  for (; call < kAmaxWindow; ++call) calls.scale_of(calls.scaled(2.0F), call, false);
  const uint64_t first = call;
  const float scale = calls.scale_of(calls.base, call++, false);
  const uint64_t again = first + kAmaxRecords - (kept ? 1 : 0);
  while (call < again) {
    const float factor = 1.25F + 0.001F * static_cast<float>(call);
    calls.scale_of(calls.scaled(factor), call++, false);
  }
  REQUIRE((calls.scale_of(calls.base, call, false) == scale) == kept);
}

TEST_CASE("a history goes with neither a given scale nor one for each row", "[quantize]") {
  Buffer<float> x(256);
  Buffer<uint8_t> data(256);
  Buffer<float> scale(16);
  const Buffer<float> history(std::vector<float>(kAmaxHistorySize, 0.0F));
  QuantizeArgs args{.x = x.data, .x_dtype = Dtype::kFloat32, .rows = 16, .cols = 16, .ld = 16};
  args.data = {data.data, 16, 16};
  args.scale = scale.data;
  args.amax_history = history.data;
  args.static_scale = scale.data;
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("got two of them"));
  args.static_scale = nullptr;
  args.amax = scale.data;
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("got two of them"));
  args.amax = nullptr;
  args.granularity = Granularity::kRowwise;
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("a history of amax, is tensorwise"));
}
