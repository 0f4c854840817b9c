// core::quantize: which passes a request needs, where their partial results lie in the workspace.
#include <algorithm>
#include <variant>

#include "core/device/device.h"
#include "core/quantize/kernels.h"
#include "fp8/core_norm.h"
#include "host/formats.h"
#include "host/quantize_text.h"

namespace fp8::core {
namespace {

// Of a block of the rowwise pass: small ones end together, which counts where few waves run (17
// MB).
constexpr int kRowwiseThreads = 128;

// To a multiprocessor, of the launch after a delayed cast: they are many enough to cast again at
// some speed, and each reads the reports of all tiles.
constexpr int kSettleBlocks = 2;

// Rows of the tiles that one launch takes.
int64_t padded_rows(const CooperativePlan& plan) {
  return plan.blocks == 0 ? 0 : plan.tiles / plan.col_tiles * kTileRows;
}

// x is read for its column sums, and its amax left in a history.
bool has_recorded_amax(const QuantizeArgs& a) {
  return std::holds_alternative<Delayed>(a.scaling) && !is_delayed(a);
}

// How the passes of one request share the work.
struct QuantizePlan {
  bool one_pass = false;    // the rowwise kernel
  bool statistics = false;  // a first pass is needed
  bool row_amax = false;
  bool col_amax = false;
  bool col_sum = false;
  StatisticsPlan first;
  size_t tensor_offset = 0;  // all in 4-byte words of the workspace
  size_t row_offset = 0;
  size_t col_offset = 0;
  size_t sum_offset = 0;
  size_t guess_offset = 0;
  size_t history_offset = 0;
  size_t words = 0;
  CooperativePlan cooperative;  // with blocks: one launch may do for both passes
};

QuantizePlan plan_quantize(const QuantizeArgs& a, const DeviceInfo& device) {
  QuantizePlan plan;
  const bool rowwise = a.granularity == Granularity::kRowwise;
  if (is_blockwise(a.granularity)) {
    plan.col_sum = a.column_sum != nullptr;
    if (plan.col_sum) plan.words = static_cast<size_t>(blocks_of(a.rows) * a.cols);
    return plan;
  }
  plan.one_pass = rowwise && a.data_t.data == nullptr && a.column_sum == nullptr;
  plan.statistics = rowwise ? !plan.one_pass : takes_own_amax(a) || has_recorded_amax(a);
  if (is_delayed(a)) {  // three words for each tile, and a history
    const CastPlan cast = plan_cast(std::max({a.rows, a.data.rows, a.data_t.ld}),
                                    std::max({a.cols, a.data.ld, a.data_t.rows}),
                                    /*per_axis=*/false, device.sm_count);
    const int64_t tiles = round_up(cast.col_tiles * cast.row_tiles, 4);
    plan.guess_offset = static_cast<size_t>(2 * tiles);
    plan.history_offset = static_cast<size_t>(3 * tiles);
    plan.words = plan.history_offset + static_cast<size_t>(round_up(kAmaxHistorySize, 4));
  }
  if (!plan.statistics) return plan;
  plan.row_amax = rowwise && a.data.data != nullptr;
  plan.col_amax = rowwise && a.data_t.data != nullptr;
  plan.col_sum = a.column_sum != nullptr;
  // Clusters save the cast pass partial results. With column sums a block holds so many registers
  // that clusters pack badly: 10 to 20% slower than without, but for one shape of those measured.
  const bool clusters = has_hopper_launches(device) && !plan.col_sum;
  plan.first = plan_statistics(a.rows, a.cols, a.ld,
                               {.rows = plan.row_amax, .cols = plan.col_amax || plan.col_sum},
                               device.sm_count, clusters ? kMaxCluster : 1);
  const auto take = [&](bool wanted, int64_t words) {
    const size_t offset = plan.words;
    if (wanted) plan.words += static_cast<size_t>(round_up(words, 4));
    return offset;
  };
  // Blocks of one grid that wait for each other: on Hopper and later.
  const CooperativePlan& cooperative = plan.cooperative;
  if (a.whole_gpu && !plan.col_sum && has_hopper_launches(device)) {
    const auto how = rowwise ? plan_cooperative_per_axis : plan_cooperative;
    plan.cooperative =
        how(std::max({a.rows, a.data.rows, a.data_t.ld}),
            std::max({a.cols, a.data.ld, a.data_t.rows}), dtype_bytes(a.x_dtype), device.sm_count);
  }
  const int64_t tensor_parts = plan.first.row_chunks * plan.first.col_tiles;
  plan.tensor_offset = take(!rowwise, std::max<int64_t>(tensor_parts, cooperative.blocks));
  // The one launch or the two: what each needs lies at the same places.
  const int64_t row_words = (cooperative.col_tiles + int64_t{1}) * padded_rows(cooperative);
  const int64_t strips = cooperative.blocks == 0 ? 0 : cooperative.blocks / cooperative.col_tiles;
  plan.row_offset = take(plan.row_amax, std::max(plan.first.row_parts * a.rows, row_words));
  plan.col_offset = take(plan.col_amax, std::max(plan.first.col_parts, strips) * a.cols);
  plan.sum_offset = take(plan.col_sum, plan.first.col_parts * a.cols);
  return plan;
}

size_t bytes_of(const QuantizePlan& plan) { return plan.words * sizeof(uint32_t); }

bool fits(const Destination& d, int64_t rows, int64_t cols) {
  return d.data == nullptr || (reinterpret_cast<uintptr_t>(d.data) % 16 == 0 && d.ld % 16 == 0 &&
                               d.rows >= rows && d.ld >= cols);
}

void check(const QuantizeArgs& a) {
  const bool blockwise = is_blockwise(a.granularity);
  require(a.rows > 0 && a.cols > 0, "quantize expects a matrix that is not empty");
  require(fits(a.data, a.rows, a.cols) && fits(a.data_t, a.cols, a.rows),
          "quantize expects destinations of 16-byte aligned rows that hold the matrix");
  require(a.data.data != nullptr || a.data_t.data != nullptr, "quantize has nothing to make");
  if (a.granularity != Granularity::kTensorwise) {
    require(takes_own_amax(a) && a.amax_out == nullptr,
            "a static scale or amax, or a history of amax, is tensorwise");
    require(blockwise || (a.data_t.data == nullptr && a.column_sum == nullptr) ||
                a.rows <= kMaxRowsPerAxisPass,
            "rowwise quantize with a transposed copy or column sums takes at most 67107840 rows");
    require((a.data.data == nullptr || a.scale != nullptr) &&
                (a.data_t.data == nullptr || a.scale_t != nullptr),
            "rowwise and blockwise quantize expect a scale for each destination");
  }
  require(a.column_sum == nullptr || takes_own_amax(a) || has_recorded_amax(a),
          "column sums need a statistics pass");
  if (a.column_amax == nullptr) return;
  require(a.granularity == Granularity::kRowwise && a.data.data != nullptr &&
              a.data_t.data == nullptr && a.column_sum == nullptr && a.data.rows == a.rows &&
              a.data.ld == a.cols,
          "maxima of columns come with rowwise data without padding, and nothing else");
  require(a.cols * dtype_bytes(a.x_dtype) <= kMaxColumnAmaxRowBytes && a.group_rows > 0 &&
              a.rows % a.group_rows == 0,
          "maxima of columns are those of groups of rows, of at most 32 KB a row");
}

// Of a matrix in memory.
class MatrixPasses : public QuantizePasses {
 public:
  explicit MatrixPasses(Dtype x_dtype) : x_dtype_(x_dtype) {}
  void statistics(const StatisticsParams& params, cudaStream_t stream) const override {
    launch_statistics(params, x_dtype_, stream);
  }
  void cast(const CastParams& params, Dtype dtype, Granularity granularity,
            cudaStream_t stream) const override {
    launch_cast(params, x_dtype_, dtype, granularity, stream);
  }
  void settle_delayed(const CastParams& params, unsigned blocks, Dtype dtype,
                      cudaStream_t stream) const override {
    launch_settle_delayed(params, blocks, x_dtype_, dtype, stream);
  }
  void rowwise(const RowwiseParams& params, Dtype dtype, cudaStream_t stream) const override {
    launch_rowwise(params, x_dtype_, dtype, stream);
  }
  void blockwise(const BlockwiseParams& params, Dtype dtype, Granularity granularity,
                 cudaStream_t stream) const override {
    launch_blockwise(params, x_dtype_, dtype, granularity, stream);
  }

 private:
  Dtype x_dtype_;
};

// Of what a norm wrote, which left its maxima in parts.
class NormedPasses : public MatrixPasses {
 public:
  NormedPasses(Dtype x_dtype, int64_t parts) : MatrixPasses(x_dtype), parts_(parts) {}
  void cast(const CastParams& params, Dtype dtype, Granularity granularity,
            cudaStream_t stream) const override {
    CastParams of_parts = params;
    of_parts.tensor_parts = static_cast<int>(parts_);
    MatrixPasses::cast(of_parts, dtype, granularity, stream);
  }

 private:
  int64_t parts_;
};

struct Launch {
  const QuantizePasses& passes;
  const DeviceInfo& device;
  bool vectorized;
  bool pdl;
  Stream stream;
};

void quantize_blockwise(const QuantizeArgs& args, const QuantizePlan& plan, const Launch& how) {
  const int64_t rows = std::max({args.rows, args.data.rows, args.data_t.ld});
  const int64_t cols = std::max({args.cols, args.data.ld, args.data_t.rows});
  const BlockwisePlan tiles = plan_blockwise(rows, cols, args.data.ld, args.data_t.ld);
  require(tiles.col_tiles * tiles.row_tiles <= kMaxGridX,
          "quantize expects fewer than 2^45 elements");
  if (printing_plans()) {
    print_plan(args, how.device.index, {.blockwise = &tiles}, bytes_of(plan));
  }
  auto* col_sum = plan.col_sum ? static_cast<float*>(args.workspace) : nullptr;
  require(!plan.col_sum || col_sum != nullptr, "quantize expects a workspace");
  how.passes.blockwise({.x = args.x,
                        .rows = args.rows,
                        .cols = args.cols,
                        .ld = args.ld,
                        .vectorized = how.vectorized,
                        .pdl = how.pdl,
                        .plan = tiles,
                        .data = args.data,
                        .data_t = args.data_t,
                        .power_of_two = args.power_of_two,
                        .scale = args.scale,
                        .scale_t = args.scale_t,
                        .col_sum = col_sum},
                       args.dtype, args.granularity, how.stream);
  if (!plan.col_sum) return;
  launch_column_sum({.col_sum = col_sum,
                     .parts = blocks_of(args.rows),
                     .cols = args.cols,
                     .column_sum = args.column_sum,
                     .column_sum_dtype = args.column_sum_dtype,
                     .pdl = has_hopper_launches(how.device)},
                    how.stream);
}

// A pass over the rows, which leaves the maxima of their columns where those are asked for.
void quantize_rows(const QuantizeArgs& args, const Launch& how) {
  RowwiseParams params{.x = args.x,
                       .rows = args.rows,
                       .cols = args.cols,
                       .ld = args.ld,
                       .vectorized = how.vectorized,
                       .pdl = how.pdl,
                       .plan = plan_rowwise(args.data.ld, kRowwiseThreads),
                       .data = args.data,
                       .power_of_two = args.power_of_two,
                       .scale = args.scale};
  QuantizeFacts facts{.rowwise = &params.plan};
  if (args.column_amax == nullptr) {
    if (printing_plans()) print_plan(args, how.device.index, facts, 0);
    return how.passes.rowwise(params, args.dtype, how.stream);
  }
  const ColumnAmaxPlan plan =
      plan_column_amax(args.rows, args.group_rows, args.cols, kRowwiseThreads, how.device.sm_count);
  require(args.rows / args.group_rows * plan.blocks_per_group <= kMaxGridX,
          "quantize has too many groups of rows");
  params.plan = plan.row;
  facts.column_amax = &plan;
  if (printing_plans()) print_plan(args, how.device.index, facts, 0);
  launch_rowwise_column_amax(params, plan, args.group_rows,
                             reinterpret_cast<uint32_t*>(args.column_amax), args.x_dtype,
                             args.dtype, how.stream);
}

// Both passes in one launch; false where it can't be.
bool quantize_cooperative(const QuantizeArgs& args, const QuantizePlan& plan, const Launch& how,
                          CastParams cast, uint32_t* row_amax, uint32_t* col_amax,
                          uint32_t* tensor_amax) {
  const CooperativePlan& cooperative = plan.cooperative;
  if (cooperative.blocks == 0 || !how.vectorized) return false;
  CooperativeParams params{.cast = cast,
                           .plan = cooperative,
                           .tensor_amax = tensor_amax,
                           .row_amax = row_amax,
                           .row_multiplier = nullptr,
                           .col_amax = col_amax};
  if (args.granularity == Granularity::kTensorwise) {
    params.cast.tensor_parts = static_cast<int>(cooperative.blocks);
    return launch_cooperative_cast(params, args.x_dtype, args.dtype, how.device.index, how.stream);
  }
  if (row_amax != nullptr) {
    params.row_multiplier =
        reinterpret_cast<float*>(row_amax + cooperative.col_tiles * padded_rows(cooperative));
  }
  params.cast.col_parts = static_cast<int>(cooperative.blocks / cooperative.col_tiles);
  return launch_cooperative_rowwise(params, args.x_dtype, args.dtype, how.device.index, how.stream);
}

// A first pass where one is needed, and the cast pass; or both in one launch.
void quantize_tiles(const QuantizeArgs& args, const QuantizePlan& plan, const Launch& how) {
  auto* words = static_cast<uint32_t*>(args.workspace);
  require(plan.words == 0 || words != nullptr, "quantize expects a workspace");
  uint32_t* row_amax = plan.row_amax ? words + plan.row_offset : nullptr;
  uint32_t* col_amax = plan.col_amax ? words + plan.col_offset : nullptr;
  auto* col_sum = plan.col_sum ? reinterpret_cast<float*>(words + plan.sum_offset) : nullptr;
  const bool rowwise = args.granularity == Granularity::kRowwise;
  uint32_t* tensor_amax = plan.statistics && !rowwise ? words + plan.tensor_offset : nullptr;
  const int64_t rows = std::max({args.rows, args.data.rows, args.data_t.ld});
  const int64_t cols = std::max({args.cols, args.data.ld, args.data_t.rows});
  const bool can_overlap = has_hopper_launches(how.device);
  const auto* given = std::get_if<StaticScale>(&args.scaling);
  const auto* known = std::get_if<KnownAmax>(&args.scaling);
  const auto* delayed = std::get_if<Delayed>(&args.scaling);
  CastParams cast{
      .x = args.x,
      .rows = args.rows,
      .cols = args.cols,
      .ld = args.ld,
      .vectorized = how.vectorized,
      .pdl = plan.statistics ? can_overlap : how.pdl,
      .plan = plan_cast(rows, cols, plan.row_amax || plan.col_amax, how.device.sm_count),
      .data = args.data,
      .data_t = args.data_t,
      .power_of_two = args.power_of_two,
      .scale = args.scale,
      .scale_t = args.scale_t,
      .static_scale = given != nullptr ? given->scale : nullptr,
      .tensor_amax =
          known != nullptr ? reinterpret_cast<const uint32_t*>(known->amax) : tensor_amax,
      .tensor_parts = 1,
      .amax_out = args.amax_out,
      .history = delayed != nullptr ? delayed->history : nullptr,
      .tile_report = is_delayed(args) ? static_cast<uint2*>(args.workspace) : nullptr,
      .tile_guess = is_delayed(args) ? words + plan.guess_offset : nullptr,
      .history_before = is_delayed(args) ? words + plan.history_offset : nullptr,
      .row_amax = row_amax,
      .row_parts = static_cast<int>(plan.first.row_parts),
      .col_amax = col_amax,
      .col_parts = static_cast<int>(plan.first.col_parts),
      .col_sum = col_sum,
      .column_sum = args.column_sum,
      .column_sum_dtype = args.column_sum_dtype};
  require(cast.plan.col_tiles * cast.plan.strips <= kMaxGridX,
          "quantize expects fewer than 2^44 elements");
  const int64_t settle_blocks =
      is_delayed(args) ? std::min(cast.plan.col_tiles * cast.plan.row_tiles,
                                  static_cast<int64_t>(how.device.sm_count) * kSettleBlocks)
                       : 0;
  const bool cooperative =
      quantize_cooperative(args, plan, how, cast, row_amax, col_amax, tensor_amax);
  if (printing_plans()) {
    print_plan(args, how.device.index,
               cooperative ? QuantizeFacts{.cooperative = &plan.cooperative}
                           : QuantizeFacts{.statistics = plan.statistics ? &plan.first : nullptr,
                                           .cast = &cast.plan,
                                           .settle_blocks = settle_blocks},
               bytes_of(plan));
  }
  if (cooperative) return;
  if (plan.statistics) {
    // A folded matrix starts its rows every kStatisticsCols elements, always on 16 bytes if x does.
    const bool folded = plan.first.ld != args.ld || plan.first.cols != args.cols;
    const bool vectorized = folded ? reinterpret_cast<uintptr_t>(args.x) % 16 == 0 : how.vectorized;
    how.passes.statistics({.x = args.x,
                           .vectorized = vectorized,
                           .pdl = how.pdl,
                           .from_below = rowwise || args.data_t.data == nullptr,
                           .plan = plan.first,
                           .tensor_amax = tensor_amax,
                           .row_amax = row_amax,
                           .col_amax = col_amax,
                           .col_sum = col_sum},
                          how.stream);
    if (!rowwise) {
      cast.tensor_parts = static_cast<int>(plan.first.row_chunks * plan.first.col_tiles);
    }
  }
  how.passes.cast(cast, args.dtype, args.granularity, how.stream);
  if (!is_delayed(args)) return;
  cast.pdl = can_overlap;
  how.passes.settle_delayed(cast, static_cast<unsigned>(settle_blocks), args.dtype, how.stream);
}

}  // namespace

size_t quantize_workspace_bytes(const QuantizeArgs& args) {
  return bytes_of(plan_quantize(args, current_device(args.device)));
}

void quantize(const QuantizeArgs& args, Stream stream) {
  quantize_with(MatrixPasses(args.x_dtype), args, stream);
}

void quantize_normed(const QuantizeArgs& args, int64_t parts, Stream stream) {
  require(std::holds_alternative<KnownAmax>(args.scaling) && parts > 0,
          "quantize_normed expects an amax in parts");
  quantize_with(NormedPasses(args.x_dtype, parts), args, stream);
}

void quantize_with(const QuantizePasses& passes, const QuantizeArgs& args, Stream stream) {
  check(args);
  const DeviceInfo device = current_device(args.device);
  const QuantizePlan plan = plan_quantize(args, device);
  const bool pdl = args.pdl && has_hopper_launches(device);
  const bool vectorized = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                          (args.rows == 1 || args.ld * dtype_bytes(args.x_dtype) % 16 == 0);
  if (is_blockwise(args.granularity)) {
    return quantize_blockwise(args, plan, {passes, device, vectorized, pdl, stream});
  }
  if (plan.one_pass) return quantize_rows(args, {passes, device, vectorized, pdl, stream});
  quantize_tiles(args, plan, {passes, device, vectorized, pdl, stream});
}

}  // namespace fp8::core
