#include "torch/quantize/graph_codes.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace fp8::graph_codes {
namespace {

struct Kept {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weight;
  bool joined;
  Operand operand;

  bool is_of(const at::Tensor& other, bool other_joined) const {
    return joined == other_joined && !weight.expired() &&
           weight._unsafe_get_target() == other.unsafeGetTensorImpl();
  }
};

struct All {
  std::mutex mutex;
  std::vector<Kept> kept;

  // Never destroyed: at process exit CUDA may be gone before the tensors.
  static All& instance() {
    static auto* all = new All;
    return *all;
  }
};

bool same_form(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() && b.defined() && a.sizes() == b.sizes() &&
         a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

void move(at::Tensor& made, const at::Tensor& place) {
  at::Tensor(place.view(at::kByte)).copy_(made.view(at::kByte));
  made = place;
}

void move(Side& made, const Side& place) {
  if (made.granularity != place.granularity || !same_form(made.codes, place.codes) ||
      !same_form(made.scales, place.scales) || made.codes.is_same(place.codes)) {
    return;
  }
  move(made.codes, place.codes);
  at::Tensor(place.scales).copy_(made.scales);
  made.scales = place.scales;
}

}  // namespace

void keep(const at::Tensor& weight, bool joined, const Operand& operand) {
  All& all = All::instance();
  const std::lock_guard lock(all.mutex);
  std::erase_if(all.kept, [](const Kept& kept) { return kept.weight.expired(); });
  const bool known = std::any_of(all.kept.begin(), all.kept.end(), [&](const Kept& kept) {
    const auto covers = [](const Side& has, const Side& wanted) {
      return !wanted.defined() || (has.defined() && has.codes.is_same(wanted.codes));
    };
    return kept.is_of(weight, joined) && covers(kept.operand.along_cols, operand.along_cols) &&
           covers(kept.operand.along_rows, operand.along_rows);
  });
  if (!known) {
    all.kept.push_back({decltype(Kept::weight)(weight.getIntrusivePtr()), joined, operand});
  }
}

void renew(const at::Tensor& weight, bool joined, Operand& operand) {
  All& all = All::instance();
  const std::lock_guard lock(all.mutex);
  const at::AutoDispatchBelowADInplaceOrView below;  // they may be inference tensors
  for (const Kept& kept : all.kept) {
    if (!kept.is_of(weight, joined)) continue;
    move(operand.along_cols, kept.operand.along_cols);
    move(operand.along_rows, kept.operand.along_rows);
    if (same_form(operand.amax, kept.operand.amax)) {
      at::Tensor(kept.operand.amax).copy_(operand.amax);
      operand.amax = kept.operand.amax;
    }
  }
}

}  // namespace fp8::graph_codes
