// Descriptors of matrices for the copy engine (core/device/hopper.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/device/check.h"

namespace fp8::core {

// A matrix of bytes [rows, cols] with ld bytes from row to row, 16-byte aligned and ld a multiple
// of 16, read in boxes of box_rows rows by 128 columns, which lie in shared memory in the order of
// the 128-byte swizzle. Arithmetic of the host, of about 0.1 us; nothing is asked of the device.
inline CUtensorMap byte_matrix_map(const void* data, int64_t rows, int64_t cols, int64_t ld,
                                   int box_rows) {
  // Of the driver, which this library does not link: it is there wherever a GPU is.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    FP8_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    require(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Error("fp8: cuTensorMapEncodeTiled failed with " + std::to_string(status) + " for [" +
                std::to_string(rows) + ", " + std::to_string(cols) + "], ld " + std::to_string(ld));
  }
  return map;
}

}  // namespace fp8::core
