// Passes over rows that lie somewhere else than they are wanted: scatter (and quantize) the rows of
// tokens to their experts, bring the experts' rows back together, and what grouped_linear does to
// its output.
//
// A token's row is read once and written top_k times; the other way round top_k rows are read and
// added up in fp32, in the order of the choices. Bound by bandwidth.
#include <algorithm>

#include "core/grouped/device.cuh"
#include "core/quantize/row_blocks.cuh"

namespace fp8::core {
namespace {

constexpr int kScatterThreads = 128;  // of a block of short rows

// A row's codes, once for each copy.
struct ScatteredRows {
  uint8_t* data;
  float* scale;
  const int32_t* place;  // nullptr: a row's own place, once
  int rows;
  int copies;
  int row_bytes;

  __device__ __forceinline__ bool has(int64_t /*row*/, bool exists) const { return exists; }
  __device__ __forceinline__ int64_t cols() const { return row_bytes; }
  __device__ __forceinline__ int64_t place_of(int64_t row, int copy) const {
    return place == nullptr ? row : __ldg(place + row * copies + copy);
  }
  // block: of the row's blocks, whose scales lie one matrix row below the other.
  __device__ __forceinline__ void put_scale(int64_t row, float value, unsigned block = 0) const {
    float* of_block = scale + static_cast<int64_t>(rows) * copies * block;
#pragma unroll 1
    for (int copy = 0; copy < copies; ++copy) of_block[place_of(row, copy)] = value;
  }
  struct Row {
    int64_t index;
    uint8_t* first;  // its first copy
  };
  // The place of the first copy.
  __device__ __forceinline__ int64_t early(int64_t index) const {
    if (place == nullptr) return index;
    return index < rows ? __ldg(place + index * copies) : 0;
  }
  __device__ __forceinline__ Row row(int64_t index, int64_t early) const {
    return {index, data + early * row_bytes};
  }
  __device__ __forceinline__ void put(const Row& row, int64_t col, uint2 codes) const {
    *reinterpret_cast<uint2*>(row.first + col) = codes;
#pragma unroll 1
    for (int copy = 1; copy < copies; ++copy) {
      *reinterpret_cast<uint2*>(data + place_of(row.index, copy) * row_bytes + col) = codes;
    }
  }
};

template <typename T>
struct ScatterParams {
  ScatterRowsArgs args;
  RowwisePlan plan;
  bool power_of_two;
  bool vectorized;

  __host__ __device__ MatrixSource<T> source() const {
    return {static_cast<const T*>(args.x), args.rows, args.cols, args.ld, vectorized};
  }
  __host__ __device__ ScatteredRows sink() const {
    return {static_cast<uint8_t*>(args.data),
            args.scale,
            args.place,
            static_cast<int>(args.rows),
            static_cast<int>(args.copies),
            static_cast<int>(args.cols)};
  }
};

// The rows as they are: a block a row. Where its copies go is known to all threads before the row
// itself is there.
template <typename T>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const ScatterParams<T> p) {
  constexpr int kBatch = 8;
  const int64_t index = blockIdx.x;
  const int64_t cols = p.args.cols;
  const auto source = p.source();
  const auto row = source.row(index);
  for (int64_t first = 0; first < p.args.copies; first += kBatch) {
    T* to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t copy = min(first + i, p.args.copies - 1);
      to[i] =
          static_cast<T*>(p.args.plain) + p.sink().place_of(index, static_cast<int>(copy)) * cols;
    }
    for (int64_t col = threadIdx.x * 8; col < cols; col += blockDim.x * 8) {
      const Vec8<T> v = source.load(row, col, of_eight(cols - col));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < p.args.copies) store8(to[i] + col, v);
      }
    }
  }
}

// Threads that share a row of `cols` elements, eight each at a time.
unsigned threads_of_row(int64_t cols) {
  return static_cast<unsigned>(std::min<int64_t>(kThreads, round_up(ceil_div(cols, 8), 32)));
}

// kBias: of the experts' rows.
template <typename T, bool kBias>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineArgs a) {
  constexpr int kBatch = kBias ? 4 : 8;
  const int64_t token = blockIdx.x;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.tokens * a.top_k);
  for (int64_t col = threadIdx.x * 8; col < a.cols; col += blockDim.x * 8) {
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = 0.0F;
    // A batch of choices is on its way at a time; they are added in order.
    for (int64_t choice = 0; choice < a.top_k; choice += kBatch) {
      Vec8<T> v[kBatch];
      Vec8<T> bias[kBias ? kBatch : 1];
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
        if constexpr (kBias) {
          bias[i] = load8(
              static_cast<const T*>(a.bias) + (counts ? __ldg(a.experts + slot) * a.cols + col : 0),
              counts ? 8 : 0, true);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float value = kBias ? __fadd_rn(v[i].get(j), bias[kBias ? i : 0].get(j))
                                    : __fadd_rn(v[i].get(j), 0.0F);
          sum[j] = __fadd_rn(sum[j], __fmul_rn(weight[i], value));
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
  dispatch_input(args.x_dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    const ScatterParams<T> params{
        .args = args,
        .plan = plan_rowwise(args.cols, kScatterThreads),
        .power_of_two = args.power_of_two,
        .vectorized = on_16_bytes(args.x) && args.ld * dtype_bytes(args.x_dtype) % 16 == 0};
    if (args.data != nullptr) {
      dispatch_format(args.dtype, [&](auto format) {
        using Format = typename decltype(format)::type;
        if (args.granularity == Granularity::kBlock1x128) {
          launch_row_blocks<Format>(params, args.rows, args.cols, stream);
        } else {
          launch_rows<Format, 1, kMaxRowVectors>(params, args.rows, /*pdl=*/false, stream);
        }
      });
    }
    if (args.plain != nullptr) {
      launch(copy_rows_kernel<T>, static_cast<unsigned>(args.rows), threads_of_row(args.cols),
             stream, params);
    }
  });
}

void combine(const CombineArgs& args, Stream stream) {
  require(args.tokens > 0 && args.cols > 0 && args.cols % 8 == 0 && on_16_bytes(args.x) &&
              on_16_bytes(args.out) && on_16_bytes(args.bias),
          "combine expects tokens, and columns in eights on 16 bytes");
  dispatch_input(args.dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    const auto kernel = args.bias != nullptr ? combine_kernel<T, true> : combine_kernel<T, false>;
    launch(kernel, static_cast<unsigned>(args.tokens), threads_of_row(args.cols), stream, args);
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
