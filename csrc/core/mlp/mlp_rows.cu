// An MLP's h in FP8 with a scale for each row, in one pass: the frame of computed_row.cuh. Bound by
// bandwidth: 4 + 1 bytes an element (bf16).
#include "core/mlp/forward_launchers.h"
#include "core/mlp/unit.cuh"
#include "core/quantize/computed_row.cuh"

namespace fp8::core {
namespace {

constexpr int kMaxVectors = 8;  // of eight features a thread, before a row has more threads
constexpr int kBlockThreads = 128;

// Rows of padding are zeros, with a scale of 1.
struct PaddedRows {
  static constexpr bool kPadded = true;
  Destination data;
  float* scale;  // [data.rows]

  __device__ __forceinline__ bool has(int64_t row, bool /*exists*/) const {
    return row < data.rows;
  }
  __device__ __forceinline__ int64_t cols() const { return data.ld; }
  __device__ __forceinline__ void put_scale(int64_t row, float value) const { scale[row] = value; }
  __device__ __forceinline__ int early(int64_t /*row*/) const { return 0; }
  __device__ __forceinline__ uint8_t* row(int64_t index, int /*early*/) const {
    return static_cast<uint8_t*>(data.data) + index * data.ld;
  }
  __device__ __forceinline__ void put(uint8_t* row, int64_t col, uint2 codes) const {
    *reinterpret_cast<uint2*>(row + col) = codes;
  }
};

template <typename T, bool kGated>
struct UnitRows {
  MlpUnitArgs unit;
  RowwisePlan plan;
  Destination data;
  float* scale;
  bool power_of_two;

  __host__ __device__ UnitSource<T, kGated> source() const { return {unit}; }
  __host__ __device__ PaddedRows sink() const { return {data, scale}; }
};

}  // namespace

void launch_unit_rowwise(const MlpUnitArgs& unit, const RowwiseParams& params,
                         cudaStream_t stream) {
  const RowwisePlan plan = plan_rowwise(params.data.ld, kBlockThreads, kMaxVectors);
  with_unit_source(unit, [&](auto source) {
    using T = typename decltype(source)::Element;
    constexpr bool kGated = decltype(source)::kIsGated;
    launch_computed_rows<E4M3, 1>(
        UnitRows<T, kGated>{unit, plan, params.data, params.scale, params.power_of_two},
        params.data.rows, stream);
  });
}

}  // namespace fp8::core
