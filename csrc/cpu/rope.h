// The pass of fp8/core_rope.h on the CPU: same arguments, same bits.
#pragma once

#include "fp8/core_rope.h"

namespace fp8::cpu {

void rope(const core::RopeArgs& args);

}  // namespace fp8::cpu
