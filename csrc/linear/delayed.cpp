#include "linear/delayed.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "common/cuda_context.h"

namespace fp8::delayed {
namespace {

constexpr size_t kRoles = 3;

// A weight by its memory. Not by its tensor: a weak reference to that would be in the way of
// torch.utils.swap_tensors.
using Key = std::tuple<const c10::StorageImpl*, int64_t, int64_t>;  // offset and elements within

Key key_of(const at::Tensor& weight) {
  return {weight.storage().unsafeGetStorageImpl(), weight.storage_offset(), weight.numel()};
}

struct Layer {
  // Keeps the key's address from being used again, and nothing of the memory.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  struct OfStream {
    const void* stream;
    std::array<std::shared_ptr<AmaxHistory>, kRoles> histories;
  };
  std::vector<OfStream> streams;  // one, as a rule

  explicit Layer(const at::Tensor& weight) : storage(weight.storage().getWeakStorageImpl()) {}

  std::shared_ptr<AmaxHistory>& at(const void* stream, Role role) {
    auto found = std::find_if(streams.begin(), streams.end(),
                              [&](const OfStream& entry) { return entry.stream == stream; });
    if (found == streams.end()) found = streams.insert(found, {stream, {}});
    return found->histories[static_cast<size_t>(role)];
  }
};

struct Layers {
  std::mutex mutex;
  std::map<Key, Layer> map;
  // Never destroyed: at process exit CUDA may be gone before the tensors.
  static Layers& instance() {
    static auto* layers = new Layers;
    return *layers;
  }
  // Those of weights that are gone. Where a layer is new, so that what is gone is replaced at most.
  void sweep() {
    std::erase_if(map, [](const auto& entry) { return entry.second.storage.expired(); });
  }
};

}  // namespace

std::shared_ptr<AmaxHistory> history(const at::Tensor& weight, Role role) {
  if (!weight.is_leaf() || !weight.has_storage()) return nullptr;
  const void* stream = nullptr;
#ifdef FP8_WITH_CUDA
  if (weight.is_cuda()) {
    const cudaStream_t current = cuda::current_stream(weight);
    if (cuda::capture_id(current) != 0) return nullptr;
    stream = current;
  }
#endif
  Layers& layers = Layers::instance();
  const std::lock_guard lock(layers.mutex);
  const Key key = key_of(weight);
  auto found = layers.map.find(key);
  if (found == layers.map.end()) {
    if (role == Role::kGradOutput) return nullptr;
    layers.sweep();
    found = layers.map.try_emplace(key, weight).first;
  }
  std::shared_ptr<AmaxHistory>& history = found->second.at(stream, role);
  if (!history || history->words.device() != weight.device()) {
    history = std::make_shared<AmaxHistory>();
    history->words = at::zeros({core::kAmaxHistorySize}, weight.options().dtype(at::kFloat));
  }
  return history;
}

bool in_backward() { return torch::autograd::get_current_graph_task_id() >= 0; }

bool in_reentrant_backward() {
  return in_backward() && at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

}  // namespace fp8::delayed
