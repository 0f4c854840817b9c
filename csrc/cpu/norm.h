// The passes of fp8/core_norm.h on the CPU: same arguments, same bits. No workspace is needed, and
// y_amax is one number.
#pragma once

#include "fp8/core_norm.h"

namespace fp8::cpu {

void norm_forward(const core::NormForwardArgs& args);
void norm_backward(const core::NormBackwardArgs& args);

}  // namespace fp8::cpu
