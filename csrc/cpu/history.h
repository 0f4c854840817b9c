// Delayed scaling on the CPU: the rule in fp8/core.h, as core/quantize/history.cuh has it.
#pragma once

#include <cstdint>

#include "fp8/core.h"

namespace fp8::cpu {

// amax of x's finite values, as bits, and a fingerprint of x.
struct Report {
  uint32_t amax = 0;
  uint32_t print = 0;
};

// What makes the scale of codes of this dtype, as bits. Moves the history [core::kAmaxHistorySize]
// on. Threads may share one.
uint32_t settle_amax(uint32_t* history, const Report& own, core::Dtype dtype);

// Of a call with column sums, whose scale its own amax makes.
void record_amax(uint32_t* history, uint32_t own);

}  // namespace fp8::cpu
