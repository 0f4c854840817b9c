// FP8 operands of grouped matmuls, and the passes between them, on tensors: allocates what
// core_grouped.h's passes write, and runs them on the tensors' device.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/cuda_context.h"
#include "cpu/grouped.h"
#include "fp8/core_grouped.h"

// Runs core::NAME on the current stream of `like`, or cpu::NAME.
#ifdef FP8_WITH_CUDA
#define FP8_RUN_PASS(NAME, like, ...)                                    \
  do {                                                                   \
    if ((like).is_cpu()) {                                               \
      ::fp8::cpu::NAME(__VA_ARGS__);                                     \
    } else {                                                             \
      ::fp8::core::NAME(__VA_ARGS__, ::fp8::cuda::current_stream(like)); \
    }                                                                    \
  } while (false)
#else
#define FP8_RUN_PASS(NAME, like, ...)                 \
  do {                                                \
    if (!(like).is_cpu()) ::fp8::throw_no_cuda(like); \
    ::fp8::cpu::NAME(__VA_ARGS__);                    \
  } while (false)
#endif

namespace fp8::grouped {

// [rows, cols] or [groups, rows, cols], contracted along cols.
struct Operand {
  at::Tensor data;   // e4m3, contiguous, cols a multiple of 16
  at::Tensor scale;  // [rows] or [groups, rows] fp32
};

// Each row of x [M, K] quantized; with `place` [M * copies], written there `copies` times. Here and
// below, power_of_two: scales are powers of two.
Operand quantize_rows(const at::Tensor& x, bool power_of_two, const at::Tensor& place = {},
                      int64_t copies = 1);

// The rows of x themselves, copied to their places: [M * copies, K].
at::Tensor copy_rows(const at::Tensor& x, const at::Tensor& place, int64_t copies);

// Where the groups of `offsets` lie in transposed copies.
struct Tiles {
  at::Tensor table;           // [max_group_tiles, 4] int32
  at::Tensor padded_offsets;  // [groups] int32
  int64_t columns;            // of a transposed copy
};
Tiles make_tiles(const at::Tensor& offsets, int64_t rows);

// x's columns quantized within each group of rows: data [K, tiles.columns], scale [groups, K]. With
// `source`, row r of the groups is x's row source[r] / copies.
Operand quantize_columns(const at::Tensor& x, const Tiles& tiles, bool power_of_two,
                         const at::Tensor& source = {}, int64_t copies = 1);

// An expert's weight as the product over its in-features reads it ([groups, N, K], scales per
// out-feature), and as the one over its out-features does ([groups, K, N], scales per in-feature).
// weight [groups, N, K], N and K multiples of 16, stored that way or transposed. Made once inside
// fp8.cached_weights.
Operand weight_for_fprop(const at::Tensor& weight, bool power_of_two);
Operand weight_for_dgrad(const at::Tensor& weight, bool power_of_two);

// Whether weight [groups, N, K] is stored as [groups, K, N].
bool is_stored_transposed(const at::Tensor& weight);

}  // namespace fp8::grouped
