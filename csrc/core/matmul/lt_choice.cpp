// The choice of an algorithm. cuBLASLt's heuristic ranks candidates for a problem; those that would
// compute wrongly are dropped (split-K whose splits do not divide k), and only sums in fp32 are
// asked for, in a fixed order.
#include "core/matmul/lt_choice.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "host/plan_key.h"

namespace fp8::core {
namespace {

constexpr size_t kMaxWorkspaceBytes = size_t{32} << 20;  // what NVIDIA recommends on Hopper

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

}  // namespace

// Asking for one candidate costs a few microseconds, for eight a hundred: so eight only when the
// first one will not do. Long k and few rows can make all eight unsafe split-K; then the heuristic
// is asked for algorithms that do not split, and where it has none (split accumulation on an H200),
// the unsafe ones are tried with a number of splits that divides k.
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

std::vector<MatmulPlan> all_choices(cublasLtHandle_t handle, const MatmulArgs& args,
                                    const LtPlan& lt, int max) {
  const MatmulPlan first = first_choice(handle, args, lt);
  if (!first.supported) return {};
  std::vector<MatmulPlan> candidates{first};
  for (const MatmulPlan& plan : safe_plans(ask_heuristic(handle, args, lt, max), args, lt)) {
    const bool another = algorithm_of(plan).words != algorithm_of(first).words;
    if (another && candidates.size() < static_cast<size_t>(max)) candidates.push_back(plan);
  }
  return candidates;
}

MatmulPlan given_choice(cublasLtHandle_t handle, const MatmulArgs& args, LtPlan lt,
                        const MatmulAlgorithm& algorithm) {
  cublasLtMatmulHeuristicResult_t checked{};
  std::memcpy(&checked.algo, algorithm.words.data(), sizeof(checked.algo));
  const cublasLtMatmulAlgo_t algo = checked.algo;
  checked.state =
      cublasLtMatmulAlgoCheck(handle, &lt.desc, &lt.a, &lt.b, &lt.out, &lt.out, &algo, &checked);
  checked.algo = algo;
  checked.workspaceSize = std::max<size_t>(checked.workspaceSize, algorithm.workspace_bytes);
  return is_safe(checked, args.k) && adds_in_fp32(algo) ? make_plan(lt, checked) : MatmulPlan{};
}

MatmulAlgorithm algorithm_of(const MatmulPlan& plan) {
  const LtPlan lt = unpack(plan);
  MatmulAlgorithm algorithm{.workspace_bytes = plan.workspace_bytes};
  static_assert(sizeof(lt.algo) == sizeof(algorithm.words));
  std::memcpy(algorithm.words.data(), &lt.algo, sizeof(lt.algo));
  return algorithm;
}

PlanFacts plan_facts(const MatmulPlan& plan) {
  if (!plan.supported) return {.algorithm = "fallback: cuBLASLt has no algorithm", .launches = 0};
  const LtPlan lt = unpack(plan);
  const auto number = [&](cublasLtMatmulAlgoConfigAttributes_t attribute) {
    return configured<int32_t>(lt.algo, attribute).value_or(-1);
  };
  const int32_t splits = number(CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  const std::string text = "cublasLt algo=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_ID)) +
                           " tile=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_TILE_ID)) +
                           " stages=" + std::to_string(number(CUBLASLT_ALGO_CONFIG_STAGES_ID)) +
                           " splits=" + std::to_string(splits);
  // Splits of K are summed by a second kernel.
  return {text, plan.workspace_bytes, splits > 1 ? 2 : 1};
}

}  // namespace fp8::core
