// FP8::core without torch: out = a bᵀ in FP8 on own memory, an own stream and own workspaces.
//
// Quantizes two random fp32 matrices tensorwise, multiplies them with cuBLASLt, and compares with
// the same product in double on the host. Status 0: close; 1: not; 77: no GPU to run on.
#include <cuda_runtime_api.h>
#include <fp8/core.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

constexpr int64_t kM = 48, kN = 64, kK = 256;  // K and N multiples of 16, else pad the storage
constexpr int kSkipped = 77;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Device memory of this program: fp8 allocates none.
struct Buffer {
  void* data = nullptr;
  explicit Buffer(size_t bytes) { check(cudaMalloc(&data, bytes == 0 ? 1 : bytes)); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

std::vector<float> random_matrix(int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (float& value : values) value = normal(engine);
  return values;
}

// host [rows, cols] fp32 -> data [rows, cols] e4m3 and one scale, on the device.
void quantize(const std::vector<float>& host, int64_t rows, int64_t cols, const Buffer& data,
              const Buffer& scale, cudaStream_t stream) {
  Buffer x(host.size() * sizeof(float));
  check(cudaMemcpyAsync(x.data, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice,
                        stream));
  fp8::core::QuantizeArgs args;
  args.x = x.data;
  args.x_dtype = fp8::core::Dtype::kFloat32;
  args.rows = rows;
  args.cols = cols;
  args.ld = cols;
  args.data = {.data = data.data, .rows = rows, .ld = cols};
  args.scale = static_cast<float*>(scale.data);
  const Buffer workspace(fp8::core::quantize_workspace_bytes(args));
  args.workspace = workspace.data;
  fp8::core::quantize(args, stream);
  check(cudaStreamSynchronize(stream));  // x and the workspace go away now
}

std::vector<float> multiply(const Buffer& a, const Buffer& scale_a, const Buffer& b,
                            const Buffer& scale_b, cudaStream_t stream) {
  const Buffer out(kM * kN * sizeof(float));
  fp8::core::MatmulArgs args{.m = kM, .n = kN, .k = kK};
  args.a = a.data;
  args.lda = kK;
  args.b = b.data;
  args.ldb = kK;
  args.scale_a = static_cast<const float*>(scale_a.data);
  args.scale_b = static_cast<const float*>(scale_b.data);
  args.out = out.data;
  args.out_dtype = fp8::core::Dtype::kFloat32;
  args.ldo = kN;
  const fp8::core::MatmulPlan plan = fp8::core::plan_matmul(args, stream);
  if (!plan.supported) throw std::runtime_error("cuBLASLt has no FP8 matmul for this GPU");
  const Buffer workspace(plan.workspace_bytes);
  fp8::core::run_matmul(plan, args, workspace.data, stream);
  std::vector<float> result(kM * kN);
  check(cudaMemcpyAsync(result.data(), out.data, result.size() * sizeof(float),
                        cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return result;
}

// Noise over signal, both summed in squares: FP8 with three bits of mantissa gives about 0.04.
double relative_error(const std::vector<float>& a, const std::vector<float>& b,
                      const std::vector<float>& result) {
  double noise = 0, signal = 0;
  for (int64_t m = 0; m < kM; ++m) {
    for (int64_t n = 0; n < kN; ++n) {
      double exact = 0;
      for (int64_t k = 0; k < kK; ++k) exact += static_cast<double>(a[m * kK + k]) * b[n * kK + k];
      signal += exact * exact;
      noise += std::pow(result[m * kN + n] - exact, 2);
    }
  }
  return std::sqrt(noise / signal);
}

int run() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (cuBLASLt %zu)\n", fp8::core::cublaslt_runtime_version());
    return kSkipped;
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const std::vector<float> a = random_matrix(kM, kK, 1), b = random_matrix(kN, kK, 2);
  const Buffer a_data(kM * kK), a_scale(sizeof(float)), b_data(kN * kK), b_scale(sizeof(float));
  quantize(a, kM, kK, a_data, a_scale, stream);
  quantize(b, kN, kK, b_data, b_scale, stream);
  const double error = relative_error(a, b, multiply(a_data, a_scale, b_data, b_scale, stream));
  check(cudaStreamDestroy(stream));
  std::printf("relative error %.4f\n", error);
  return error > 0.01 && error < 0.06 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "core_matmul: %s\n", error.what());
    return 1;
  }
}
