// Rowwise quantization of a matrix in one pass (row.cuh): 2 + 1 bytes an element.
#include "core/quantize/kernels.h"
#include "core/quantize/row.cuh"

namespace fp8::core {
namespace {

// Rows and columns of padding are zeros, with a scale of 1.
struct PaddedRows {
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

template <typename T>
struct MatrixRows : RowwiseParams {
  __host__ __device__ MatrixSource<T> source() const { return matrix_source<T>(*this); }
  __host__ __device__ PaddedRows sink() const { return {data, scale}; }
};

}  // namespace

void launch_rowwise(const RowwiseParams& params, Dtype x_dtype, Dtype dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      launch_rows<typename decltype(format)::type, 1, kMaxRowVectors>(
          MatrixRows<typename decltype(input)::type>{params}, params.data.rows, params.pdl, stream);
    });
  });
}

}  // namespace fp8::core
