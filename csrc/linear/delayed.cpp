#include "linear/delayed.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>

#include "common/cuda_context.h"

namespace fp8::delayed {
namespace {

constexpr size_t kOperands = 3;

struct Layer {
  // Keeps the key's address from being used again, and nothing of the tensor's memory.
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weight;
  std::array<AmaxHistory, kOperands> histories;

  explicit Layer(const at::Tensor& of) : weight(of.getIntrusivePtr()) {}
};

struct Layers {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Layer> map;
  size_t sweep_at = 64;  // entries, at which those of weights that are gone are looked for

  // Never destroyed: at process exit CUDA may be gone before the tensors.
  static Layers& instance() {
    static auto* layers = new Layers;
    return *layers;
  }
  void sweep() {
    std::erase_if(map, [](const auto& entry) { return entry.second.weight.expired(); });
    sweep_at = std::max<size_t>(64, 2 * map.size());
  }
};

bool is_capturing([[maybe_unused]] const at::Tensor& weight) {
#ifdef FP8_WITH_CUDA
  return weight.is_cuda() && cuda::capture_id(cuda::current_stream(weight)) != 0;
#else
  return false;
#endif
}

}  // namespace

AmaxHistory* history(const at::Tensor& weight, Operand operand) {
  if (!weight.is_leaf() || is_capturing(weight)) return nullptr;
  Layers& layers = Layers::instance();
  const std::lock_guard lock(layers.mutex);
  const c10::TensorImpl* impl = weight.unsafeGetTensorImpl();
  auto found = layers.map.find(impl);
  if (found == layers.map.end()) {
    if (operand == Operand::kGradOutput) return nullptr;
    if (layers.map.size() >= layers.sweep_at) layers.sweep();
    found = layers.map.try_emplace(impl, weight).first;
  }
  AmaxHistory& history = found->second.histories[static_cast<size_t>(operand)];
  if (!history.words.defined() || history.words.device() != weight.device()) {
    // The weight's memory may have moved: p.data = p.data.cuda()
    history.words = at::zeros({core::kAmaxHistorySize}, weight.options().dtype(at::kFloat));
    history.calls.store(0, std::memory_order_relaxed);
  }
  return &history;
}

}  // namespace fp8::delayed
