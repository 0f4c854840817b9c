// What this folder keeps of a tensor while the tensor lives and nothing has written it: how it is
// told apart from its past, and a place for the last two.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

#include "torch/common/cuda_context.h"

namespace fp8::memory {

// Equal: the tensor holds what it held, and what was made of it can be read here.
struct Place {
  const void* data = nullptr;
  uint32_t version = 0;
  int64_t count = 0;
  const void* stream = nullptr;
  uint64_t capture = 0;  // of a CUDA graph; 0 outside

  bool operator==(const Place&) const = default;
  // Whether what was made at the other one is safe to read in this one's stream and graph.
  bool reads(const Place& other) const {
    return stream == other.stream && capture == other.capture;
  }
};

// Nothing for tensors that cannot be told apart from their past: no version counter, or strides of
// their own (x.data = x.data.t() changes nothing else).
inline std::optional<Place> place_of(const at::Tensor& x) {
  if (x.is_inference() || x.numel() == 0 || !x.is_contiguous()) return std::nullopt;
  Place place{.data = x.const_data_ptr(),
              .version = x.unsafeGetTensorImpl()->version_counter().current_version(),
              .count = x.numel()};
  if (x.is_cuda()) {
    const core::Stream stream = cuda::current_stream(x);
    place.stream = stream;
    place.capture = core::capture_id(stream);
  }
  return place;
}

// Of two tensors, weakly, the last that were added. Entry: with a WeakTensor `tensor`.
using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
inline WeakTensor weak(const at::Tensor& x) { return WeakTensor(x.getIntrusivePtr()); }

template <typename Entry>
class LastTwo {
 public:
  // f(entry) of the first entry of x that `suits`, under the lock; whether there is one.
  template <typename Suits, typename F>
  bool find(const at::Tensor& x, const Suits& suits, const F& f) {
    const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
    const std::lock_guard lock(mutex_);
    for (auto& slot : slots_) {
      if (!slot || slot->tensor._unsafe_get_target() != impl || !suits(*slot)) continue;
      f(*slot);
      return true;
    }
    return false;
  }
  // dropped(entry) of the one that makes room.
  template <typename F>
  void add(Entry entry, const F& dropped) {
    const std::lock_guard lock(mutex_);
    auto& slot = slots_[next_];
    next_ = (next_ + 1) % slots_.size();
    if (slot) {
      dropped(*slot);
    } else {
      filled_.fetch_add(1, std::memory_order_relaxed);
    }
    slot = std::move(entry);
  }
  template <typename Condition, typename F>
  void drop_if(const Condition& condition, const F& dropped) {
    if (filled_.load(std::memory_order_relaxed) == 0) return;
    const std::lock_guard lock(mutex_);
    for (auto& slot : slots_) {
      if (!slot || !condition(*slot)) continue;
      dropped(*slot);
      slot.reset();
      filled_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

 private:
  std::mutex mutex_;
  std::array<std::optional<Entry>, 2> slots_;
  std::atomic<int> filled_{0};
  size_t next_ = 0;
};

// Whether this thread is in an EagerScope (memory.h).
bool remembers();

}  // namespace fp8::memory
