// Passes over rows that lie somewhere else than they are wanted: scatter (and quantize) the rows of
// tokens to their experts, bring the experts' rows back together, and what grouped_linear does to
// its output.
//
// A token's row is read once and written top_k times; the other way round top_k rows are read and
// added up in fp32, in the order of the choices. Bound by bandwidth.
#include <algorithm>

#include "common/transpose.cuh"
#include "grouped/device.cuh"

namespace fp8::core {
namespace {

struct ScatterParams {
  ScatterRowsArgs args;
  RowwisePlan plan;
  bool vectorized;
};

template <typename T, int kVectors>
__global__ void __launch_bounds__(512, 1) scatter_rows_kernel(const ScatterParams p) {
  __shared__ uint32_t warp_amax[16];
  const ScatterRowsArgs& a = p.args;
  const int threads_per_row = p.plan.threads_per_row;
  const int slot = static_cast<int>(threadIdx.x) / threads_per_row;  // which of the block's rows
  const int thread = static_cast<int>(threadIdx.x) % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.plan.rows_per_block + slot;
  const int64_t cols = row < a.rows ? a.cols : 0;
  const T* source = static_cast<const T*>(a.x) + (row < a.rows ? row * a.ld : 0);
  const int64_t stride = static_cast<int64_t>(threads_per_row) * 8;

  Vec8<T> v[kVectors];
  const auto load = [&](int iteration) {
    const int64_t col0 = iteration * kVectors * stride + thread * 8;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      v[i] = load8(source + (col < cols ? col : 0), of_eight(cols - col), p.vectorized);
    }
  };

  GroupScale group{1.0F, 1.0F};
  if (a.data != nullptr) {
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
    group = scale_from_amax(bits, E4M3::kMax);
  }
  if (row >= a.rows) return;
  const auto destination = [&](int64_t copy) {
    return a.place == nullptr ? row : static_cast<int64_t>(__ldg(a.place + row * a.copies + copy));
  };
  if (a.data != nullptr && thread == 0) {
    for (int64_t copy = 0; copy < a.copies; ++copy) a.scale[destination(copy)] = group.scale;
  }
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    if (p.plan.iterations > 1 || a.data == nullptr) load(iteration);
    const int64_t col0 = iteration * kVectors * stride + thread * 8;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t col = col0 + i * stride;
      if (col >= cols) continue;
      uint2 codes = make_uint2(0, 0);
      if (a.data != nullptr) {
        codes = encode8<E4M3>(v[i], [&](int) { return group.quant_multiplier; });
      }
      for (int64_t copy = 0; copy < a.copies; ++copy) {
        const int64_t out = destination(copy) * a.cols + col;
        if (a.data != nullptr) {
          *reinterpret_cast<uint2*>(static_cast<uint8_t*>(a.data) + out) = codes;
        }
        if (a.plain != nullptr) store8(static_cast<T*>(a.plain) + out, v[i]);
      }
    }
  }
}

constexpr int kBatch = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineArgs a) {
  const int64_t token = blockIdx.x;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.tokens * a.top_k);
  for (int64_t col = threadIdx.x * 8; col < a.cols; col += blockDim.x * 8) {
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = 0.0F;
    // Four choices are on their way at a time; they are added in order.
    for (int64_t choice = 0; choice < a.top_k; choice += kBatch) {
      Vec8<T> v[kBatch];
      Vec8<T> bias[kBatch];
      float weight[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t slot = token * a.top_k + choice + i;
        const bool exists = choice + i < a.top_k;
        const int64_t row = exists ? __ldg(a.place + slot) : rows;
        const bool counts = row < rows;
        weight[i] = !counts ? 0.0F : a.weights != nullptr ? __ldg(a.weights + slot) : 1.0F;
        v[i] = load8(static_cast<const T*>(a.x) + (counts ? row * a.cols + col : 0), counts ? 8 : 0,
                     true);
        const bool biased = counts && a.bias != nullptr;
        bias[i] = load8(
            static_cast<const T*>(a.bias) + (biased ? __ldg(a.experts + slot) * a.cols + col : 0),
            biased ? 8 : 0, true);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum[j] = __fadd_rn(sum[j], __fmul_rn(weight[i], __fadd_rn(v[i].get(j), bias[i].get(j))));
        }
      }
    }
    Vec8<T> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) set_pair(out, j, sum[2 * j], sum[2 * j + 1]);
    store8(static_cast<T*>(a.out) + token * a.cols + col, out);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_rows_kernel(const FinishRowsArgs a) {
  const int64_t grouped = grouped_rows(a.offsets, a.groups, a.rows);
  for (int64_t row = (a.bias == nullptr ? grouped : 0) + blockIdx.x; row < a.rows;
       row += gridDim.x) {
    T* x = static_cast<T*>(a.x) + row * a.ld;
    const bool has_bias = a.bias != nullptr && row < grouped;
    const T* bias = static_cast<const T*>(a.bias) +
                    (has_bias ? group_of(a.offsets, a.groups, row) * a.cols : 0);
    for (int64_t col = threadIdx.x; col < a.cols; col += blockDim.x) {
      const float value =
          has_bias ? static_cast<float>(x[col]) + static_cast<float>(bias[col]) : 0.0F;
      if (row >= grouped || has_bias) x[col] = static_cast<T>(value);
    }
  }
}

// A block owns a group's 256 columns: eight a lane, a row a warp at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads) group_sums_kernel(const GroupSumsArgs a) {
  __shared__ float part[kWarps][256];
  const int64_t group = blockIdx.y;
  const int64_t begin = group == 0 ? 0 : max(__ldg(a.offsets + group - 1), 0);
  const int64_t end = __ldg(a.offsets + group);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * 256;
  float sum[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = 0.0F;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const int64_t slot = a.source != nullptr ? __ldg(a.source + row) : row;
    const float weight = a.weights != nullptr ? __ldg(a.weights + slot) : 1.0F;
    const T* x = static_cast<const T*>(a.x) + (a.source != nullptr ? slot / a.copies : row) * a.ld;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t col = col0 + j * 32 + lane;
      if (col < a.cols) sum[j] += weight * static_cast<float>(x[col]);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) part[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  const int64_t col = col0 + threadIdx.x;
  if (col >= a.cols) return;
  float total = 0.0F;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += part[w][threadIdx.x];
  static_cast<T*>(a.out)[group * a.cols + col] = static_cast<T>(total);
}

}  // namespace

void scatter_rows(const ScatterRowsArgs& args, Stream stream) {
  require(args.rows > 0 && args.cols > 0 && args.cols % 8 == 0,
          "scatter_rows expects rows, and columns in eights");
  require(args.data == nullptr || (args.scale != nullptr && args.cols % 16 == 0),
          "scatter_rows expects scales, and columns in sixteens, with codes");
  require(args.place != nullptr || args.copies == 1, "scatter_rows expects places for copies");
  require(on_16_bytes(args.data) && on_16_bytes(args.plain),
          "scatter_rows expects 16-byte aligned destinations");
  const ScatterParams params{
      .args = args,
      .plan = plan_rowwise(args.cols),
      .vectorized = on_16_bytes(args.x) && args.ld * dtype_bytes(args.x_dtype) % 16 == 0};
  const int threads = params.plan.threads_per_row * params.plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(args.rows, params.plan.rows_per_block));
  dispatch_input(args.x_dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    const auto go = [&](auto kernel) { launch(kernel, blocks, threads, stream, params); };
    switch (params.plan.vectors_per_thread) {
      case 1:
        return go(scatter_rows_kernel<T, 1>);
      case 2:
        return go(scatter_rows_kernel<T, 2>);
      case 4:
        return go(scatter_rows_kernel<T, 4>);
      default:
        return go(scatter_rows_kernel<T, 8>);
    }
  });
}

void combine(const CombineArgs& args, Stream stream) {
  require(args.tokens > 0 && args.cols > 0 && args.cols % 8 == 0 && on_16_bytes(args.x) &&
              on_16_bytes(args.out) && on_16_bytes(args.bias),
          "combine expects tokens, and columns in eights on 16 bytes");
  const int64_t vectors = ceil_div(args.cols, 8);
  const auto threads = static_cast<unsigned>(std::min<int64_t>(kThreads, round_up(vectors, 32)));
  dispatch_input(args.dtype, [&](auto input) {
    launch(combine_kernel<typename decltype(input)::type>, static_cast<unsigned>(args.tokens),
           threads, stream, args);
  });
}

void finish_rows(const FinishRowsArgs& args, Stream stream) {
  require(args.rows > 0 && args.cols > 0, "finish_rows expects a matrix that is not empty");
  // Without a bias there are rarely rows to do: a few blocks look.
  const int64_t blocks = std::min<int64_t>(args.rows, args.bias != nullptr ? 4096 : 256);
  dispatch_input(args.dtype, [&](auto input) {
    launch(finish_rows_kernel<typename decltype(input)::type>, static_cast<unsigned>(blocks),
           kThreads, stream, args);
  });
}

void group_sums(const GroupSumsArgs& args, Stream stream) {
  require(args.groups > 0 && args.cols > 0, "group_sums expects groups and columns");
  const dim3 grid(static_cast<unsigned>(ceil_div(args.cols, 256)),
                  static_cast<unsigned>(args.groups));
  dispatch_input(args.dtype, [&](auto input) {
    launch(group_sums_kernel<typename decltype(input)::type>, grid, kThreads, stream, args);
  });
}

}  // namespace fp8::core
