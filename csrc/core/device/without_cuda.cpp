// fp8_core where there is no CUDA: in a build without nvcc, and in the wheel beside the real one,
// for a torch without CUDA. So libfp8_torch is one library for both.
//
// What is asked before a launch answers with nothing; what launches throws. The torch layer says
// why before it gets there (torch/common/cuda_context.h).
#include "fp8/core.h"
#include "fp8/core_decode.h"
#include "fp8/core_device.h"
#include "fp8/core_grouped.h"
#include "fp8/core_joined.h"
#include "fp8/core_mlp.h"
#include "fp8/core_norm.h"
#include "fp8/core_rope.h"

namespace fp8::core {
namespace {

[[noreturn]] void refuse(const char* function) {
  throw Error(std::string("fp8: core::") + function +
              " needs CUDA, and this fp8_core was built without it");
}

}  // namespace

bool has_cuda() { return false; }
int compute_capability(int) { refuse("compute_capability"); }
std::string current_device_name() { refuse("current_device_name"); }
size_t l2_bytes() { refuse("l2_bytes"); }
uint64_t capture_id(Stream) { refuse("capture_id"); }

size_t quantize_workspace_bytes(const QuantizeArgs&) { return 0; }
size_t quantize_joined_workspace_bytes(const JoinedArgs&) { return 0; }
size_t mlp_forward_workspace_bytes(const MlpForwardArgs&) { return 0; }
size_t mlp_backward_workspace_bytes(const MlpBackwardArgs&) { return 0; }
bool mlp_backward_takes_codes(const MlpUnitArgs&) { return false; }
bool mlp_backward_makes_blocks(const MlpUnitArgs&) { return false; }
int64_t route_workspace_words(const RouteArgs&) { return 0; }
int64_t norm_workspace_floats(const NormBackwardArgs&) { return 0; }
int64_t norm_amax_parts(const NormForwardArgs&) { return 0; }
bool suits_joined(const JoinedArgs&) { return false; }
bool suits_grouped_mm(const GroupedMmArgs&) { return false; }

void quantize(const QuantizeArgs&, Stream) { refuse("quantize"); }
void quantize_joined(const JoinedArgs&, Stream) { refuse("quantize_joined"); }
void quantize_normed(const QuantizeArgs&, int64_t, Stream) { refuse("quantize_normed"); }
void dequantize(const DequantizeArgs&, Stream) { refuse("dequantize"); }
void route(const RouteArgs&, Stream) { refuse("route"); }
void scatter_rows(const ScatterRowsArgs&, Stream) { refuse("scatter_rows"); }
void make_tile_table(const TileTableArgs&, Stream) { refuse("make_tile_table"); }
void quantize_group_columns(const GroupColumnsArgs&, Stream) { refuse("quantize_group_columns"); }
void quantize_stack_squares(const StackSquaresArgs&, Stream) { refuse("quantize_stack_squares"); }
void gate_forward(const GateForwardArgs&, Stream) { refuse("gate_forward"); }
void gate_backward(const GateBackwardArgs&, Stream) { refuse("gate_backward"); }
void combine(const CombineArgs&, Stream) { refuse("combine"); }
void finish_rows(const FinishRowsArgs&, Stream) { refuse("finish_rows"); }
void grouped_mm(const GroupedMmArgs&, Stream) { refuse("grouped_mm"); }
void group_sums(const GroupSumsArgs&, Stream) { refuse("group_sums"); }
void mlp_forward(const MlpForwardArgs&, Stream) { refuse("mlp_forward"); }
void mlp_backward(const MlpBackwardArgs&, Stream) { refuse("mlp_backward"); }
void mlp_values(const MlpValuesArgs&, Stream) { refuse("mlp_values"); }
void norm_forward(const NormForwardArgs&, Stream) { refuse("norm_forward"); }
void norm_backward(const NormBackwardArgs&, Stream) { refuse("norm_backward"); }
void rope(const RopeArgs&, Stream) { refuse("rope"); }

bool suits_decode(const DecodeArgs&) { return false; }
size_t decode_workspace_bytes(const DecodeArgs&) { return 0; }
void decode(const DecodeArgs&, Stream) { refuse("decode"); }

MatmulPlan plan_matmul(const MatmulArgs&, Stream) { refuse("plan_matmul"); }
void run_matmul(const MatmulPlan&, const MatmulArgs&, void*, Stream) { refuse("run_matmul"); }
std::vector<MatmulPlan> matmul_candidates(const MatmulArgs&, int, Stream) {
  refuse("matmul_candidates");
}
std::vector<TimedMatmul> time_matmuls(const std::vector<MatmulPlan>&, const MatmulArgs&, void*, int,
                                      const std::function<void()>&, Stream) {
  refuse("time_matmuls");
}
void remember_plan(const MatmulArgs&, MatmulPlan) { refuse("remember_plan"); }
MatmulAlgorithm algorithm_of(const MatmulPlan&) { refuse("algorithm_of"); }
MatmulPlan plan_with_algorithm(const MatmulArgs&, const MatmulAlgorithm&) {
  refuse("plan_with_algorithm");
}
PlanCacheInfo plan_cache_info() { return {}; }
void plan_cache_clear() {}
size_t cublaslt_runtime_version() { return 0; }

}  // namespace fp8::core
