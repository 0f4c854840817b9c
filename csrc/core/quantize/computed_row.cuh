// The frame of row.cuh for rows that a source computes. What a thread computes of comes through a
// ring in shared memory, kEightsAhead eights on their way, and what it has computed waits there for
// the row's amax. A thread reads nothing but its own, so there is no barrier, and registers are
// left for the computation and for enough threads. A row that does not fit there is computed twice.
// Such a source has, beside load,
//
//   kParts: of so many eights in memory an eight is made.
//
//   part(row, which, col): where one lies, on 16 bytes.
//
//   of_parts(row, col, parts): what finish takes.
//
//   finish(raw, valid): the eight itself.
//
//   width(), if how many columns a row has must be read from memory: those that every row has
//   there. Copies of them begin before.
#pragma once

#include <array>
#include <atomic>

#include "core/device/next_rows.cuh"
#include "core/device/shared_memory.h"
#include "core/quantize/row.cuh"

namespace fp8::core {

// With three, four blocks with a row of 14336 elements of 16 bits each fit into a multiprocessor's
// shared memory; with five, three do, which is slower. Of 32 bits, three blocks with one.
template <typename T>
constexpr int kEightsAhead = sizeof(T) == 4 ? 1 : 3;

// As a thread's registers allow: with one block of 512 threads to a multiprocessor 128, with
// two 64.
template <typename Params, typename Format, bool kShared, int kMinBlocks>
__global__ void __launch_bounds__(kMaxRowThreads, kMinBlocks) computed_row_kernel(const Params p) {
  using T = ElementOf<Params>;
  constexpr int kParts = SourceOf<Params>::kParts;
  constexpr int kAhead = kEightsAhead<T>;
  extern __shared__ uint4 shared[];
  __shared__ uint32_t warp_amax[kMaxRowThreads / 32];
  let_next_start();
  const RowPlace at(p.plan);
  const auto source = p.source();
  const auto row = source.row(at.row);
  const auto cols = static_cast<int>(source.cols_of(at.row));
  int width = cols;
  if constexpr (requires { source.width(); }) width = static_cast<int>(source.width());
  const int stride = p.plan.threads_per_row * 8;
  const int first = at.thread * 8;
  // The ring, then the row.
  const uint32_t step = blockDim.x * sizeof(uint4);
  const uint32_t eight = kQuads<T> * step;
  const uint32_t ring = first_slot(shared);
  const uint32_t first_place = ring + kAhead * kParts * eight;
  const auto copy = [&](uint32_t to, int col) {
    if (col < width) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) copy_eight(to + i * eight, step, source.part(row, i, col));
    }
    __pipeline_commit();
  };

  if constexpr (kShared) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy(ring + i * kParts * eight, first + i * stride);
  }
  PackedAmax<T> amax;
  amax.clear();
  uint32_t from = ring;
  uint32_t place = first_place;
#pragma unroll 1
  for (int col = first; col < cols; col += stride, place += eight) {
    Vec8<T> v;
    if constexpr (kShared) {
      __pipeline_wait_prior(kAhead - 1);
      Vec8<T> parts[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) parts[i] = read_eight<T>(from + i * eight, step);
      v = source.finish(source.of_parts(row, col, parts), of_eight(cols - col));
      copy(from, col + kAhead * stride);
      from += kParts * eight;
      if (from == first_place) from = ring;
      write_eight(place, step, v);
    } else {
      v = source.load(row, col, of_eight(cols - col));
    }
    amax.update(v);
  }
  // Copies of a row that is nobody's: no block ends with some on their way.
  if constexpr (kShared) __pipeline_wait_prior(0);
  const uint32_t bits = row_max(amax.max_float_bits(), p.plan, at.slot, warp_amax);
  const GroupScale group = scale_from_amax(bits, Format::kMax, p.power_of_two);

  wait_for_previous();
  const auto sink = p.sink();
  if (!sink.has(at.row, cols > 0)) return;
  if (at.thread == 0) sink.put_scale(at.row, group.scale);
  const auto out = sink.row(at.row, sink.early(at.row));
  const auto end = static_cast<int>(sink.cols());
  place = first_place;
#pragma unroll 2
  for (int col = first; col < end; col += stride, place += eight) {
    const Vec8<T> v =
        kShared ? read_eight<T>(place, step) : source.load(row, col, of_eight(cols - col));
    uint2 codes = encode8<Format>(v, [&](int) { return group.quant_multiplier; });
    if constexpr (decltype(sink)::kPadded) codes = keep_first(codes, of_eight(cols - col));
    sink.put(out, col, codes);
  }
}

template <typename Format, int kMinBlocks, typename Params>
void launch_computed_rows(const Params& params, int64_t rows, cudaStream_t stream) {
  using T = ElementOf<Params>;
  const RowwisePlan& plan = params.plan;
  const int threads = plan.threads_per_row * plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(rows, plan.rows_per_block));
  const int64_t vectors = ceil_div(params.sink().cols() / 8, plan.threads_per_row);
  const size_t bytes = sizeof(Vec8<T>) * static_cast<size_t>(threads) *
                       static_cast<size_t>(vectors + kEightsAhead<T> * SourceOf<Params>::kParts);
  const auto kernel = computed_row_kernel<Params, Format, true, kMinBlocks>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  if (bytes <= shared_memory_of(reinterpret_cast<const void*>(kernel), known)) {
    launch(kernel, blocks, threads, stream, params, {.shared_bytes = bytes});
  } else {
    launch(computed_row_kernel<Params, Format, false, 1>, blocks, threads, stream, params);
  }
}

}  // namespace fp8::core
