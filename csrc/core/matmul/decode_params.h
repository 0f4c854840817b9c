// What the decode kernels are given. Between decode_core.cpp and decode.cu, so that what is
// compiled for sm_90a is the kernels alone.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "fp8/core_decode.h"
#include "host/decode_plan.h"

namespace fp8::core {

struct DecodeParams {
  CUtensorMap weight_map;  // [n, k], boxes of tile_rows rows
  CUtensorMap x_map;       // of codes: [m, k], boxes of tokens rows
  DecodePlan plan;
  int m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const void* x = nullptr;
  int64_t ldx = 0;
  bool vectorized = false;  // x and ldx on 16 bytes
  bool power_of_two = false;
  const float* input_scale = nullptr;
  // Of x, made by a launch before: codes [m, ld_codes]; scales [m], of blocks [k_boxes][tokens].
  uint8_t* x_codes = nullptr;
  int64_t ld_codes = 0;
  float* x_scale = nullptr;
  const float* weight_scale = nullptr;
  int64_t weight_scale_row_stride = 0;
  int64_t weight_scale_col_stride = 0;
  const void* bias = nullptr;
  void* y = nullptr;
  Dtype dtype = Dtype::kBFloat16;  // of x, bias and y
};

// blocks: scales of 1x128 and 128x128. pdl: see DecodeArgs.
void launch_decode(const DecodeParams& params, bool blocks, bool pdl, cudaStream_t stream);

}  // namespace fp8::core
