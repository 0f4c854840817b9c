// The backward of an MLP's unit with a scale for each 128 elements of what the products read: along
// rows of the two gradients for dx, along their columns and h's for the weight gradients.
//
// A block has a tile of 128 x 128, eight rows by eight columns a thread. A thread's part of gate,
// up and dh is copied to shared memory (96 KB of a block, bf16), where both gradients and h take
// their places; from there each in turn is quantized (core/quantize/blockwise_tile.cuh). Only the
// thread itself reads it, so nobody waits for anybody before that. Two blocks of a multiprocessor,
// one of which copies while the other quantizes: a few tiles to a block, the next one's copies
// under way meanwhile, are slower. One pass, bound by bandwidth: 6 + 5 bytes an element (bf16).
#include <cuda_pipeline_primitives.h>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/device/shared_memory.h"
#include "core/mlp/backward_blockwise.h"
#include "core/mlp/plan.h"
#include "core/mlp/unit.cuh"
#include "core/quantize/blockwise_tile.cuh"

namespace fp8::core {
namespace {

constexpr int kRows = 8;          // of a thread
constexpr int kHalf = kRows / 2;  // that are computed while the others are on their way

struct BlocksParams {
  MlpUnitArgs unit;
  const void* dh;
  int64_t dh_ld;
  unsigned col_tiles;
  BlockwiseParams to[3];  // gate's and up's gradient, and h
  int64_t scale_t_ld;     // of gradients
};

// Places of a tile: gate's, up's where there is one, and dh's.
template <bool kGated>
constexpr int kPlaces = kGated ? 3 : 2;
template <typename T>
constexpr int kPlaceBytes = kTile * kTile * static_cast<int>(sizeof(T));

// A thread's part of the places, in shared memory.
template <typename Reads>
class TilePlaces {
  using T = typename Reads::Element;
  static constexpr bool kGated = Reads::kGated;
  static constexpr bool kCodes = Reads::kCodes;

 public:
  static constexpr int kLast = kPlaces<kGated> - 1;  // of dh, then h
  static constexpr int kBytes = kPlaces<kGated> * kPlaceBytes<T>;

  __device__ __forceinline__ TilePlaces(const BlocksParams& params, uint4* shared)
      : p_(params), own_(shared + threadIdx.x) {}

  // Begins to copy four rows of the inputs; what lies at the edge where there is none.
  __device__ __forceinline__ void copy(const BlockTile& at, int first) const {
    const int64_t col = min(at.col, p_.unit.features - 8);
#pragma unroll
    for (int r = first; r < first + kHalf; ++r) {
      const int64_t row = min(at.row0 + r, p_.unit.rows - 1);
      const auto copy8 = [&](int place, const void* from, int64_t ld) {
        const auto* quads =
            reinterpret_cast<const uint4*>(static_cast<const T*>(from) + row * ld + col);
#pragma unroll
        for (int quad = 0; quad < kQuads<T>; ++quad) {
          __pipeline_memcpy_async(own_ + quad_at(place, r, quad), quads + quad, 16);
        }
      };
      const auto copy_product = [&](int place, const void* from) {
        if constexpr (kCodes) {
          __pipeline_memcpy_async(own_ + quad_at(place, r, 0),
                                  static_cast<const uint8_t*>(from) + row * p_.unit.ld + col, 8);
        } else {
          copy8(place, from, p_.unit.ld);
        }
      };
      copy_product(0, p_.unit.gate);
      if constexpr (kGated) copy_product(1, p_.unit.up);
      if (p_.dh != nullptr) copy8(kLast, p_.dh, p_.dh_ld);
    }
    __pipeline_commit();
  }
  // Row r of all inputs, after their copies; dh is zeros where there is none.
  __device__ __forceinline__ UnitInputs<T> inputs(const BlockTile& at, int r) const {
    UnitInputs<T> in;
    if constexpr (kCodes) {
      const int64_t row = min(at.row0 + r, p_.unit.rows - 1);
      const auto decoded = [&](int place, const float* scale) {
        const auto* codes = reinterpret_cast<const uint2*>(own_ + quad_at(place, r, 0));
        return decode8<T>(*codes, __ldg(scale + row));
      };
      in.gate = decoded(0, p_.unit.gate_scale);
      in.up = decoded(1, p_.unit.up_scale);
    } else {
      in.gate = take(0, r);
      if constexpr (kGated) in.up = take(1, r);
    }
    in.dh = p_.dh == nullptr ? zero8<T>() : take(kLast, r);
    return in;
  }
  __device__ __forceinline__ Vec8<T> take(int place, int r) const {
    Vec8<T> v;
#pragma unroll
    for (int quad = 0; quad < kQuads<T>; ++quad) {
      const uint4 q = own_[quad_at(place, r, quad)];
      v.words[4 * quad] = q.x;
      v.words[4 * quad + 1] = q.y;
      v.words[4 * quad + 2] = q.z;
      v.words[4 * quad + 3] = q.w;
    }
    return v;
  }
  __device__ __forceinline__ void leave(int place, int r, const Vec8<T>& v) const {
#pragma unroll
    for (int quad = 0; quad < kQuads<T>; ++quad) {
      own_[quad_at(place, r, quad)] = make_uint4(v.words[4 * quad], v.words[4 * quad + 1],
                                                 v.words[4 * quad + 2], v.words[4 * quad + 3]);
    }
  }

 private:
  static __device__ __forceinline__ int quad_at(int place, int r, int quad) {
    return ((place * kRows + r) * kQuads<T> + quad) * kThreads;
  }
  const BlocksParams& p_;
  uint4* own_;
};

template <typename T>
using QuantizeShared = BlockShared<T, Granularity::kBlock1x128, true>;

// As shared memory allows, of which four bytes an element take nearly all.
template <typename T>
constexpr int kBlocksOfSm = sizeof(T) == 4 ? 1 : 2;

template <typename Reads, typename Act>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm<typename Reads::Element>)
    unit_blocks_kernel(const BlocksParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  constexpr int kLast = TilePlaces<Reads>::kLast;
  constexpr int kUnroll = std::is_same_v<Act, Silu> ? 2 : 1;
  extern __shared__ uint4 slots[];
  __shared__ QuantizeShared<T> shared;
  let_next_start();
  const BlockTile at(blockIdx.x, p.col_tiles, p.unit.rows, p.unit.features);
  const TilePlaces<Reads> places(p, slots);
  wait_for_previous();
  places.copy(at, 0);
  places.copy(at, kHalf);

  // Gradients and h take the places of gate, up and dh; zeros beyond the matrix.
  const int valid_rows = at.valid_cols > 0 ? at.valid_rows : 0;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kHalf) {
    if (first == 0) {
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
#pragma unroll kUnroll
    for (int r = first; r < first + kHalf; ++r) {
      const UnitInputs<T> in = places.inputs(at, r);
      UnitResults<T> d = unit_backward<T, kGated, Act>(in.gate, in.up, in.dh, p.unit);
      if (r >= valid_rows) d = {};
      places.leave(0, r, d.gate);
      if constexpr (kGated) places.leave(1, r, d.up);
      places.leave(kLast, r, d.h);
    }
  }

  const auto quantize = [&](auto is_gradient, int place, const BlockwiseParams& params) {
    constexpr bool kGradient = decltype(is_gradient)::value;
    if (params.data.data == nullptr && params.data_t.data == nullptr) return;
    BlockwiseParams to = params;
    to.col_sum = nullptr;
    Vec8<T> v[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) v[r] = places.take(place, r);
    __syncthreads();  // what was quantized before has left `shared`
    quantize_tile<E4M3, Granularity::kBlock1x128, kGradient, true>(
        to, kGradient ? p.scale_t_ld : to.data_t.rows, at, v, shared);
  };
#pragma unroll 1
  for (int place = 0; place < kLast; ++place) quantize(std::true_type{}, place, p.to[place]);
  quantize(std::false_type{}, kLast, p.to[2]);
}

// Bytes of shared memory that a block may have.
int shared_bytes_of(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  int bytes = known[device].load(std::memory_order_relaxed);
  if (bytes == 0) {
    FP8_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    known[device].store(bytes, std::memory_order_relaxed);
  }
  return bytes;
}

}  // namespace

bool mlp_backward_makes_blocks(const MlpUnitArgs& unit) {
  int bytes = 0;
  dispatch_input(unit.dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    const int places = unit.up != nullptr ? kPlaces<true> : kPlaces<false>;
    bytes = places * kPlaceBytes<T> + static_cast<int>(sizeof(QuantizeShared<T>));
  });
  return bytes <= shared_bytes_of(current_device(unit.device).index);
}

void launch_backward_blockwise(const MlpBackwardArgs& args, cudaStream_t stream) {
  require(args.dtype == Dtype::kE4M3, "mlp_backward makes e4m3 in blocks");
  const int64_t features = args.unit.features;
  require(!args.joint || features % kTile == 0,
          "mlp_backward expects whole blocks in each half of a joint matrix");
  const auto made = [&](const Destination& data, float* scale, const Destination& data_t,
                        float* scale_t) {
    return BlockwiseParams{.rows = args.unit.rows,
                           .cols = features,
                           .data = data,
                           .data_t = data_t,
                           .power_of_two = args.power_of_two,
                           .scale = scale,
                           .scale_t = scale_t};
  };
  const int64_t col_tiles = blocks_of(features);
  const int64_t tiles = col_tiles * plan_unit_tiles(args).rows;
  const BlocksParams params{.unit = args.unit,
                            .dh = args.dh,
                            .dh_ld = args.dh_ld,
                            .col_tiles = static_cast<unsigned>(col_tiles),
                            .to = {made(args.gate, args.gate_scale, args.gate_t, args.gate_t_scale),
                                   made(args.up, args.up_scale, args.up_t, args.up_t_scale),
                                   made({}, nullptr, args.h_t, args.h_scale)},
                            .scale_t_ld = args.joint ? 2 * features : features};
  with_unit_reads(args.unit, [&](auto reads, auto activation) {
    using Reads = decltype(reads);
    using Act = typename decltype(activation)::type;
    using T = typename Reads::Element;
    constexpr auto kKernel = unit_blocks_kernel<Reads, Act>;
    static std::array<std::atomic<int>, kMaxDevices> known{};
    shared_memory_of(reinterpret_cast<const void*>(kKernel), known,
                     static_cast<int>(sizeof(QuantizeShared<T>)));
    launch(kKernel, static_cast<unsigned>(tiles), kThreads, stream, params,
           {.shared_bytes = TilePlaces<Reads>::kBytes});
  });
}

}  // namespace fp8::core
