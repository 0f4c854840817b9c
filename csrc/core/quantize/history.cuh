// Delayed scaling on the device: what a warp knows of a history, and the rule in fp8/core.h.
//
// The cast pass takes a guess; settle_delayed.cu decides. All blocks of that launch must come to
// one answer while the first of them writes the history, and while another stream may write it too.
// So they read a copy, which the first block of the cast pass left in the workspace. That copy may
// mix words of two calls, if two streams share the history: hence every `used` must suit.
#pragma once

#include "core/device/reduce.cuh"
#include "core/quantize/kernels.h"
#include "host/formats.h"

namespace fp8::core {

// Two records a lane, at the places lane and lane + 32 of the ring. Loads do not wait for `count`.
struct WarpHistory {
  static_assert(kAmaxRecords == 64);
  static constexpr int kPerLane = 2;
  uint32_t count;
  uint32_t own[kPerLane];

  __device__ __forceinline__ explicit WarpHistory(const uint32_t* history) {
    count = __ldcg(history + kHistoryCount);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own[i] = __ldcg(history + place(i));
  }
  static __device__ __forceinline__ uint32_t place(int i) { return threadIdx.x % 32 + 32 * i; }
  // Records after the one at `place`: 0 for the newest.
  __device__ __forceinline__ uint32_t age(int i) const {
    return (count - 1 - place(i)) % kAmaxRecords;
  }
  // Of the window's largest, with its margin, as bits. Inf or NaN, of a call with column sums, says
  // nothing.
  __device__ __forceinline__ uint32_t window_amax() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (age(i) < kAmaxWindow && own[i] < kExponentBits) bits = max(bits, own[i]);
    }
    return with_margin(warp_max(bits));
  }
};

// The amax, as bits, whose scale a cast takes before it has seen x; for a whole warp, one of a
// block: thousands of blocks read these few lines, each of which one slice of L2 answers.
__device__ __forceinline__ uint32_t guessed_amax(const uint32_t* history) {
  const uint32_t guess = __ldcg(history + kHistoryGuess);
  const uint32_t largest = WarpHistory(history).window_amax();
  return guess != 0 && guess < kExponentBits ? guess : largest;
}

// What makes the scale, as bits; `repeats` where x has a record, and leaves none.
struct SettledAmax {
  uint32_t used;
  bool repeats;
};

// own: amax and fingerprint of x. For a whole warp, one of a block.
template <typename Format>
__device__ __forceinline__ SettledAmax settled_amax(const uint32_t* history, const uint2& own) {
  const auto fits = [&](uint32_t bits) {
    return suits(__uint_as_float(bits), __uint_as_float(own.x), Format::kDtype);
  };
  const WarpHistory known(history);
  uint32_t used[WarpHistory::kPerLane];
  uint32_t newest = kAmaxRecords;
  bool taken_at_once = false;
#pragma unroll
  for (int i = 0; i < WarpHistory::kPerLane; ++i) {
    const uint32_t* record = history + WarpHistory::place(i);
    used[i] = __ldcg(record + kHistoryUsed);
    const uint32_t print = __ldcg(record + kHistoryFingerprint);
    const uint32_t age = known.age(i);
    const bool same = age < kAmaxSearched && age < known.count && known.own[i] == own.x;
    const bool suitable = fits(used[i]);
    if (same && print == own.y && suitable) newest = min(newest, age);
    taken_at_once |= same && print == kNoFingerprint;
  }
  newest = kAmaxRecords - warp_max(kAmaxRecords - newest);
  if (newest < kAmaxRecords) {
    const uint32_t place = (known.count - 1 - newest) % kAmaxRecords;
    const int lane = static_cast<int>(place % 32);
    const uint32_t low = __shfl_sync(0xFFFFFFFFU, used[0], lane);
    const uint32_t high = __shfl_sync(0xFFFFFFFFU, used[1], lane);
    return {place < 32 ? low : high, true};
  }
  const bool at_once = __any_sync(0xFFFFFFFFU, taken_at_once) != 0;
  const uint32_t largest = known.window_amax();
  const bool delayed = !at_once && known.count >= kAmaxWindow && fits(largest);
  return {delayed ? largest : own.x, false};
}

// By one thread. `count`: as it was when the call began.
__device__ __forceinline__ void leave_record(uint32_t* history, uint32_t count, uint32_t own,
                                             uint32_t used, uint32_t print) {
  uint32_t* record = history + count % kAmaxRecords;
  record[0] = own;
  record[kHistoryUsed] = used;
  record[kHistoryFingerprint] = print;
  history[kHistoryCount] = count + 1;
}

}  // namespace fp8::core
