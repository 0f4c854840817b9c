// Delayed scaling in fp8_core, on a GPU: codes, scales and records over more than a turn of the
// ring.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "fp8/core.h"
#include "host/formats.h"
#include "host/launch.h"

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
  const Buffer<uint32_t> history(std::vector<uint32_t>(kAmaxHistorySize, 0U));
  QuantizeArgs args{
      .x = x.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
  args.power_of_two = power_of_two;
  if (with_data) args.data = {data.data, pad16(rows), pad16(cols)};
  if (with_data_t) args.data_t = {data_t.data, pad16(cols), pad16(rows)};
  args.scale = scale.data;
  args.amax_out = used.data;
  args.scaling = Delayed{history.data};
  Buffer<uint8_t> workspace(quantize_workspace_bytes(args) + 16);
  args.workspace = workspace.data;

  struct Record {
    float own;
    float used;
    std::vector<float> x;
  };
  std::vector<Record> records;
  int from_window = 0;
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

    quantize(args, nullptr);
    check(cudaDeviceSynchronize());

    const float own = amax_of(host);
    float expected = own;
    const auto newest = std::find_if(records.rbegin(), records.rend(),
                                     [&](const Record& record) { return record.x == host; });
    const bool repeats = newest - records.rbegin() < kAmaxRecords - 1 && newest != records.rend();
    if (repeats) {
      expected = newest->used;
    } else if (records.size() >= kAmaxWindow) {
      float largest = 0.0F;
      for (size_t i = 1; i <= kAmaxWindow; ++i) {
        largest = std::max(largest, records[records.size() - i].own);
      }
      largest *= kAmaxMargin;
      if (fp8::suits(largest, own, Dtype::kE4M3)) {
        expected = largest;
        ++from_window;
      }
    }
    if (!repeats) records.push_back({own, expected, host});
    INFO("call " << call);
    const float multiplier = fp8::quant_multiplier(expected, 448.0F, power_of_two);
    REQUIRE(used.host()[0] == expected);
    REQUIRE(scale.host()[0] == 1.0F / multiplier);
    const std::vector<uint32_t> ring = history.host();
    REQUIRE(ring[fp8::kHistoryCount] == records.size());
    const float guess = std::bit_cast<float>(ring[fp8::kHistoryGuess]);
    REQUIRE(guess == (repeats ? expected : 0.0F));
    if (!repeats) {
      const size_t place = (records.size() - 1) % kAmaxRecords;
      REQUIRE(std::bit_cast<float>(ring[place]) == own);
      REQUIRE(std::bit_cast<float>(ring[fp8::kHistoryUsed + place]) == expected);
      REQUIRE(ring[fp8::kHistoryFingerprint + place] != fp8::kNoFingerprint);
    }
    if (with_data) REQUIRE(count_wrong(data.host(), host, rows, cols, multiplier, false) == 0);
    if (with_data_t) REQUIRE(count_wrong(data_t.host(), host, rows, cols, multiplier, true) == 0);

    // The same x again, as activation checkpointing has it: the same scale, and no record. The next
    // call begins with that scale as a guess, where this is done, and with the window's else.
    if (call % 3 == 0) continue;
    check(cudaMemset(data.data, 0xEE, data.count));
    check(cudaMemset(data_t.data, 0xEE, data_t.count));
    quantize(args, nullptr);
    check(cudaDeviceSynchronize());
    REQUIRE(used.host()[0] == expected);
    std::vector<uint32_t> after = history.host();
    REQUIRE(std::bit_cast<float>(after[fp8::kHistoryGuess]) == expected);
    after[fp8::kHistoryGuess] = ring[fp8::kHistoryGuess];
    REQUIRE(after == ring);
    if (with_data) REQUIRE(count_wrong(data.host(), host, rows, cols, multiplier, false) == 0);
    if (with_data_t) REQUIRE(count_wrong(data_t.host(), host, rows, cols, multiplier, true) == 0);
  }
  REQUIRE(from_window > (rows * cols == 1 ? 2 : 8));  // one element comes again more often
  REQUIRE(from_window < kCalls - kAmaxWindow - 8);
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
  Buffer<float> sums{kCols};
  Buffer<uint32_t> history{std::vector<uint32_t>(kAmaxHistorySize, 0U)};
  QuantizeArgs args{
      .x = x.data, .x_dtype = Dtype::kFloat32, .rows = kRows, .cols = kCols, .ld = kCols};
  Buffer<uint8_t> workspace{1 << 16};

  Calls() {
    args.data = {data.data, pad16(kRows), kCols};
    args.scale = scale.data;
    args.scaling = Delayed{history.data};
    REQUIRE(quantize_workspace_bytes(args) <= workspace.count);
    args.workspace = workspace.data;
  }

  std::vector<float> scaled(float factor) const {
    std::vector<float> values = base;
    for (float& v : values) v *= factor;
    return values;
  }

  float scale_of(const std::vector<float>& values) {
    check(cudaMemcpy(x.data, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice));
    quantize(args, nullptr);
    check(cudaDeviceSynchronize());
    return scale.host()[0];
  }

  // Sixteen tensors of about `factor` times the base.
  void fill_window(float factor) {
    for (int i = 0; i < kAmaxWindow; ++i) {
      scale_of(scaled(factor * (1.0F - 0.01F * static_cast<float>(i))));
    }
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
  calls.fill_window(0.5F);
  std::vector<float> large = calls.base;
  large[3] = 40.0F;
  const float scale_of_first = calls.scale_of(first);
  calls.scale_of(large);
  const float scale_of_second = calls.scale_of(second);
  REQUIRE(scale_of_first != scale_of_second);
  for (int i = 0; i < 2; ++i) {
    REQUIRE(calls.scale_of(first) == scale_of_first);
    REQUIRE(calls.scale_of(second) == scale_of_second);
  }
}

TEST_CASE("a tensor keeps its scale for 63 records", "[quantize]") {
  const bool kept = GENERATE(true, false);
  Calls calls;
  calls.fill_window(2.0F);
  const float scale = calls.scale_of(calls.base);
  const int others = kAmaxRecords - 1 - (kept ? 1 : 0);
  for (int i = 0; i < others; ++i) {
    calls.scale_of(calls.scaled(1.25F + 0.001F * static_cast<float>(i)));
  }
  REQUIRE((calls.scale_of(calls.base) == scale) == kept);
}

// As another stream may leave them, which writes meanwhile.
TEST_CASE("torn records and a torn guess make no wrong scale", "[quantize]") {
  Calls calls;
  calls.fill_window(1.5F);
  calls.scale_of(calls.base);
  const auto wrong =
      std::bit_cast<uint32_t>(GENERATE(0.0F, 1e-3F, 1e6F, std::numeric_limits<float>::infinity(),
                                       std::numeric_limits<float>::quiet_NaN()));
  std::vector<uint32_t> words = calls.history.host();
  const bool guess = GENERATE(true, false);
  words[guess ? fp8::kHistoryGuess : fp8::kHistoryUsed + kAmaxWindow] = wrong;
  check(cudaMemcpy(calls.history.data, words.data(), words.size() * sizeof(uint32_t),
                   cudaMemcpyHostToDevice));
  // The record's; or what the window makes, which has moved on by one.
  const float amax = kAmaxMargin * amax_of(calls.scaled(1.5F * (1.0F - (guess ? 0.0F : 0.01F))));
  const float multiplier = fp8::quant_multiplier(amax, 448.0F);
  for (int i = 0; i < 2; ++i) {
    REQUIRE(calls.scale_of(calls.base) == 1.0F / multiplier);
    REQUIRE(count_wrong(calls.data.host(), calls.base, Calls::kRows, Calls::kCols, multiplier,
                        false) == 0);
  }
}

TEST_CASE("a call with column sums takes its own amax, and leaves a record", "[quantize]") {
  Calls calls;
  calls.fill_window(2.0F);
  const float own = 1.0F / fp8::quant_multiplier(amax_of(calls.base), 448.0F);
  QuantizeArgs plain = calls.args;
  calls.args.column_sum = calls.sums.data;
  REQUIRE(quantize_workspace_bytes(calls.args) <= calls.workspace.count);
  for (unsigned i = 0; i < 2; ++i) {
    REQUIRE(calls.scale_of(calls.base) == own);
    const std::vector<uint32_t> words = calls.history.host();
    REQUIRE(words[fp8::kHistoryCount] == kAmaxWindow + 1 + i);
    REQUIRE(std::bit_cast<float>(words[kAmaxWindow + i]) == amax_of(calls.base));
    REQUIRE(words[fp8::kHistoryFingerprint + kAmaxWindow + i] == fp8::kNoFingerprint);
  }
  calls.args = plain;
  REQUIRE(calls.scale_of(calls.base) == own);  // not the window's: it may be one of those
}

TEST_CASE("what makes one scale makes none for each row", "[quantize]") {
  Buffer<float> x(256);
  Buffer<uint8_t> data(256);
  Buffer<float> scale(16);
  const Buffer<uint32_t> history(std::vector<uint32_t>(kAmaxHistorySize, 0U));
  QuantizeArgs args{.x = x.data, .x_dtype = Dtype::kFloat32, .rows = 16, .cols = 16, .ld = 16};
  args.data = {data.data, 16, 16};
  args.scale = scale.data;
  args.granularity = Granularity::kRowwise;
  const int source = GENERATE(0, 1, 2);
  if (source == 0) args.scaling = StaticScale{scale.data};
  if (source == 1) args.scaling = KnownAmax{scale.data};
  if (source == 2) args.scaling = Delayed{history.data};
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("a history of amax, is tensorwise"));
}
