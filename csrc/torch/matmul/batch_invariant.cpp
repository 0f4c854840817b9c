#include "torch/matmul/batch_invariant.h"

#include <ATen/ATen.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "fp8/core_grouped.h"
#include "torch/common/cuda_context.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/matmul/matmul.h"

namespace fp8::batch_invariant {
namespace {

using core::Granularity;

std::atomic<int> scopes{0};

bool wanted_by_environment() {
  static const bool wanted = [] {
    const char* text = std::getenv("FP8_BATCH_INVARIANT");
    return text != nullptr && std::strcmp(text, "1") == 0;
  }();
  return wanted;
}

}  // namespace

bool enabled() { return scopes.load(std::memory_order_relaxed) > 0 || wanted_by_environment(); }
void open_scope() { scopes.fetch_add(1, std::memory_order_relaxed); }
void close_scope() { scopes.fetch_sub(1, std::memory_order_relaxed); }

bool checked(const char* op, const Recipe& recipe, bool static_input) {
  if (!enabled()) return false;
  const bool of_all_rows = recipe.granularity == Granularity::kTensorwise && !static_input;
  FP8_CHECK_VALUE(
      !of_all_rows && !recipe.delayed, "fp8::", op,
      ": inside fp8.batch_invariant expected a recipe with a scale for each ",
      "row or block ('rowwise', 'blockwise'), or 'tensorwise' with a static input_scale, got '",
      recipe.name, "', whose scales depend on other rows");
  return true;
}

void check_frozen(bool static_input) {
  FP8_CHECK_VALUE(
      static_input,
      "fp8::linear_frozen: inside fp8.batch_invariant expected input_granularity 'rowwise' or "
      "'blockwise', or an input_scale, got 'tensorwise', whose scale depends on other rows");
}

at::Tensor multiply_cpu(const at::Tensor& given_a, const at::Tensor& given_b) {
  const at::Tensor a = given_a.contiguous();
  const at::Tensor b = given_b.contiguous();
  at::Tensor out = at::zeros({a.size(0), b.size(0)}, a.options());
  cpu::multiply(a.const_data_ptr<float>(), b.const_data_ptr<float>(), a.size(0), b.size(0),
                a.size(1), out.mutable_data_ptr<float>());
  return out;
}

at::Tensor multiply_cuda(const Side& a, const Side& b, const Output& output) {
  const bool blocks = is_blockwise(a.granularity);
  const int64_t n = b.rows % 8 == 0 ? b.rows : pad16(b.rows);
  TORCH_INTERNAL_ASSERT(!output.into.defined() && b.codes.size(0) >= n);
  // The kernel adds no bias: it is added in fp32, before the result is rounded.
  const at::ScalarType dtype = output.bias.defined() ? at::kFloat : output.dtype;
  at::Tensor out = empty_on(a.codes, {a.rows, n}, dtype);
  const core::GroupedMmArgs args{.groups = 1,
                                 .m = a.rows,
                                 .n = n,
                                 .k = a.codes.size(1),
                                 .a = a.codes.const_data_ptr(),
                                 .b = b.codes.const_data_ptr(),
                                 .granularity = a.granularity,
                                 .a_scale = a.scales.const_data_ptr<float>(),
                                 .b_scale = b.scales.const_data_ptr<float>(),
                                 .a_scale_ld = blocks ? a.scales.size(1) : 0,
                                 .b_scale_ld = blocks ? b.scales.size(1) : 0,
                                 .out = out.mutable_data_ptr(),
                                 .out_dtype = to_core(dtype),
                                 .fast_accum = output.fast_accum};
  const core::Stream stream = cuda::current_stream(a.codes);
  TORCH_CHECK_NOT_IMPLEMENTED(
      core::suits_grouped_mm(args),
      join("fp8: inside fp8.batch_invariant expected a GPU of compute capability 9.0 and operands ",
           "of fewer than 2^31 rows, got m=", args.m, " n=", args.n, " k=", args.k, " on ",
           a.codes.device(), " of compute capability ",
           core::compute_capability(a.codes.device().index())));
  core::grouped_mm(args, stream);
  if (!output.bias.defined()) return n == b.rows ? out : out.narrow(1, 0, b.rows).contiguous();
  at::Tensor y = empty_on(a.codes, {a.rows, b.rows}, output.dtype);
  return at::add_out(y, out.narrow(1, 0, b.rows), output.bias);
}

}  // namespace fp8::batch_invariant
