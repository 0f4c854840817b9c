// How a candidate is measured decides what is found. Launched back to back, with operands in the
// L2, candidates win that make a whole training step slower. So: before each launch the L2 is
// written over, which also keeps the GPU busy while the host queues the launch; candidates take
// turns, so that clocks and temperature drift for all alike; the GPU has worked for a while when
// the first one starts; medians; and the first choice stays unless another is clearly better.
#include "torch/matmul/autotune.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <utility>

#include "fp8/core_device.h"
#include "host/plan_key.h"
#include "host/plan_text.h"
#include "host/tuning.h"
#include "torch/common/cuda_context.h"

namespace fp8::autotune {
namespace {

constexpr int kCandidates = 8;
constexpr int kRounds = 9;  // odd, so that the median is one of them

bool wanted_by_environment() {
  const char* value = std::getenv("FP8_AUTOTUNE");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

struct State {
  const bool always = wanted_by_environment();
  std::atomic<int> scopes{0};
  std::mutex mutex;  // of what follows, and so that one problem is measured at a time
  std::vector<Problem> met;

  // Never destroyed: autograd's threads may outlive static destructors.
  static State& instance() {
    static auto* state = new State;
    return *state;
  }

  void note(const std::string& problem, const tuning::Choice& choice, const char* source) {
    if (scopes.load(std::memory_order_relaxed) == 0) return;
    for (const Problem& other : met) {
      if (other.text == problem) return;
    }
    met.push_back({problem, choice.first_us, choice.chosen_us, source});
  }
};

// Everything of plan_key.h but the device, whose model is in the file's name.
std::string describe_with_alignments(const core::MatmulArgs& args) {
  std::string text = core::describe(args) + " align=";
  for (const void* pointer : {args.a, args.b, static_cast<const void*>(args.out), args.bias}) {
    if (text.back() != '=') text += ',';
    text += std::to_string(core::alignment_of(pointer));
  }
  return text;
}

// For the current device's model; empty where no folder is known.
std::filesystem::path file_path() {
  return tuning::file_path(core::current_device_name(), core::cublaslt_runtime_version());
}

struct Measured {
  core::MatmulPlan plan;
  tuning::Choice choice;
};

Measured measure(core::MatmulArgs args, const at::Tensor& out, core::Stream stream) {
  // Asked with the call's own pointers, whose alignment counts.
  const std::vector<core::MatmulPlan> candidates =
      core::matmul_candidates(args, kCandidates, stream);
  size_t workspace_bytes = 1;
  for (const core::MatmulPlan& plan : candidates) {
    workspace_bytes = std::max(workspace_bytes, plan.workspace_bytes);
  }
  const auto bytes = [&](size_t count) {
    return at::empty({static_cast<int64_t>(count)}, out.options().dtype(at::kByte));
  };
  const at::Tensor workspace = bytes(workspace_bytes);
  const at::Tensor flush = bytes(2 * core::l2_bytes());
  at::Tensor scratch;
  if (args.accumulate) {
    scratch = at::zeros_like(out);
    args.out = scratch.mutable_data_ptr();
  }

  const std::vector<core::TimedMatmul> timed = core::time_matmuls(
      candidates, args, workspace.mutable_data_ptr(), kRounds, [&] { flush.zero_(); }, stream);
  if (timed.empty()) throw core::Error("fp8: none of cuBLASLt's candidates runs");
  std::vector<double> medians;
  for (const core::TimedMatmul& candidate : timed) medians.push_back(candidate.us);
  const size_t best = tuning::choose(medians);
  const core::MatmulPlan& plan = timed[best].plan;
  return {plan, {core::algorithm_of(plan), medians.front(), medians[best]}};
}

}  // namespace

bool enabled() {
  const State& state = State::instance();
  return state.always || state.scopes.load(std::memory_order_relaxed) > 0;
}

void tune(const core::MatmulArgs& args, core::MatmulPlan& plan, const at::Tensor& out) {
  State& state = State::instance();
  if (plan.tuned && state.scopes.load(std::memory_order_relaxed) == 0) return;
  const core::Stream stream = cuda::current_stream(out);
  if (core::capture_id(stream) != 0) return;
  const std::lock_guard lock(state.mutex);
  if (!plan.tuned) plan = core::plan_matmul(args, stream);  // another thread may have been faster

  const std::string problem = describe_with_alignments(args);
  const std::filesystem::path path = file_path();
  const tuning::Table kept = tuning::parse_file(tuning::read_file(path)).value_or(tuning::Table());
  const auto known = kept.find(problem);
  const tuning::Choice choice = known == kept.end() ? tuning::Choice() : known->second;
  if (plan.tuned) return state.note(problem, choice, "memory");

  if (known != kept.end()) {
    const core::MatmulPlan from_file = core::plan_with_algorithm(args, choice.algorithm);
    if (from_file.supported) {
      plan = from_file;
      core::remember_plan(args, plan);
      return state.note(problem, choice, "file");
    }
  }
  try {
    const Measured measured = measure(args, out, stream);
    plan = measured.plan;
    core::remember_plan(args, plan);
    state.note(problem, measured.choice, "measured");
    if (!path.empty() && !tuning::add_to_file(path, problem, measured.choice)) {
      TORCH_WARN_ONCE(join("fp8: what autotune measured could not be written to ", path.string()));
    }
  } catch (const c10::OutOfMemoryError&) {
    // A full GPU must not end a run that would fit without tuning. Not tried again: each try would
    // make the allocator give up what it holds.
    core::remember_plan(args, plan);
    TORCH_WARN_ONCE(
        join("fp8: too little GPU memory to autotune ", problem, ": its first choice stays"));
  }
}

void open_scope() { State::instance().scopes.fetch_add(1, std::memory_order_relaxed); }

std::vector<Problem> close_scope() {
  State& state = State::instance();
  const std::lock_guard lock(state.mutex);
  state.scopes.fetch_sub(1, std::memory_order_relaxed);
  return std::exchange(state.met, {});
}

}  // namespace fp8::autotune
