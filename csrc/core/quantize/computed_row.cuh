// The frame of row.cuh for rows that a source computes: they wait for their amax in shared memory,
// each thread's elements its own, which leaves registers for the computation and for elements that
// are on their way. A row that does not fit there is computed twice. Such a source has, beside
// load,
//   Raw fetch(row, col)   what an eight is made of; in bounds whatever the column
//   finish(raw, valid)    the eight itself
#pragma once

#include <array>
#include <atomic>

#include "core/device/shared_memory.h"
#include "core/quantize/row.cuh"

namespace fp8::core {

// As a thread's registers allow: with one block of 512 threads to a multiprocessor 128, with
// two 64.
template <typename Params, typename Format, bool kShared, int kMinBlocks>
__global__ void __launch_bounds__(kMaxRowThreads, kMinBlocks) computed_row_kernel(const Params p) {
  using T = ElementOf<Params>;
  extern __shared__ uint4 waiting[];
  __shared__ uint32_t warp_amax[kMaxRowThreads / 32];
  let_next_start();
  const RowPlace at(p.plan);
  const auto source = p.source();
  const auto row = source.row(at.row);
  const auto cols = static_cast<int>(source.cols_of(at.row));
  const auto place = [&](int i) {
    return reinterpret_cast<Vec8<T>*>(waiting) + i * blockDim.x + threadIdx.x;
  };

  const int stride = p.plan.threads_per_row * 8;
  const int first = at.thread * 8;
  PackedAmax<T> amax;
  amax.clear();
  auto raw = source.fetch(row, first);
#pragma unroll 1
  for (int i = 0, col = first; col < cols; ++i, col += stride) {
    const auto next = source.fetch(row, col + stride);
    const Vec8<T> v = source.finish(raw, of_eight(cols - col));
    amax.update(v);
    if constexpr (kShared) *place(i) = v;
    raw = next;
  }
  const uint32_t bits = row_max(amax.max_float_bits(), p.plan, at.slot, warp_amax);
  const GroupScale group = scale_from_amax(bits, Format::kMax, p.power_of_two);

  wait_for_previous();
  const auto sink = p.sink();
  if (!sink.has(at.row, cols > 0)) return;
  if (at.thread == 0) sink.put_scale(at.row, group.scale);
  const auto out = sink.row(at.row, sink.early(at.row));
  const auto end = static_cast<int>(sink.cols());
#pragma unroll 2
  for (int i = 0, col = first; col < end; ++i, col += stride) {
    Vec8<T> v;
    if constexpr (kShared) {
      v = *place(i);
    } else {
      v = source.load(row, col, of_eight(cols - col));
    }
    uint2 codes = encode8<Format>(v, [&](int) { return group.quant_multiplier; });
    if constexpr (decltype(sink)::kPadded) codes = keep_first(codes, of_eight(cols - col));
    sink.put(out, col, codes);
  }
}

template <typename Format, int kMinBlocks, typename Params>
void launch_computed_rows(const Params& params, int64_t rows, cudaStream_t stream) {
  const RowwisePlan& plan = params.plan;
  const int threads = plan.threads_per_row * plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(rows, plan.rows_per_block));
  const size_t bytes = sizeof(Vec8<ElementOf<Params>>) *
                       static_cast<size_t>(plan.vectors_per_thread * plan.iterations) * threads;
  const auto kernel = computed_row_kernel<Params, Format, true, kMinBlocks>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  if (bytes <= shared_memory_of(reinterpret_cast<const void*>(kernel), known)) {
    launch(kernel, blocks, threads, stream, params, {.shared_bytes = bytes});
  } else {
    launch(computed_row_kernel<Params, Format, false, 1>, blocks, threads, stream, params);
  }
}

}  // namespace fp8::core
