#include "torch/quantize/graph_codes.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "torch/quantize/remembered.h"

namespace fp8::graph_codes {
namespace {

// What must be equal for codes to be made in one way.
struct Kind {
  at::ScalarType dtype;
  core::Granularity granularity;
  bool power_of_two;
  bool delayed;

  bool operator==(const Kind&) const = default;
};

Kind kind_of(const QuantizeRequest& request) {
  return {request.dtype, request.granularity, request.power_of_two, request.scaling.delayed};
}

struct Kept {
  std::vector<memory::WeakTensor> weights;
  Kind kind;
  Operand operand;

  bool is_of(at::TensorList others, const QuantizeRequest& request) const {
    const auto is_same = [](const memory::WeakTensor& weight, const at::Tensor& other) {
      return !weight.expired() && weight._unsafe_get_target() == other.unsafeGetTensorImpl();
    };
    return kind == kind_of(request) &&
           std::equal(weights.begin(), weights.end(), others.begin(), others.end(), is_same);
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
  if (made.rows != place.rows || !same_form(made.codes, place.codes) ||
      !same_form(made.scales, place.scales) || made.codes.is_same(place.codes)) {
    return;
  }
  move(made.codes, place.codes);
  at::Tensor(place.scales).copy_(made.scales);
  made.scales = place.scales;
}

}  // namespace

void keep(at::TensorList weights, const QuantizeRequest& request, const Operand& operand) {
  All& all = All::instance();
  const std::lock_guard lock(all.mutex);
  std::erase_if(all.kept, [](const Kept& kept) { return kept.weights.front().expired(); });
  const bool known = std::any_of(all.kept.begin(), all.kept.end(), [&](const Kept& kept) {
    const auto covers = [](const at::Tensor& has, const at::Tensor& wanted) {
      return !wanted.defined() || has.is_same(wanted);
    };
    return kept.is_of(weights, request) &&
           covers(kept.operand.along_cols.codes, operand.along_cols.codes) &&
           covers(kept.operand.along_rows.codes, operand.along_rows.codes) &&
           covers(kept.operand.amax, operand.amax);
  });
  if (known) return;
  std::vector<memory::WeakTensor> weak;
  for (const at::Tensor& weight : weights) weak.push_back(memory::weak(weight));
  all.kept.push_back({std::move(weak), kind_of(request), operand});
}

QuantizeRequest with_kept(at::TensorList weights, QuantizeRequest request) {
  All& all = All::instance();
  const std::lock_guard lock(all.mutex);
  for (const Kept& kept : all.kept) {
    if (!kept.is_of(weights, request)) continue;
    request.along_cols |= kept.operand.along_cols.defined();
    request.along_rows |= kept.operand.along_rows.defined();
    request.keep_amax |= kept.operand.amax.defined();
  }
  return request;
}

void renew(at::TensorList weights, const QuantizeRequest& request, Operand& operand) {
  All& all = All::instance();
  const std::lock_guard lock(all.mutex);
  const at::AutoDispatchBelowADInplaceOrView below;  // they may be inference tensors
  for (const Kept& kept : all.kept) {
    if (!kept.is_of(weights, request)) continue;
    move(operand.along_cols, kept.operand.along_cols);
    move(operand.along_rows, kept.operand.along_rows);
    if (same_form(operand.amax, kept.operand.amax)) {
      at::Tensor(kept.operand.amax).copy_(operand.amax);
      operand.amax = kept.operand.amax;
    }
  }
}

}  // namespace fp8::graph_codes
