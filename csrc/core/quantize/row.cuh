// The one frame of kernels that quantize rows: a row in registers, its amax, its scale, its codes.
//
// threads_per_row threads (32 to 512) hold a row as up to 8 vectors of 8 elements each; small rows
// share a block. A longer row does not fit and is read twice, the second time mostly from L2. What
// a row is made of is the source's affair (source.cuh), where codes go is the sink's. Bound by
// bandwidth.
//
// A sink has
//
//   has(index, exists): whether a row is written; `exists`: whether its source has one.
//
//   cols(): columns that are written; from the source's on, zeros.
//
//   put_scale(index, scale): called by one thread of the row.
//
//   early(index): what row() needs, read beside the source. Not what an overlapped launch writes.
//
//   row(index, early): where a row's codes go.
//
//   put(row, col, codes): eight of them, from `col`.
#pragma once

#include <utility>

#include "core/device/codes.cuh"
#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "core/quantize/source.cuh"
#include "host/launch.h"

namespace fp8::core {

// Blocks of 512 threads to a multiprocessor, that is registers a thread: 64 of 16-bit elements keep
// twice the loads in flight that 128 do.
template <typename T>
constexpr int kRowBlocks = sizeof(T) == 4 ? 1 : 2;

// Which row a thread works on, and which of its eights.
struct RowPlace {
  int slot;  // which of the block's rows
  int thread;
  int64_t row;

  __device__ __forceinline__ explicit RowPlace(const RowwisePlan& plan)
      : RowPlace(plan, static_cast<int64_t>(blockIdx.x) * plan.rows_per_block) {}
  __device__ __forceinline__ RowPlace(const RowwisePlan& plan, int64_t first_row)
      : slot(static_cast<int>(threadIdx.x) / plan.threads_per_row),
        thread(static_cast<int>(threadIdx.x) % plan.threads_per_row),
        row(first_row + slot) {}
};

// amax of a row from its threads' parts. warp_amax: a word for each warp of the block.
__device__ __forceinline__ uint32_t row_max(uint32_t bits, const RowwisePlan& plan, int slot,
                                            uint32_t* warp_amax) {
  bits = warp_max(bits);
  if (plan.threads_per_row > 32) {
    if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = bits;
    __syncthreads();
    const int warps = plan.threads_per_row / 32;
    for (int w = 0; w < warps; ++w) bits = max(bits, warp_amax[slot * warps + w]);
  }
  return bits;
}

// Params has source() and sink(), which a kernel makes of flat members (as members of their own
// they cost ptxas 13.0 registers), `plan` and `power_of_two`.
template <typename Params>
using SourceOf = decltype(std::declval<const Params&>().source());
template <typename Params>
using ElementOf = typename SourceOf<Params>::Element;

// One row of `cols` elements, whose eights load(iteration) puts into v. warp_amax: a word for each
// warp of the block.
template <typename Format, int kVectors, typename Params, typename Sink, typename Early, typename T,
          typename Load>
__device__ __forceinline__ void quantize_row(const Params& p, const RowPlace& at, int64_t cols,
                                             const Sink& sink, const Early& early,
                                             Vec8<T> (&v)[kVectors], uint32_t* warp_amax,
                                             const Load& load) {
  const int64_t stride = static_cast<int64_t>(p.plan.threads_per_row) * 8;
  PackedAmax<T> amax;
  amax.clear();
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    load(iteration);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) amax.update(v[i]);
  }
  const uint32_t bits = row_max(amax.max_float_bits(), p.plan, at.slot, warp_amax);
  const GroupScale group = scale_from_amax(bits, Format::kMax, p.power_of_two);

  wait_for_previous();
  if (!sink.has(at.row, cols > 0)) return;
  if (at.thread == 0) sink.put_scale(at.row, group.scale);
  const auto out = sink.row(at.row, early);
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    if (p.plan.iterations > 1) load(iteration);
    const int64_t col0 = iteration * kVectors * stride + at.thread * 8;
    forget_unpacked(v);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      if (col >= sink.cols()) continue;
      const uint2 codes = encode8<Format>(v[i], [&](int) { return group.quant_multiplier; });
      sink.put(out, col, keep_first(codes, of_eight(cols - col)));
    }
  }
}

template <typename Params, typename Format, int kVectors>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<ElementOf<Params>>)
    row_kernel(const Params p) {
  __shared__ uint32_t warp_amax[kMaxRowThreads / 32];
  let_next_start();
  const RowPlace at(p.plan);
  const auto source = p.source();
  const auto row = source.row(at.row);
  const int64_t cols = source.cols_of(at.row);
  const auto sink = p.sink();
  const auto early = sink.early(at.row);
  Vec8<ElementOf<Params>> v[kVectors];
  const auto load = [&](int iteration) {
    const int64_t stride = static_cast<int64_t>(p.plan.threads_per_row) * 8;
    const int64_t col0 = iteration * kVectors * stride + at.thread * 8;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      v[i] = source.load(row, col, of_eight(cols - col));
    }
  };
  quantize_row<Format>(p, at, cols, sink, early, v, warp_amax, load);
}

// f(std::integral_constant<int, n>) with the smallest n that is enough, of kMin, twice as many, up
// to kMax.
template <int kMin, int kMax, typename F>
void with_vectors(int vectors, const F& f) {
  if constexpr (kMin < kMax) {
    if (vectors > kMin) return with_vectors<2 * kMin, kMax>(vectors, f);
  }
  f(std::integral_constant<int, kMin>{});
}

// `rows` rows, those of padding included; kMin to kMax vectors of eight elements a thread.
template <typename Format, int kMin, int kMax, typename Params>
void launch_rows(const Params& params, int64_t rows, bool pdl, cudaStream_t stream) {
  const int threads = params.plan.threads_per_row * params.plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(rows, params.plan.rows_per_block));
  with_vectors<kMin, kMax>(params.plan.vectors_per_thread, [&](auto vectors) {
    launch(row_kernel<Params, Format, decltype(vectors)::value>, blocks, threads, stream, params,
           {.pdl = pdl});
  });
}

}  // namespace fp8::core
