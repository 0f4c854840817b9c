// Internal to fp8_core: what the matmul files share beyond fp8/core.h.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

// Whether cuBLASLt takes the problem at all on a device of this compute capability (90 for 9.0):
// formats, extents, alignments. Host logic, tested on any machine.
bool lt_supports(const MatmulArgs& args, int capability);

}  // namespace fp8::core
