#include "torch/quantize/left_amax.h"

#include <ATen/ATen.h>

namespace fp8::memory {
namespace {

struct LeftAmax {
  WeakTensor tensor;
  Place place;
  at::Tensor amax;  // may be undefined: then it is known only that a norm wrote the tensor
  uintptr_t norm = 0;
  bool asked = false;
};

// For each norm that has readers, its number and in the lower bits how many outputs in a row had
// none. Numbers that meet in one place drive each other out.
class Readers {
 public:
  bool has(uintptr_t norm) const {
    return (place(norm).load(std::memory_order_relaxed) & ~kCount) == norm;
  }
  void found(uintptr_t norm) { place(norm).store(norm, std::memory_order_relaxed); }
  void missed(uintptr_t norm) {
    const uintptr_t known = place(norm).load(std::memory_order_relaxed);
    if ((known & ~kCount) != norm) return;
    const bool last = (known & kCount) + 1 == kMisses;
    place(norm).store(last ? 0 : known + 1, std::memory_order_relaxed);
  }

 private:
  static constexpr uintptr_t kCount = 15;  // numbers are multiples of 16
  static constexpr uintptr_t kMisses = 8;
  static constexpr size_t kPlaces = 1024;

  std::atomic<uintptr_t>& place(uintptr_t norm) { return places_[index(norm)]; }
  const std::atomic<uintptr_t>& place(uintptr_t norm) const { return places_[index(norm)]; }
  static size_t index(uintptr_t norm) { return (norm >> 4) * 0x9E3779B97F4A7C15U >> 54; }

  std::array<std::atomic<uintptr_t>, kPlaces> places_{};
};

struct Norms {
  LastTwo<LeftAmax> outputs;
  Readers readers;
  std::atomic<bool> has_quantizations{false};

  // Never destroyed, as what memory.cpp keeps.
  static Norms& instance() {
    static auto* norms = new Norms;
    return *norms;
  }
  void dropped(const LeftAmax& left) {
    if (!left.asked && left.amax.defined()) readers.missed(left.norm);
  }
  template <typename Condition>
  void drop_if(const Condition& condition) {
    outputs.drop_if(condition, [&](const LeftAmax& left) { dropped(left); });
  }
};

}  // namespace

NormCall::NormCall(const std::optional<at::Tensor>& weight, int64_t cols)
    : norm_(0), leaves_(false) {
  const Norms& norms = Norms::instance();
  if (!remembers() || !norms.has_quantizations.load(std::memory_order_relaxed)) return;
  norm_ = weight ? reinterpret_cast<uintptr_t>(weight->unsafeGetTensorImpl()) & ~uintptr_t{15}
                 : static_cast<uintptr_t>(cols) << 4;
  leaves_ = norms.readers.has(norm_);
}

void NormCall::wrote(const at::Tensor& y, const at::Tensor& amax) const {
  if (norm_ == 0) return;
  const std::optional<Place> place = place_of(y);
  if (!place) return;
  Norms& norms = Norms::instance();
  norms.outputs.add({.tensor = weak(y), .place = *place, .amax = amax, .norm = norm_},
                    [&](const LeftAmax& left) { norms.dropped(left); });
}

at::Tensor left_amax(const at::Tensor& x, const Place& place) {
  Norms& norms = Norms::instance();
  norms.has_quantizations.store(true, std::memory_order_relaxed);
  at::Tensor amax;
  norms.outputs.find(
      x, [&](const LeftAmax& left) { return left.place == place; },
      [&](LeftAmax& left) {
        left.asked = true;
        norms.readers.found(left.norm);
        amax = left.amax;
      });
  return amax;
}

void drop_gone_amaxes() {
  Norms::instance().drop_if([](const LeftAmax& left) { return left.tensor.expired(); });
}

void drop_amaxes() {
  Norms::instance().drop_if([](const LeftAmax&) { return true; });
}

}  // namespace fp8::memory
