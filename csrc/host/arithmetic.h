// Operations on fp32 that round one by one, on CPU and GPU alike: what formulas are made of whose
// bits are to be eager PyTorch's. A kernel would contract a product and a sum otherwise; on the CPU
// -ffp-contract=off says the same.
#pragma once

#include <cmath>

#include "host/formats.h"

namespace fp8 {

#ifdef __CUDA_ARCH__
FP8_HOST_DEVICE inline float mul(float a, float b) { return __fmul_rn(a, b); }
FP8_HOST_DEVICE inline float add(float a, float b) { return __fadd_rn(a, b); }
FP8_HOST_DEVICE inline float sub(float a, float b) { return __fsub_rn(a, b); }
FP8_HOST_DEVICE inline float divide(float a, float b) { return __fdiv_rn(a, b); }
FP8_HOST_DEVICE inline float root(float a) { return __fsqrt_rn(a); }
#else
FP8_HOST_DEVICE inline float mul(float a, float b) { return a * b; }
FP8_HOST_DEVICE inline float add(float a, float b) { return a + b; }
FP8_HOST_DEVICE inline float sub(float a, float b) { return a - b; }
FP8_HOST_DEVICE inline float divide(float a, float b) { return a / b; }
FP8_HOST_DEVICE inline float root(float a) { return sqrtf(a); }
#endif

}  // namespace fp8
