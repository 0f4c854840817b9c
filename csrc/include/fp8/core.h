// fp8/core.h: the library without LibTorch. Quantize kernels and cuBLASLt matmuls on raw pointers.
//
// Nothing here allocates device memory, synchronizes, or knows a torch header: the caller brings
// memory, workspace and stream. Every function that launches work acts on the current CUDA device,
// which must own the pointers and the stream. Failures throw fp8::core::Error (a
// std::runtime_error) with the call, the status by name and the problem.
//
// Words: `scale` is the dequantization factor (x ~ data * scale), `amax` the maximum of |x| over a
// scaling group, e4m3 = float8_e4m3fn, e5m2 = float8_e5m2. All matrices are row-major with a
// leading dimension in elements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

struct CUstream_st;  // cudaStream_t without the CUDA headers

namespace fp8::core {

using Stream = CUstream_st*;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16, kE4M3, kE5M2 };

// What shares a scale. kTensorwise: all. kRowwise: a row of the operand as the matmul reads it.
// kBlock1x128: 128 elements of a row. kBlock128x128: a square. In memory, as cuBLASLt reads them,
// the scales of an operand whose storage is [rows, ld] are
//   kTensorwise    one float
//   kRowwise       [rows]
//   kBlock1x128    [ceil(ld / 128), rows]: the scales of a block of columns lie together
//   kBlock128x128  [ceil(rows / 128), round_up(ceil(ld / 128), 4)]
// and 1 where the storage holds padding only.
enum class Granularity : uint8_t { kTensorwise, kRowwise, kBlock1x128, kBlock128x128 };

// Where a quantized matrix goes. Both extents may exceed the matrix: the rest is filled with zeros,
// so that a matmul may contract over `ld` elements.
struct Destination {
  void* data = nullptr;  // 16-byte aligned; nullptr: not made
  int64_t rows = 0;      // rows written, >= the matrix's rows
  int64_t ld = 0;        // bytes per row, multiple of 16, >= the matrix's columns
};

// Quantizes x [rows, cols]:
//   quant_multiplier = fp8_max / amax   (1 if amax is 0, at most FLT_MAX; fp8_max is 448 or 57344)
//   data = round_to_nearest_even_saturate(float(x) * quant_multiplier),  scale = 1 /
//   quant_multiplier
// NaN and Inf in a scaling group make its scale NaN or Inf. With power_of_two, quant_multiplier is
// rounded down to a power of two, so scale is one too (between 2^-127 and 2^120). With a
// StaticScale, quant_multiplier is 1 / scale, and values out of range saturate (Inf too; NaN stays
// NaN).
//
// Delayed scaling. A call is a function of x and the history: it makes codes
// and scale, and the next history. With a the amax of x's finite values and A kAmaxMargin times the
// largest such amax of the last kAmaxWindow records, what makes the scale is
//   what made it before   if x has one of the last kAmaxRecords - 1 records. The history stays as
//   it
//                         is: so one tensor, as a weight in the calls of a step, has one scale and
//                         moves no window, and a recomputation (activation checkpointing) has the
//                         bits of what it repeats
//   A                     else, if the history has kAmaxWindow records and a <= A <= slack * a:
//                         nothing saturates, and the smallest values lose no more than a factor of
//                         slack to underflow. kAmaxSlack for e4m3; e5m2, whose normal numbers reach
//                         2^-29 of the largest, can spare kAmaxSlackE5M2. Any A is good for zeros
//   a                     else
// and a record is left: a, what made the scale, and a fingerprint of x. Inf becomes NaN, and
// neither enters a scale.
//
// x is cast before a is known, with a guess: A, or where the last call repeated another, what that
// took. A second launch looks at a, which the first has found, and casts once more where the guess
// was not right. So a guess costs time at most.
//
// A call with column sums reads x twice anyway: a makes its scale, as without a history (NaN and
// Inf too), and its record has no fingerprint. Where one such record has x's amax, a makes the
// scale.
//
// The margin lets amaxes grow, as those of weights in training do, without a second cast. It costs
// two of e4m3's 15 binades of normal numbers below the largest.
inline constexpr int kAmaxWindow = 16;
inline constexpr float kAmaxMargin = 4.0F;
inline constexpr float kAmaxSlack = 64.0F;
inline constexpr float kAmaxSlackE5M2 = 1024.0F;
inline constexpr int kAmaxRecords = 64;
inline constexpr int kAmaxHistorySize = 3 * kAmaxRecords + 2;  // records, their number, a guess

// What makes the scale of a tensorwise quantization.
struct OwnAmax {};
struct StaticScale {
  const float* scale = nullptr;  // one float
};
struct KnownAmax {
  const float* amax = nullptr;  // one float, from an earlier call on the same x
};
// Calls that share a history and do not run one after the other, as on two streams, may lose or mix
// each other's records. That makes a scale better or worse within the bound above, and never wrong.
struct Delayed {
  uint32_t* history = nullptr;  // [kAmaxHistorySize], zeros before the first call; where x lives
};
using Scaling = std::variant<OwnAmax, StaticScale, KnownAmax, Delayed>;

struct QuantizeArgs {
  const void* x = nullptr;  // [rows, cols], contiguous columns, any alignment of whole elements
  Dtype x_dtype = Dtype::kBFloat16;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;  // elements from row to row, 0 repeats one row
  Dtype dtype = Dtype::kE4M3;
  Granularity granularity = Granularity::kTensorwise;
  bool power_of_two = false;  // no effect on a StaticScale
  Destination data;           // [rows, cols]
  Destination data_t;         // [cols, rows], the transposed copy
  // Laid out as Granularity says. tensorwise: `scale` is one float, `scale_t` unused. Else `scale`
  // belongs to data and `scale_t` to data_t. data_t's scaling groups are those of x^T: rowwise the
  // columns of x, in 1x128 blocks 128 elements of a column; 128x128 blocks are the same ones.
  float* scale = nullptr;
  float* scale_t = nullptr;
  Scaling scaling;            // tensorwise only
  float* amax_out = nullptr;  // tensorwise only, one float, optional: the amax that made the scale
  // Rowwise without data_t and padding, optional: max |x| of each column within each group of
  // group_rows rows, which makes the scales of the group's transposed copy. [rows / group_rows,
  // cols]. Rows of at most 32 KB (kMaxColumnAmaxRowBytes); rows is a multiple of group_rows.
  float* column_amax = nullptr;
  int64_t group_rows = 0;
  // Column sums of x, accumulated in fp32 in a fixed order: the bias gradient when x is dy. [cols],
  // optional; not together with a StaticScale or KnownAmax.
  void* column_sum = nullptr;
  Dtype column_sum_dtype = Dtype::kFloat32;
  void* workspace = nullptr;  // quantize_workspace_bytes(args) bytes, 16-byte aligned
  // x was complete before the launch that precedes this one on the stream began: that launch did
  // not write x, nor wait for what did. The first kernel may then start while it drains (sm_90 and
  // later). Nothing is written before it has ended.
  bool pdl = false;
  // Two launches may be one that begins when the whole GPU is free for it, as is faster for some
  // sizes (sm_90 and later). Not where other streams must go on meanwhile, as collectives must.
  bool whole_gpu = false;
  int device = -1;  // index of the current device, where the caller knows it: asking costs time
};

// Bytes of device workspace that quantize(args) needs; depends on the extents and options only.
size_t quantize_workspace_bytes(const QuantizeArgs& args);

// At most two launches; without column sums one for rowwise without data_t and for blocks, and one
// where the tensorwise scale or amax is given. rows and cols must be positive.
void quantize(const QuantizeArgs& args, Stream stream);

// out[r, c] = float(data[r, c]) * scale[r / scale_block_rows * scale_row_stride +
//                                       c / scale_block_cols * scale_col_stride], rounded to dtype.
struct DequantizeArgs {
  const void* data = nullptr;  // [rows, cols] e4m3 or e5m2
  Dtype dtype = Dtype::kE4M3;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // elements
  int64_t col_stride = 1;
  const float* scale = nullptr;
  int64_t scale_row_stride = 0;
  int64_t scale_col_stride = 0;
  int64_t scale_block_rows = 1;
  int64_t scale_block_cols = 1;
  void* out = nullptr;  // [rows, cols] contiguous
  Dtype out_dtype = Dtype::kBFloat16;
};
void dequantize(const DequantizeArgs& args, Stream stream);

// out[m, n] = sum_k a[m, k] b[n, k] * scale_a * scale_b (+ bias[n]), or added to out when
// `accumulate`.
struct MatmulArgs {
  int64_t m = 0;  // rows of a and out (tokens)
  int64_t n = 0;  // rows of b, columns of out
  int64_t k = 0;  // contracted; multiple of 16
  const void* a = nullptr;
  Dtype a_dtype = Dtype::kE4M3;
  int64_t lda = 0;  // multiple of 16
  const void* b = nullptr;
  Dtype b_dtype = Dtype::kE4M3;
  int64_t ldb = 0;  // multiple of 16
  // Of both operands, or of a where granularity_b says what b has. Only blocks mix: 1x128 with
  // 128x128 in either order. 128x128 on both sides has no algorithm.
  Granularity granularity = Granularity::kTensorwise;
  std::optional<Granularity> granularity_b;
  // Laid out as Granularity says, for an operand of m (n) rows and ld k; 16-byte aligned. Blocks
  // want m and n in multiples of 8.
  const float* scale_a = nullptr;
  const float* scale_b = nullptr;
  const void* bias =
      nullptr;  // [n] bf16 (out bf16 or fp32) or fp16 (out fp16); optional; no blocks
  Dtype bias_dtype = Dtype::kBFloat16;
  void* out = nullptr;  // rows and base multiples of 16 bytes
  Dtype out_dtype = Dtype::kBFloat16;
  int64_t ldo = 0;
  bool accumulate = false;
  bool fast_accum = true;  // no effect on blocks, whose sums are always promoted to fp32 every 128
  int device = -1;         // as in QuantizeArgs
};

// A planned matmul: descriptors and the chosen algorithm, by value. Valid for later calls whose
// arguments differ in pointers only (of the same alignment).
struct alignas(8) MatmulPlan {
  static constexpr size_t kStateBytes = 1024;
  unsigned char state[kStateBytes];
  size_t workspace_bytes = 0;
  bool supported =
      false;           // false: cuBLASLt has no (safe) algorithm; the caller must take another way
  bool tuned = false;  // chosen by remember_plan
};

// Looks the plan up in the process-wide cache; asks cuBLASLt's heuristic on a miss. Throws when
// `stream` is capturing a CUDA graph and the plan is not known yet: run the same shapes once before
// the capture.
MatmulPlan plan_matmul(const MatmulArgs& args, Stream stream);

// One cublasLtMatmul. workspace: plan.workspace_bytes bytes, 256-byte aligned, not used by other
// work meanwhile.
void run_matmul(const MatmulPlan& plan, const MatmulArgs& args, void* workspace, Stream stream);

// For a caller that measures: the safe candidates of cuBLASLt's heuristic, at most `max`, the best
// guess first, which is what plan_matmul chooses. Empty where plan_matmul finds nothing. Asks the
// heuristic in every call (about a hundred microseconds); throws when `stream` is capturing.
std::vector<MatmulPlan> matmul_candidates(const MatmulArgs& args, int max, Stream stream);

// Makes `plan` the one that plan_matmul finds for these arguments on the current device, marked as
// tuned, until plan_cache_clear.
void remember_plan(const MatmulArgs& args, MatmulPlan plan);

// What a supported plan adds to its arguments, in a form that can be stored. It holds for the same
// arguments, GPU and cuBLASLt version.
struct MatmulAlgorithm {
  std::array<uint64_t, 8> words{};  // cublasLtMatmulAlgo_t
  uint64_t workspace_bytes = 0;

  bool operator==(const MatmulAlgorithm&) const = default;
};
MatmulAlgorithm algorithm_of(const MatmulPlan& plan);

// The plan with this algorithm; not supported where cuBLASLt or the guards of plan_matmul refuse
// it. Not during capture.
MatmulPlan plan_with_algorithm(const MatmulArgs& args, const MatmulAlgorithm& algorithm);

struct PlanCacheInfo {
  int64_t size = 0;
  int64_t capacity = 0;
  int64_t hits = 0;
  int64_t misses = 0;
  int64_t fallbacks = 0;  // plans without an algorithm
  int64_t tuned = 0;      // plans from remember_plan
};
PlanCacheInfo plan_cache_info();
void plan_cache_clear();

// Version of the cuBLASLt that this process loaded, as cublasLtGetVersion gives it (130100
// is 13.1.0).
size_t cublaslt_runtime_version();

}  // namespace fp8::core
