// Device memory for the C++ tests of fp8_core, without torch.
#pragma once

#include <cuda_runtime_api.h>

#include <catch2/catch.hpp>
#include <random>
#include <vector>

#include "fp8/core.h"
#include "host/launch.h"

inline void check(cudaError_t status) { REQUIRE(status == cudaSuccess); }

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t count;
  explicit Buffer(size_t n) : count(n) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, n * sizeof(T) + 16));
    data = static_cast<T*>(memory);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> out(count);
    check(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

inline std::vector<float> random_matrix(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(engine);
  return values;
}

// A quantized matrix on the device, padded, tensorwise or rowwise.
struct Quantized {
  int64_t rows, cols;
  Buffer<uint8_t> data;
  Buffer<float> scale;

  Quantized(const std::vector<float>& host, int64_t rows_, int64_t cols_,
            fp8::core::Granularity granularity, cudaStream_t stream)
      : rows(rows_),
        cols(cols_),
        data(fp8::core::pad16(rows) * fp8::core::pad16(cols)),
        scale(fp8::core::pad16(rows)) {
    Buffer<float> x(host);
    fp8::core::QuantizeArgs args{
        .x = x.data, .x_dtype = fp8::core::Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
    args.granularity = granularity;
    args.data = {data.data, fp8::core::pad16(rows), fp8::core::pad16(cols)};
    args.scale = scale.data;
    Buffer<uint8_t> workspace(fp8::core::quantize_workspace_bytes(args));
    args.workspace = workspace.data;
    fp8::core::quantize(args, stream);
    check(cudaStreamSynchronize(stream));
  }
};
