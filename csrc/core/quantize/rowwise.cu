// Rowwise quantization of a matrix in one pass (row.cuh): 2 + 1 bytes an element. Where the maxima
// of columns are wanted too, as for a weight whose transposed copy the backward will need, a block
// takes several rows one after the other and joins what it found with the other blocks': an
// integer atomicMax, which has no order, so the bits are the same on every run.
#include <array>
#include <atomic>

#include "core/device/next_rows.cuh"
#include "core/device/shared_memory.h"
#include "core/quantize/kernels.h"
#include "core/quantize/padded_rows.cuh"
#include "core/quantize/row.cuh"

namespace fp8::core {
namespace {

template <typename T>
struct MatrixRows : RowwiseParams {
  __host__ __device__ MatrixSource<T> source() const { return matrix_source<T>(*this); }
  __host__ __device__ PaddedRows sink() const { return {data, scale}; }
};

// A block's rows end with its part of the group.
struct PartOfGroup : PaddedRows {
  int64_t end;

  __device__ __forceinline__ bool has(int64_t row, bool /*exists*/) const { return row < end; }
};

template <typename T>
struct GroupRows : MatrixRows<T> {
  int64_t group_rows;
  int64_t rows_per_block;
  int64_t blocks_per_group;
  uint32_t* column_amax;
};

// A warp's maxima of 256 columns, eight a thread, joined with what lies at `out`. Turned in shared
// memory, so that the lanes of each atomic lie side by side.
template <typename T>
__device__ __forceinline__ void join_columns(const PackedAmax<T>& amax, int64_t cols,  // from `out`
                                             uint32_t* scratch, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < 8; ++j) scratch[lane * 8 + j] = amax.float_bits(j);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int col = j * 32 + lane;
    const uint32_t bits = scratch[col];
    if (col < cols && bits != 0) atomicMax(out + col, bits);
  }
  __syncwarp();
}

template <typename Params, typename Format, int kVectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1) group_rows_kernel(const Params p) {
  using T = ElementOf<Params>;
  constexpr int kSlots = kColumnAmaxSlots;
  extern __shared__ uint4 shared[];
  __shared__ uint32_t warp_amax[2][kMaxRowThreads / 32];  // of this row and of the one before
  const int64_t group = blockIdx.x / p.blocks_per_group;
  const int64_t done = blockIdx.x % p.blocks_per_group * p.rows_per_block;
  const int64_t begin = group * p.group_rows + done;
  const int64_t end = begin + min(p.rows_per_block, p.group_rows - done);
  const auto source = p.source();
  const PartOfGroup sink{p.sink(), end};
  const RowPlace first(p.plan, begin);
  const int step = p.plan.rows_per_block;
  const int stride = p.plan.threads_per_row * 8;
  const NextRows<T, kVectors> next{first.thread * 8, stride, static_cast<int>(p.cols)};
  const uint32_t slots = first_slot(shared);

  const auto copy = [&](int slot, int64_t row) {
    const uint32_t to = slots + slot * next.bytes();
    if (row < end && p.vectorized) next.copy_async(to, source.row(row));
    if (row < end && !p.vectorized) next.copy_now(to, source.row(row), false);
    __pipeline_commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < kSlots - 1; ++ahead) copy(ahead, first.row + ahead * step);
  PackedAmax<T> columns[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) columns[i].clear();
  int slot = 0;
  int turn = 0;
#pragma unroll 1
  for (RowPlace at = first; at.row - at.slot < end; at.row += step) {
    copy(slot == 0 ? kSlots - 1 : slot - 1, at.row + (kSlots - 1) * step);
    __pipeline_wait_prior(kSlots - 1);
    Vec8<T> v[kVectors];
    quantize_row<Format>(
        p, at, at.row < end ? p.cols : 0, sink, 0, v, warp_amax[turn], [&](int /*iteration*/) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            v[i] = at.row < end ? next.take(slots + slot * next.bytes(), i) : zero8<T>();
            columns[i].update(v[i]);
          }
        });
    turn ^= 1;
    slot = slot == kSlots - 1 ? 0 : slot + 1;
  }
  __syncthreads();  // the slots become scratch
  const int64_t warp_col = first.thread / 32 * 256;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t col = warp_col + i * stride;
    join_columns(columns[i], p.cols - col,
                 reinterpret_cast<uint32_t*>(shared) + threadIdx.x / 32 * 256,
                 p.column_amax + group * p.cols + col);
  }
}

template <typename Format, int kVectors, typename Params>
void launch_group_rows(const Params& params, unsigned blocks, cudaStream_t stream) {
  const auto kernel = group_rows_kernel<Params, Format, kVectors>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  shared_memory_of(reinterpret_cast<const void*>(kernel), known);
  const int threads = params.plan.threads_per_row * params.plan.rows_per_block;
  const size_t slot = sizeof(Vec8<ElementOf<Params>>) * static_cast<size_t>(kVectors * threads);
  launch(kernel, blocks, threads, stream, params, {.shared_bytes = kColumnAmaxSlots * slot});
}

}  // namespace

void launch_rowwise(const RowwiseParams& params, Dtype x_dtype, Dtype dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      launch_rows<typename decltype(format)::type, 1, kMaxRowVectors>(
          MatrixRows<typename decltype(input)::type>{params}, params.data.rows, params.pdl, stream);
    });
  });
}

void launch_rowwise_column_amax(const RowwiseParams& params, const ColumnAmaxPlan& plan,
                                int64_t group_rows, uint32_t* column_amax, Dtype x_dtype,
                                Dtype dtype, cudaStream_t stream) {
  const int64_t groups = params.rows / group_rows;
  FP8_CUDA_CHECK(cudaMemsetAsync(
      column_amax, 0, static_cast<size_t>(groups * params.cols) * sizeof(uint32_t), stream));
  const auto blocks = static_cast<unsigned>(groups * plan.blocks_per_group);
  dispatch_input(x_dtype, [&](auto input) {
    const GroupRows<typename decltype(input)::type> rows{
        {params}, group_rows, plan.rows_per_block, plan.blocks_per_group, column_amax};
    dispatch_format(dtype, [&](auto format) {
      with_vectors<1, kMaxColumnAmaxVectors>(plan.row.vectors_per_thread, [&](auto vectors) {
        launch_group_rows<typename decltype(format)::type, decltype(vectors)::value>(rows, blocks,
                                                                                     stream);
      });
    });
  });
}

}  // namespace fp8::core
