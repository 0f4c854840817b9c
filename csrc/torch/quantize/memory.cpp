#include "torch/quantize/memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "torch/common/tensors.h"
#include "torch/quantize/graph_codes.h"
#include "torch/quantize/left_amax.h"
#include "torch/quantize/remembered.h"

namespace fp8 {
namespace {

// What must be equal for a quantized tensor to be that of `x` still.
struct Identity {
  memory::Place place;
  int64_t rows = 0;
  int64_t cols = 0;
  at::ScalarType dtype = at::kFloat8_e4m3fn;
  core::Granularity granularity = core::Granularity::kTensorwise;
  bool power_of_two = false;
  bool delayed = false;

  bool operator==(const Identity&) const = default;
  // But for where it can be read.
  bool same_values(Identity other) const {
    other.place.stream = place.stream;
    other.place.capture = place.capture;
    return *this == other;
  }
};

std::optional<Identity> identify(const at::Tensor& x, const QuantizeRequest& request) {
  const std::optional<memory::Place> place = memory::place_of(x);
  if (!place) return std::nullopt;
  return Identity{.place = *place,
                  .rows = x.numel() / x.size(-1),
                  .cols = x.size(-1),
                  .dtype = request.dtype,
                  .granularity = request.granularity,
                  .power_of_two = request.power_of_two,
                  .delayed = request.scaling.delayed};
}

// Of a stack of weights, which may be the transposed view of what is stored. A view that was made
// below autograd has a version counter of its own, so the one of the tensor at hand counts.
std::optional<Identity> identify_stack(const at::Tensor& stack, const QuantizeRequest& request) {
  if (stack.is_inference()) return std::nullopt;
  std::optional<Identity> id =
      identify(is_stored_transposed(stack) ? stack.transpose(1, 2) : stack, request);
  if (id) id->place.version = stack.unsafeGetTensorImpl()->version_counter().current_version();
  return id;
}

// A part of a parameter: as long-lived as that, and a fused optimizer writes it past the counter.
bool is_view_of_leaf(const at::Tensor& x) { return x.is_view() && x._base().is_leaf(); }

bool covers(const Operand& made, const QuantizeRequest& request) {
  return (!request.along_cols || made.along_cols.defined()) &&
         (!request.along_rows || made.along_rows.defined()) &&
         (!request.keep_amax || made.amax.defined());
}

thread_local int eager_depth = 0;

// --- inputs: the last two, weakly ---

struct RememberedInput {
  memory::WeakTensor tensor;
  Identity id;
  Operand operand;
};

// Never destroyed: at process exit CUDA may be gone before the tensors.
memory::LastTwo<RememberedInput>& inputs() {
  static auto* last = new memory::LastTwo<RememberedInput>;
  return *last;
}

void nothing(const RememberedInput& /*input*/) {}

// With the amax that the norm left which made x, where it did.
Operand make_input(const at::Tensor& x, const QuantizeRequest& request,
                   const memory::Place& place) {
  if (request.granularity != core::Granularity::kTensorwise) {
    return operand::make(as_matrix(x), request);
  }
  const at::Tensor amax = memory::left_amax(x, place);
  if (!amax.defined()) return operand::make(as_matrix(x), request);
  QuantizeRequest known = request;
  known.scaling = Scaling::known_amax(amax, request.scaling.delayed);
  return operand::make(as_matrix(x), known);
}

// --- weights: those of the open contexts ---

// One weight of several that are one operand.
struct JoinedPart {
  const c10::TensorImpl* weight = nullptr;
  uint64_t state = 0;  // CachedWeight's
  Identity id;

  bool operator==(const JoinedPart&) const = default;
};

struct Made {  // of one weight, or of several that are one operand
  Operand operand;
  bool in_graphs = false;  // graphs that read codes of the weight read these
};

struct CachedWeight {
  at::Tensor weight;  // keeps the key alive
  int contexts = 0;
  int captures = 0;            // of them, in which graphs may read what was made before
  std::optional<Identity> id;  // of what was made
  Made made;
  uint64_t state = 0;  // another one for each entry, and whenever the weight may have changed
  // Of the first of several weights:
  std::vector<JoinedPart> joined;
  Made joined_made;
};

struct Weights {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, CachedWeight> map;
  std::atomic<int> count{0};
  uint64_t last_state = 0;

  static Weights& instance() {
    static auto* weights = new Weights;
    return *weights;
  }
  // null: not one of them. A stack by its memory.
  CachedWeight* find(const at::Tensor& weight) {
    const auto is_its_memory = [&](const auto& entry) {
      const at::Tensor& known = entry.second.weight;
      return known.const_data_ptr() == weight.const_data_ptr() && known.numel() == weight.numel() &&
             known.device() == weight.device() && known.scalar_type() == weight.scalar_type();
    };
    const auto found = weight.dim() == 3 ? std::find_if(map.begin(), map.end(), is_its_memory)
                                         : map.find(weight.unsafeGetTensorImpl());
    return found == map.end() ? nullptr : &found->second;
  }
};

// What a context does with a weight that is asked for.
enum class Use : uint8_t {
  kRemembered,  // uses what it has, or makes it and keeps it
  kForGraphs,   // uses what was made before this capture; the graph reads it from now on
  kNone,        // makes it for this call alone
};

// known: what `made` was made of, if it was; current: the weight has not changed since.
Use use_of(const std::optional<Identity>& known, const Identity& now, bool current,
           const Made& made, const QuantizeRequest& request, bool captures) {
  if (now.place.capture != 0 && (!known || known->place.capture != now.place.capture)) {
    if (captures && current && covers(made.operand, request) && known->place.capture == 0) {
      return Use::kForGraphs;
    }
    TORCH_WARN_ONCE(
        "fp8.cached_weights: a CUDA graph captured inside quantizes the weights in each replay. It "
        "reads codes that were made before with fp8.cached_weights(model, captures=True) and one "
        "call of the model before the capture; after fp8.freeze(model) weights are codes");
    return known ? Use::kNone : Use::kRemembered;
  }
  // Made on another stream: not safe to read here. What belongs to a graph serves nobody else.
  const bool elsewhere =
      current && !now.place.reads(known->place) && known->place.capture == now.place.capture;
  // Made where no context captures, it may be newer than what graphs read: made again for them.
  const bool due = captures && now.place.capture == 0 && !made.in_graphs;
  return elsewhere && !due ? Use::kNone : Use::kRemembered;
}

std::optional<Identity> identify_weight(const at::Tensor& weight, const QuantizeRequest& request) {
  return weight.dim() == 3 ? identify_stack(weight, request) : identify(weight, request);
}

Operand make_weight(const at::Tensor& weight, const QuantizeRequest& request) {
  return weight.dim() == 3 ? operand::make_stack(weight, request)
                           : operand::make(as_matrix(weight), request);
}

// The sides that are asked for and missing, by `make`. Tensorwise they share a scale, so they are
// made together, as soon as a backward may come, with the amax that it will ask for.
template <typename Make>
void add_sides(Operand& operand, const QuantizeRequest& request, const Make& make) {
  QuantizeRequest missing = request;
  if (request.granularity == core::Granularity::kTensorwise) {
    missing.along_cols = true;
    missing.along_rows = request.along_rows || request.keep_amax;
    missing.keep_amax = true;
    if (missing.scaling.source == Scaling::Source::kKnownAmax) missing.scaling = Scaling::dynamic();
    operand = make(missing);
  } else {
    missing.keep_amax = request.keep_amax && !operand.amax.defined();
    missing.along_cols = missing.keep_amax || (request.along_cols && !operand.along_cols.defined());
    missing.along_rows = request.along_rows && !operand.along_rows.defined();
    Operand made = make(missing);
    if (missing.keep_amax) operand.amax = made.amax;
    if (missing.along_cols) operand.along_cols = std::move(made.along_cols);
    if (missing.along_rows) operand.along_rows = std::move(made.along_rows);
  }
  operand.launched = false;
}

// Makes what is asked for and missing. for_graphs: and what graphs read of these weights, which
// read it from now on.
template <typename Make>
void complete(Made& made, at::TensorList weights, const QuantizeRequest& request, bool for_graphs,
              const Make& make) {
  if (covers(made.operand, request) && (made.in_graphs || !for_graphs)) return;
  const QuantizeRequest wanted = for_graphs ? graph_codes::with_kept(weights, request) : request;
  if (!covers(made.operand, wanted)) add_sides(made.operand, wanted, make);
  if (for_graphs) graph_codes::renew(weights, request, made.operand);
  made.in_graphs = for_graphs;
}

}  // namespace

memory::EagerScope::EagerScope() { ++eager_depth; }
memory::EagerScope::~EagerScope() { --eager_depth; }

bool memory::remembers() { return eager_depth > 0; }

void memory::drop_gone_inputs() {
  inputs().drop_if([](const RememberedInput& input) { return input.tensor.expired(); }, nothing);
  drop_gone_amaxes();
}

void memory::drop_inputs() {
  inputs().drop_if([](const RememberedInput&) { return true; }, nothing);
  drop_amaxes();
}

Operand operand::remembered_input(const at::Tensor& x, const QuantizeRequest& request) {
  memory::drop_gone_inputs();
  std::optional<Identity> id;
  const bool dynamic = request.scaling.source == Scaling::Source::kOwnAmax;
  if (memory::remembers() && dynamic && !is_view_of_leaf(x)) {
    id = identify(x, request);
  }
  if (!id) return make(as_matrix(x), request);
  Operand known;
  const auto suits = [&](const RememberedInput& input) {
    return input.id == *id && covers(input.operand, request);
  };
  if (inputs().find(x, suits, [&](const RememberedInput& input) { known = input.operand; })) {
    return known;
  }
  const Operand made = make_input(x, request, id->place);
  known = made;
  known.launched = false;  // not when it is used again
  inputs().add({memory::weak(x), *id, known}, nothing);
  return made;
}

Operand operand::remembered_weight(const at::Tensor& weight, const QuantizeRequest& request) {
  Weights& weights = Weights::instance();
  if (weights.count.load(std::memory_order_relaxed) == 0) return make_weight(weight, request);
  const std::lock_guard lock(weights.mutex);
  CachedWeight* cached = weights.find(weight);
  std::optional<Identity> id;
  if (cached != nullptr) id = identify_weight(weight, request);
  if (!id) return make_weight(weight, request);
  const bool captures = cached->captures > 0;
  const bool current = cached->id && cached->id->same_values(*id);
  const Use use = use_of(cached->id, *id, current, cached->made, request, captures);
  if (use == Use::kNone) return make_weight(weight, request);
  if (use == Use::kForGraphs) {
    graph_codes::keep(cached->weight, request, cached->made.operand);
    return cached->made.operand;
  }
  if (cached->id != id) cached->made = {};
  complete(cached->made, cached->weight, request, captures && id->place.capture == 0,
           [&](const QuantizeRequest& missing) { return make_weight(weight, missing); });
  cached->id = id;
  return cached->made.operand;
}

Operand operand::remembered_weights(at::TensorList weights, const QuantizeRequest& request) {
  const auto make = [&](const QuantizeRequest& wanted) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& weight : weights) parts.push_back(as_matrix(weight));
    return make_joined(parts, /*side_by_side=*/false, wanted);
  };
  Weights& known = Weights::instance();
  if (known.count.load(std::memory_order_relaxed) == 0) return make(request);
  const std::lock_guard lock(known.mutex);
  std::vector<JoinedPart> parts;
  CachedWeight* first = nullptr;
  for (const at::Tensor& weight : weights) {
    const CachedWeight* cached = known.find(weight);
    const std::optional<Identity> id = cached == nullptr ? std::nullopt : identify(weight, request);
    if (!id) return make(request);
    if (first == nullptr) first = known.find(weight);
    parts.push_back({weight.unsafeGetTensorImpl(), cached->state, *id});
  }
  const bool current = std::equal(parts.begin(), parts.end(), first->joined.begin(),
                                  first->joined.end(), [](const auto& now, const auto& known) {
                                    return now.weight == known.weight && now.state == known.state &&
                                           now.id.same_values(known.id);
                                  });
  std::optional<Identity> known_id;
  if (!first->joined.empty()) known_id = first->joined.front().id;
  const bool captures = first->captures > 0;
  const Use use =
      use_of(known_id, parts.front().id, current, first->joined_made, request, captures);
  if (use == Use::kNone) return make(request);
  if (use == Use::kForGraphs) {
    graph_codes::keep(weights, request, first->joined_made.operand);
    return first->joined_made.operand;
  }
  if (first->joined != parts) first->joined_made = {};
  complete(first->joined_made, weights, request, captures && parts.front().id.place.capture == 0,
           make);
  first->joined = std::move(parts);
  return first->joined_made.operand;
}

void memory::forget_weights(const std::vector<at::Tensor>& changed) {
  Weights& weights = Weights::instance();
  const std::lock_guard lock(weights.mutex);
  const auto forget = [&](CachedWeight& cached) {
    cached = {.weight = cached.weight,
              .contexts = cached.contexts,
              .captures = cached.captures,
              .state = ++weights.last_state};
  };
  for (const at::Tensor& weight : changed) {
    const auto found = weights.map.find(weight.unsafeGetTensorImpl());
    if (found != weights.map.end()) forget(found->second);
  }
  if (!changed.empty()) return;
  for (auto& entry : weights.map) forget(entry.second);
}

void memory::cache_weights(const std::vector<at::Tensor>& added, bool captures) {
  Weights& weights = Weights::instance();
  const std::lock_guard lock(weights.mutex);
  for (const at::Tensor& weight : added) {
    CachedWeight& cached = weights.map[weight.unsafeGetTensorImpl()];
    if (cached.contexts == 0) cached.state = ++weights.last_state;
    cached.weight = weight;
    ++cached.contexts;
    if (captures) ++cached.captures;
  }
  weights.count.store(static_cast<int>(weights.map.size()), std::memory_order_relaxed);
}

void memory::uncache_weights(const std::vector<at::Tensor>& removed, bool captures) {
  Weights& weights = Weights::instance();
  const std::lock_guard lock(weights.mutex);
  for (const at::Tensor& weight : removed) {
    const auto found = weights.map.find(weight.unsafeGetTensorImpl());
    if (found == weights.map.end()) continue;
    if (captures) --found->second.captures;
    if (--found->second.contexts == 0) weights.map.erase(found);
  }
  weights.count.store(static_cast<int>(weights.map.size()), std::memory_order_relaxed);
}

}  // namespace fp8
