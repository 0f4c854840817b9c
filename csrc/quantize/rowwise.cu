// Rowwise quantization in one pass: a row is read once into registers, its amax reduced, and cast.
//
// threads_per_row threads (32 to 512) hold a row as up to 8 vectors of 8 elements each; small rows
// share a block. A row longer than 512 * 8 * 8 elements does not fit and is read twice, the second
// time mostly from L2. Bound by bandwidth: 2 + 1 bytes an element.
#include "common/reduce.cuh"
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"

namespace fp8::core {
namespace {

// Blocks of 512 threads to a multiprocessor, that is registers a thread: 64 of 16-bit elements keep
// twice the loads in flight that 128 do.
template <typename T>
constexpr int kMinBlocks = sizeof(T) == 4 ? 1 : 2;

template <typename T, typename Format, int kVectors>
__global__ void __launch_bounds__(512, kMinBlocks<T>) rowwise_kernel(const RowwiseParams p) {
  __shared__ uint32_t warp_amax[16];
  let_next_start();
  const int threads_per_row = p.plan.threads_per_row;
  const int slot = static_cast<int>(threadIdx.x) / threads_per_row;  // which of the block's rows
  const int thread = static_cast<int>(threadIdx.x) % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.plan.rows_per_block + slot;
  const T* source = static_cast<const T*>(p.x) + row * p.ld;
  const int64_t cols = row < p.rows ? p.cols : 0;
  const int64_t stride = static_cast<int64_t>(threads_per_row) * 8;

  Vec8<T> v[kVectors];
  const auto load = [&](int iteration) {
    const int64_t col0 = iteration * kVectors * stride + thread * 8;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      v[i] = load8(source + col, of_eight(cols - col), p.vectorized);
    }
  };

  PackedAmax<T> amax;
  amax.clear();
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    load(iteration);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) amax.update(v[i]);
  }
  uint32_t bits = warp_max(amax.max_float_bits());
  if (threads_per_row > 32) {
    if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = bits;
    __syncthreads();
    const int warps = threads_per_row / 32;
    for (int w = 0; w < warps; ++w) bits = max(bits, warp_amax[slot * warps + w]);
  }
  const GroupScale group = scale_from_amax(bits, Format::kMax, p.power_of_two);

  wait_for_previous();
  if (row >= p.data.rows) return;
  if (thread == 0) p.scale[row] = group.scale;
  uint8_t* out = static_cast<uint8_t*>(p.data.data) + row * p.data.ld;
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    if (p.plan.iterations > 1) load(iteration);
    const int64_t col0 = iteration * kVectors * stride + thread * 8;
    forget_unpacked(v);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      if (col >= p.data.ld) continue;
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = encode2<Format>(v[i].get(2 * j) * group.quant_multiplier,
                                   v[i].get(2 * j + 1) * group.quant_multiplier);
      }
      const uint2 codes = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
      *reinterpret_cast<uint2*>(out + col) = keep_first(codes, of_eight(cols - col));
    }
  }
}

template <typename T, typename Format>
void launch_typed(const RowwiseParams& params, cudaStream_t stream) {
  const int threads = params.plan.threads_per_row * params.plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(params.data.rows, params.plan.rows_per_block));
  const auto go = [&](auto kernel) {
    launch(kernel, blocks, threads, stream, params,
           {.overlaps_previous = params.overlaps_previous});
  };
  switch (params.plan.vectors_per_thread) {
    case 1:
      return go(rowwise_kernel<T, Format, 1>);
    case 2:
      return go(rowwise_kernel<T, Format, 2>);
    case 4:
      return go(rowwise_kernel<T, Format, 4>);
    default:
      return go(rowwise_kernel<T, Format, 8>);
  }
}

}  // namespace

void launch_rowwise(const RowwiseParams& params, Dtype x_dtype, Dtype dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      launch_typed<typename decltype(input)::type, typename decltype(format)::type>(params, stream);
    });
  });
}

}  // namespace fp8::core
