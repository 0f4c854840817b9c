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
// for C; split-K candidates whose splits do not divide k are dropped; the heuristic is never asked
// while a stream is capturing.
#include "matmul/lt_matmul.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "common/device.h"
#include "common/formats.h"
#include "matmul/plan_cache.h"
#include "matmul/plan_key.h"
#include "matmul/plan_text.h"

namespace fp8::core {
namespace {

constexpr size_t kMaxWorkspaceBytes = size_t{32} << 20;  // what NVIDIA recommends on Hopper

// What a plan's state holds. Descriptors are plain memory here: nothing to create, destroy or leak.
struct LtPlan {
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t a;
  cublasLtMatrixLayoutOpaque_t b;
  cublasLtMatrixLayoutOpaque_t out;
  cublasLtMatmulAlgo_t algo;
};
static_assert(sizeof(LtPlan) <= MatmulPlan::kStateBytes && std::is_trivially_copyable_v<LtPlan>);

void check_lt(cublasStatus_t status, const char* call, const MatmulArgs& args) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string("fp8: ") + call + " failed with " + cublasLtGetStatusName(status) +
              " for " + describe(args));
}
#define FP8_LT_CHECK(call, args) check_lt((call), #call, args)

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

// Which algorithms the heuristic may offer.
enum class SplitK : uint8_t {
  kNone = CUBLASLT_REDUCTION_SCHEME_NONE,
  kInFp32 = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,  // splits are summed in fp32, in a fixed order
};

cublasLtMatmulPreferenceOpaque_t make_preference(const MatmulArgs& args, SplitK split_k) {
  cublasLtMatmulPreferenceOpaque_t preference{};
  FP8_LT_CHECK(cublasLtMatmulPreferenceInit(&preference), args);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    FP8_LT_CHECK(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)), args);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMaxWorkspaceBytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(args.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(args.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(args.out));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(args.out));
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(split_k));
  return preference;
}

template <typename T>
std::optional<T> configured(const cublasLtMatmulAlgo_t& algo,
                            cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value{};
  size_t written = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written);
  return status == CUBLAS_STATUS_SUCCESS ? std::optional(value) : std::nullopt;
}

// Split-K with splits that do not divide k can give wrong results (cuBLAS 12.6.3 and later).
bool is_safe(const cublasLtMatmulHeuristicResult_t& result, int64_t k) {
  if (result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kMaxWorkspaceBytes) {
    return false;
  }
  const auto splits = configured<int32_t>(result.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return splits && (*splits <= 1 || k % *splits == 0);
}

// The preference sees to it in the heuristic's answers; an algorithm from elsewhere is asked.
bool adds_in_fp32(const cublasLtMatmulAlgo_t& algo) {
  const auto scheme = configured<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME);
  return scheme && (*scheme == CUBLASLT_REDUCTION_SCHEME_NONE ||
                    *scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
}

MatmulPlan make_plan(LtPlan lt, const cublasLtMatmulHeuristicResult_t& chosen) {
  lt.algo = chosen.algo;
  MatmulPlan plan;
  std::memcpy(plan.state, &lt, sizeof(lt));
  plan.workspace_bytes = chosen.workspaceSize;
  plan.supported = true;
  return plan;
}

using Results = std::vector<cublasLtMatmulHeuristicResult_t>;

// What the heuristic answers when asked for `wanted` algorithms.
Results ask_heuristic(cublasLtHandle_t handle, const MatmulArgs& args, LtPlan lt, int wanted,
                      SplitK split_k = SplitK::kInFp32) {
  cublasLtMatmulPreferenceOpaque_t preference = make_preference(args, split_k);
  Results results(wanted);
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle, &lt.desc, &lt.a, &lt.b, &lt.out, &lt.out, &preference,
                                     wanted, results.data(), &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return {};
  FP8_LT_CHECK(status, args);
  results.resize(found);
  return results;
}

std::vector<MatmulPlan> safe_plans(const Results& results, const MatmulArgs& args,
                                   const LtPlan& lt) {
  std::vector<MatmulPlan> plans;
  for (const cublasLtMatmulHeuristicResult_t& result : results) {
    if (is_safe(result, args.k)) plans.push_back(make_plan(lt, result));
  }
  return plans;
}

// The same algorithm with another number of splits; its state says whether cuBLASLt takes it.
cublasLtMatmulHeuristicResult_t with_splits(cublasLtHandle_t handle, LtPlan lt,
                                            cublasLtMatmulAlgo_t algo, int32_t splits) {
  const auto scheme = static_cast<uint32_t>(splits > 1 ? SplitK::kInFp32 : SplitK::kNone);
  cublasLtMatmulHeuristicResult_t result{};
  cublasLtMatmulAlgoConfigSetAttribute(&algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits,
                                       sizeof(splits));
  cublasLtMatmulAlgoConfigSetAttribute(&algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                       sizeof(scheme));
  result.state =
      cublasLtMatmulAlgoCheck(handle, &lt.desc, &lt.a, &lt.b, &lt.out, &lt.out, &algo, &result);
  result.algo = algo;
  return result;
}

// The heuristic's first safe candidate. Asking for one costs a few microseconds, for eight a
// hundred: so eight only when the first one will not do. Long k and few rows can make all eight
// unsafe split-K; then it is asked for algorithms that do not split, and where it has none (split
// accumulation on an H200), the unsafe ones are tried with a number of splits that divides k.
MatmulPlan first_choice(cublasLtHandle_t handle, const MatmulArgs& args, const LtPlan& lt) {
  struct Question {
    int wanted;
    SplitK split_k;
  };
  Results unsafe;
  for (const auto [wanted, split_k] :
       {Question{1, SplitK::kInFp32}, Question{8, SplitK::kInFp32}, Question{8, SplitK::kNone}}) {
    const Results results = ask_heuristic(handle, args, lt, wanted, split_k);
    const std::vector<MatmulPlan> plans = safe_plans(results, args, lt);
    if (!plans.empty()) return plans.front();
    unsafe.insert(unsafe.end(), results.begin(), results.end());
  }
  for (const cublasLtMatmulHeuristicResult_t& result : unsafe) {
    for (const int32_t splits : {4, 2, 1}) {
      const auto changed = with_splits(handle, lt, result.algo, splits);
      if (is_safe(changed, args.k)) return make_plan(lt, changed);
    }
  }
  return {};
}

// For FP8_PRINT_PLAN. Splits of K are summed by a second kernel.
PlanFacts plan_facts(const MatmulPlan& plan) {
  if (!plan.supported) return {.algorithm = "fallback: cuBLASLt has no algorithm", .launches = 0};
  LtPlan lt;
  std::memcpy(&lt, plan.state, sizeof(lt));
  const auto number = [&](cublasLtMatmulAlgoConfigAttributes_t attribute) {
    return configured<int32_t>(lt.algo, attribute).value_or(-1);
  };
  const int32_t splits = number(CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  const std::string text = "cublasLt algo=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_ID)) +
                           " tile=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_TILE_ID)) +
                           " stages=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_STAGES_ID)) +
                           " splits=" + std::to_string(splits);
  return {text, plan.workspace_bytes, splits > 1 ? 2 : 1};
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
  cublasLtHandle_t handle = handle_of(device.index, args);
  const LtPlan lt = describe_problem(args);
  const MatmulPlan first = first_choice(handle, args, lt);
  if (!first.supported) return {};
  std::vector<MatmulPlan> candidates{first};
  for (const MatmulPlan& plan : safe_plans(ask_heuristic(handle, args, lt, max), args, lt)) {
    const bool another = algorithm_of(plan).words != algorithm_of(first).words;
    if (another && candidates.size() < static_cast<size_t>(max)) candidates.push_back(plan);
  }
  return candidates;
}

void remember_plan(const MatmulArgs& args, MatmulPlan plan) {
  require(plan.supported, "remember_plan expects a supported plan");
  plan.tuned = true;
  if (printing_plans()) print_plan(args, current_device().index, plan_facts(plan));
  Cache::instance().plans.replace(make_plan_key(args, current_device().index), plan);
}

MatmulAlgorithm algorithm_of(const MatmulPlan& plan) {
  LtPlan lt;
  std::memcpy(&lt, plan.state, sizeof(lt));
  MatmulAlgorithm algorithm{.workspace_bytes = plan.workspace_bytes};
  static_assert(sizeof(lt.algo) == sizeof(algorithm.words));
  std::memcpy(algorithm.words.data(), &lt.algo, sizeof(lt.algo));
  return algorithm;
}

MatmulPlan plan_with_algorithm(const MatmulArgs& args, const MatmulAlgorithm& algorithm) {
  const DeviceInfo device = current_device();
  if (!lt_supports(args, device.capability)) return {};
  LtPlan lt = describe_problem(args);
  cublasLtMatmulHeuristicResult_t checked{};
  std::memcpy(&checked.algo, algorithm.words.data(), sizeof(checked.algo));
  const cublasLtMatmulAlgo_t algo = checked.algo;
  checked.state = cublasLtMatmulAlgoCheck(handle_of(device.index, args), &lt.desc, &lt.a, &lt.b,
                                          &lt.out, &lt.out, &algo, &checked);
  checked.algo = algo;
  checked.workspaceSize = std::max<size_t>(checked.workspaceSize, algorithm.workspace_bytes);
  return is_safe(checked, args.k) && adds_in_fp32(algo) ? make_plan(lt, checked) : MatmulPlan{};
}

void run_matmul(const MatmulPlan& plan, const MatmulArgs& args, void* workspace, Stream stream) {
  require(plan.supported, "run_matmul expects a supported plan");
  LtPlan lt;
  std::memcpy(&lt, plan.state, sizeof(lt));
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
