#include "cpu/history.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "host/formats.h"

namespace fp8::cpu {
namespace {

// A copy of the words, which may mix those of two calls if another thread writes meanwhile: hence
// every `used` must suit.
struct Known {
  std::array<uint32_t, core::kAmaxHistorySize> words;

  explicit Known(uint32_t* history) {
    for (size_t i = 0; i < words.size(); ++i) {
      words[i] = std::atomic_ref(history[i]).load(std::memory_order_relaxed);
    }
  }
  uint32_t count() const { return words[kHistoryCount]; }
  // Of the record that lies `ago` before the next one.
  uint32_t own(uint32_t ago) const { return words[(count() - ago) % core::kAmaxRecords]; }
  uint32_t used(uint32_t ago) const {
    return words[kHistoryUsed + (count() - ago) % core::kAmaxRecords];
  }
  uint32_t print(uint32_t ago) const {
    return words[kHistoryFingerprint + (count() - ago) % core::kAmaxRecords];
  }
  // Of the window's largest, with its margin. Inf or NaN, of a call with column sums, says nothing.
  uint32_t window_amax() const {
    uint32_t bits = 0;
    for (uint32_t ago = 1; ago <= core::kAmaxWindow; ++ago) {
      if (own(ago) < kExponentBits) bits = std::max(bits, own(ago));
    }
    return with_margin(bits);
  }
};

bool bits_suit(uint32_t used, uint32_t own, core::Dtype dtype) {
  return suits(std::bit_cast<float>(used), std::bit_cast<float>(own), dtype);
}

struct Settled {
  uint32_t used;
  bool repeats;
};

Settled settle(const Known& known, const Report& own, core::Dtype dtype) {
  bool taken_at_once = false;
  const uint32_t searched = std::min(known.count(), kAmaxSearched);
  for (uint32_t ago = 1; ago <= searched; ++ago) {
    if (known.own(ago) != own.amax) continue;
    const uint32_t print = known.print(ago);
    const uint32_t used = known.used(ago);
    if (print == own.print && bits_suit(used, own.amax, dtype)) return {used, true};
    taken_at_once |= print == kNoFingerprint;
  }
  const uint32_t largest = known.window_amax();
  const bool delayed =
      !taken_at_once && known.count() >= core::kAmaxWindow && bits_suit(largest, own.amax, dtype);
  return {delayed ? largest : own.amax, false};
}

void store(uint32_t* history, int word, uint32_t value) {
  std::atomic_ref(history[word]).store(value, std::memory_order_relaxed);
}

void leave_record(uint32_t* history, uint32_t count, uint32_t own, uint32_t used, uint32_t print) {
  const auto place = static_cast<int>(count % core::kAmaxRecords);
  store(history, place, own);
  store(history, kHistoryUsed + place, used);
  store(history, kHistoryFingerprint + place, print);
  store(history, kHistoryCount, count + 1);
}

}  // namespace

uint32_t settle_amax(uint32_t* history, const Report& own, core::Dtype dtype) {
  const Known known(history);
  const Settled settled = settle(known, own, dtype);
  if (!settled.repeats) {
    leave_record(history, known.count(), own.amax, settled.used, own.print);
  }
  store(history, kHistoryGuess, settled.repeats ? settled.used : 0);
  return settled.used;
}

void record_amax(uint32_t* history, uint32_t own) {
  leave_record(history, Known(history).count(), own, own, kNoFingerprint);
  store(history, kHistoryGuess, 0);
}

}  // namespace fp8::cpu
