// The gated activation between the two grouped matmuls, with quantization: the frames of
// computed_row.cuh and row_blocks.cuh over the rows of gated.cuh, one pass. Rows past the last
// offset are left alone. Bound by bandwidth: 4 + 1 bytes a feature (bf16).
#include "core/grouped/gated.cuh"
#include "core/quantize/computed_row.cuh"
#include "core/quantize/row_blocks.cuh"

namespace fp8::core {
namespace {

constexpr int kMaxVectors = 8;  // of eight features a thread, before a row has more threads
constexpr int kBlockThreads = 128;
// Blocks of 512 threads to a multiprocessor.
template <typename Source>
constexpr int kMinBlocks = Source::kIsPlain ? 2 : 1;

struct GroupRows {
  static constexpr bool kPadded = false;
  uint8_t* data;  // [rows, features]
  float* scale;   // [rows], or [blocks, rows]
  int64_t rows;
  int64_t features;

  __device__ __forceinline__ bool has(int64_t /*row*/, bool exists) const { return exists; }
  __host__ __device__ __forceinline__ int64_t cols() const { return features; }
  __device__ __forceinline__ void put_scale(int64_t row, float value, unsigned block = 0) const {
    scale[block * rows + row] = value;
  }
  __device__ __forceinline__ int early(int64_t /*row*/) const { return 0; }
  __device__ __forceinline__ uint8_t* row(int64_t index, int /*early*/) const {
    return data + index * features;
  }
  __device__ __forceinline__ void put(uint8_t* row, int64_t col, uint2 codes) const {
    *reinterpret_cast<uint2*>(row + col) = codes;
  }
};

template <typename Source>
struct ForwardParams {
  GateForwardArgs args;
  RowwisePlan plan;
  bool power_of_two;

  __host__ __device__ Source source() const { return {args.gate}; }
  __host__ __device__ GroupRows sink() const {
    return {static_cast<uint8_t*>(args.data), args.scale, args.gate.rows, args.gate.features};
  }
};

}  // namespace

void gate_forward(const GateForwardArgs& args, Stream stream) {
  const GateArgs& a = args.gate;
  check_gate(a);
  require(on_16_bytes(args.data) && args.scale != nullptr, "gate_forward expects destinations");
  const RowwisePlan plan = plan_rowwise(a.features, kBlockThreads, kMaxVectors);
  dispatch_input(a.dtype, [&](auto input) {
    dispatch_format(args.dtype, [&](auto format) {
      with_gated_source<typename decltype(input)::type>(a, [&](auto source) {
        using Source = decltype(source);
        using Format = typename decltype(format)::type;
        const ForwardParams<Source> params{args, plan, args.power_of_two};
        if (args.granularity == Granularity::kBlock1x128) {
          launch_row_blocks<Format>(params, a.rows, a.features, stream);
        } else {
          launch_computed_rows<Format, kMinBlocks<Source>>(params, a.rows, stream);
        }
      });
    });
  });
}

}  // namespace fp8::core
