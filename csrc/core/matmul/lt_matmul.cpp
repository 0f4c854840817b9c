// FP8 matmuls through cuBLASLt: plan once per problem, then one call with pointers filled in on the
// stack.
//
// Row-major out[m, n] = a[m, k] b[n, k]^T is cuBLAS's column-major TN product with A = b and B = a:
//   out^T (n x m) = (b^T)^T (n x k) * a^T (k x m),  both operands contiguous along k, as Hopper's
//   FP8 wants.
// So cuBLAS's m is our n (features, must fill 16-byte rows) and its n is our m (tokens,
// unconstrained).
//
// Guards for cuBLASLt 13.1: own alignment and extent checks; scale addresses on 16 bytes; no scale
// for C; the heuristic is never asked while a stream is capturing. lt_choice.cpp guards against
// some of its answers.
#include "core/matmul/lt_matmul.h"

#include <cublasLt.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "core/device/device.h"
#include "core/matmul/lt_choice.h"
#include "core/matmul/lt_plan.h"
#include "host/formats.h"
#include "host/plan_cache.h"
#include "host/plan_key.h"
#include "host/plan_text.h"

namespace fp8::core {
namespace {

cublasLtHandle_t handle_of(int device, const MatmulArgs& args) {
  // Never destroyed: at process exit the driver may be gone before static destructors run.
  static std::array<std::atomic<cublasLtHandle_t>, kMaxDevices> handles{};
  static std::mutex mutex;
  cublasLtHandle_t handle = handles[device].load(std::memory_order_acquire);
  if (handle != nullptr) return handle;
  const std::lock_guard lock(mutex);
  handle = handles[device].load(std::memory_order_acquire);
  if (handle == nullptr) {
    FP8_LT_CHECK(cublasLtCreate(&handle), args);
    handles[device].store(handle, std::memory_order_release);
  }
  return handle;
}

cudaDataType_t cuda_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return CUDA_R_32F;
    case Dtype::kBFloat16:
      return CUDA_R_16BF;
    case Dtype::kFloat16:
      return CUDA_R_16F;
    case Dtype::kE4M3:
      return CUDA_R_8F_E4M3;
    default:
      return CUDA_R_8F_E5M2;
  }
}

template <typename T>
void set(cublasLtMatmulDescOpaque_t& desc, cublasLtMatmulDescAttributes_t attribute, const T& value,
         const MatmulArgs& args) {
  FP8_LT_CHECK(cublasLtMatmulDescSetAttribute(&desc, attribute, &value, sizeof(value)), args);
}

void set_pointers(cublasLtMatmulDescOpaque_t& desc, const MatmulArgs& args) {
  set(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.scale_b, args);
  set(desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.scale_a, args);
  if (args.bias != nullptr) set(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias, args);
}

int32_t scale_mode(Granularity granularity) {
  switch (granularity) {
    case Granularity::kTensorwise:
      return CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
    case Granularity::kRowwise:
      return CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    case Granularity::kBlock1x128:
      return CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    default:
      return CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
  }
}

LtPlan describe_problem(const MatmulArgs& args) {
  LtPlan lt{};
  FP8_LT_CHECK(cublasLtMatmulDescInit(&lt.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), args);
  set(lt.desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T, args);
  set(lt.desc, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N, args);
  set(lt.desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(accumulates_fast(args)), args);
  if (args.granularity != Granularity::kTensorwise) {
    set(lt.desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scale_mode(granularity_of_b(args)), args);
    set(lt.desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scale_mode(args.granularity), args);
  }
  if (args.bias != nullptr) {
    set(lt.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS, args);
    set(lt.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
        static_cast<int32_t>(cuda_type(args.bias_dtype)), args);
  }
  set_pointers(lt.desc, args);
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t& l, Dtype dtype, int64_t rows, int64_t cols,
                          int64_t ld) {
    FP8_LT_CHECK(cublasLtMatrixLayoutInit(&l, cuda_type(dtype), static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(cols), ld),
                 args);
  };
  layout(lt.a, args.b_dtype, args.k, args.n, args.ldb);
  layout(lt.b, args.a_dtype, args.k, args.m, args.lda);
  layout(lt.out, args.out_dtype, args.n, args.m, args.ldo);
  return lt;
}

struct Cache {
  using Plans = PlanCache<PlanKey, MatmulPlan, PlanKeyHash>;
  Plans plans{capacity()};
  std::atomic<int64_t> fallbacks{0};

  static size_t capacity() {
    const char* text = std::getenv("FP8_PLAN_CACHE_CAPACITY");
    const long value = text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    return value > 0 ? static_cast<size_t>(value) : 4096;
  }
  static Cache& instance() {
    static Cache cache;
    return cache;
  }
};

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FP8_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void refuse_capture(const MatmulArgs& args, Stream stream) {
  if (!is_capturing(stream)) return;
  throw Error("fp8: " + describe(args) +
              " is not planned yet, and cuBLASLt must not be asked while a CUDA graph is being "
              "captured: run one warm-up iteration with the same shapes before the capture");
}

}  // namespace

bool lt_supports(const MatmulArgs& args, int capability) {
  constexpr int64_t kMaxRowBytes = int64_t{1} << 31;  // longer rows give wrong results before 13.3
  const int64_t out_bytes = dtype_bytes(args.out_dtype);
  const bool formats = is_fp8(args.a_dtype) && is_fp8(args.b_dtype) && !is_fp8(args.out_dtype) &&
                       !(args.a_dtype == Dtype::kE5M2 && args.b_dtype == Dtype::kE5M2);
  const Granularity a = args.granularity;
  const Granularity b = granularity_of_b(args);
  const bool both_squares = a == Granularity::kBlock128x128 && b == Granularity::kBlock128x128;
  // Blocks: cuBLASLt strides over the scales by m and n, which it wants in multiples of 4 (a vector
  // of n 8, by other libraries' experience), and has no epilogue with a bias.
  const bool scales = has_block_scales(args)
                          ? is_blockwise(a) && is_blockwise(b) && !both_squares &&
                                args.m % 8 == 0 && args.n % 8 == 0 && args.bias == nullptr
                          : a == b;
  const bool device =
      args.granularity == Granularity::kTensorwise ? capability >= 89 : capability == 90;
  const bool extents = args.m > 0 && args.n > 0 && args.k > 0 && args.k % 16 == 0 &&
                       args.lda % 16 == 0 && args.ldb % 16 == 0 && args.n * out_bytes % 16 == 0 &&
                       args.ldo * out_bytes % 16 == 0 && args.lda < kMaxRowBytes &&
                       args.ldb < kMaxRowBytes && args.ldo * out_bytes < kMaxRowBytes;
  const bool aligned = alignment_of(args.a) >= 16 && alignment_of(args.b) >= 16 &&
                       alignment_of(args.out) >= 16 && alignment_of(args.scale_a) >= 16 &&
                       alignment_of(args.scale_b) >= 16;
  const Dtype bias_dtype = args.out_dtype == Dtype::kFloat16 ? Dtype::kFloat16 : Dtype::kBFloat16;
  const bool bias = args.bias == nullptr || (args.bias_dtype == bias_dtype && !args.accumulate &&
                                             alignment_of(args.bias) >= 16);
  return formats && scales && device && extents && aligned && bias;
}

MatmulPlan plan_matmul(const MatmulArgs& args, Stream stream) {
  const DeviceInfo device = current_device(args.device);
  if (!lt_supports(args, device.capability)) {
    Cache::instance().fallbacks.fetch_add(1, std::memory_order_relaxed);
    if (printing_plans()) print_plan(args, device.index, plan_facts({}));
    return {};
  }
  const PlanKey key = make_plan_key(args, device.index);
  Cache& cache = Cache::instance();
  if (auto known = cache.plans.find(key)) {
    if (!known->supported) cache.fallbacks.fetch_add(1, std::memory_order_relaxed);
    return *known;
  }
  refuse_capture(args, stream);
  const MatmulPlan plan = first_choice(handle_of(device.index, args), args, describe_problem(args));
  if (!plan.supported) cache.fallbacks.fetch_add(1, std::memory_order_relaxed);
  if (printing_plans()) print_plan(args, device.index, plan_facts(plan));
  cache.plans.insert(key, plan);
  return plan;
}

std::vector<MatmulPlan> matmul_candidates(const MatmulArgs& args, int max, Stream stream) {
  const DeviceInfo device = current_device();
  if (!lt_supports(args, device.capability)) return {};
  refuse_capture(args, stream);
  return all_choices(handle_of(device.index, args), args, describe_problem(args), max);
}

void remember_plan(const MatmulArgs& args, MatmulPlan plan) {
  require(plan.supported, "remember_plan expects a supported plan");
  plan.tuned = true;
  if (printing_plans()) print_plan(args, current_device().index, plan_facts(plan));
  Cache::instance().plans.replace(make_plan_key(args, current_device().index), plan);
}

MatmulPlan plan_with_algorithm(const MatmulArgs& args, const MatmulAlgorithm& algorithm) {
  const DeviceInfo device = current_device();
  if (!lt_supports(args, device.capability)) return {};
  return given_choice(handle_of(device.index, args), args, describe_problem(args), algorithm);
}

void run_matmul(const MatmulPlan& plan, const MatmulArgs& args, void* workspace, Stream stream) {
  require(plan.supported, "run_matmul expects a supported plan");
  LtPlan lt = unpack(plan);
  set_pointers(lt.desc, args);
  const float alpha = 1.0F;
  const float beta = args.accumulate ? 1.0F : 0.0F;
  // C is out itself: read for beta = 1, ignored for beta = 0. It never has a scale.
  FP8_LT_CHECK(cublasLtMatmul(handle_of(current_device(args.device).index, args), &lt.desc, &alpha,
                              args.b, &lt.a, args.a, &lt.b, &beta, args.out, &lt.out, args.out,
                              &lt.out, &lt.algo, workspace, plan.workspace_bytes, stream),
               args);
}

PlanCacheInfo plan_cache_info() {
  Cache& cache = Cache::instance();
  const auto info = cache.plans.info();
  return {static_cast<int64_t>(info.size),
          static_cast<int64_t>(info.capacity),
          static_cast<int64_t>(info.hits),
          static_cast<int64_t>(info.misses),
          cache.fallbacks.load(),
          static_cast<int64_t>(
              cache.plans.count_if([](const MatmulPlan& plan) { return plan.tuned; }))};
}

void plan_cache_clear() {
  Cache::instance().plans.clear();
  Cache::instance().fallbacks.store(0);
}

size_t cublaslt_runtime_version() { return cublasLtGetVersion(); }

}  // namespace fp8::core
