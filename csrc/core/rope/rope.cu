// Rotary position embedding of q and k in one launch, forward or backward. A thread takes eight
// pairs of a row (or 16 elements behind those that are rotated), and as many heads of a token as
// kRopeHeadBytes allows, for which it reads cos and sin once; threads in a row take what lies in a
// row. Bound by bandwidth: 2 + 2 bytes an element (bf16). cos and sin come from cache.
#include "core/device/dispatch.cuh"
#include "core/device/rounding.cuh"
#include "host/rope.h"

namespace fp8::core {
namespace {

constexpr int kPairs = kRopePairs;
static_assert(kPairs == 8, "pairs are loaded as two vectors of eight");

// What eight pairs of a row are loaded from or stored to: two times eight elements.
struct PairPlaces {
  int first;
  int second;
  int first_valid;
  int second_valid;

  // unit: which eight of the row's pairs. interleaved: pairs lie behind each other; else half
  // apart.
  __device__ __forceinline__ PairPlaces(int unit, int half, bool interleaved) {
    const int valid = of_eight(half - kPairs * unit);
    first = interleaved ? 2 * kPairs * unit : kPairs * unit;
    second = interleaved ? first + kPairs : half + first;
    first_valid = interleaved ? min(2 * valid, kPairs) : valid;
    second_valid = interleaved ? 2 * valid - kPairs : valid;
  }
};

template <typename T>
struct Pairs {
  Vec8<T> vectors[2];

  __device__ __forceinline__ void load(const T* row, const PairPlaces& at, bool vectorized) {
    vectors[0] = load8(row + at.first, at.first_valid, vectorized);
    vectors[1] = load8(row + at.second, at.second_valid, vectorized);
  }
  // The two of pair j.
  __device__ __forceinline__ float first(int j, bool interleaved) const {
    return interleaved ? vectors[j / 4].get(2 * j % 8) : vectors[0].get(j);
  }
  __device__ __forceinline__ float second(int j, bool interleaved) const {
    return interleaved ? vectors[j / 4].get(2 * j % 8 + 1) : vectors[1].get(j);
  }
};

// A tensor, as the kernel has it. Dimension 3 is that of the heads.
struct Side {
  const void* x;
  void* y;
  int64_t x_strides[4];
  int64_t y_strides[4];
  int64_t cos_strides[3];
  int64_t sin_strides[3];
  uint32_t n1;
  uint32_t n2;
  uint32_t heads;
  uint32_t chunks;
  uint32_t items;
  bool x_vectorized;  // each row begins on 16 bytes, and so do a row's vectors
  bool y_vectorized;
};

struct Params {
  Side sides[2];
  uint32_t first_blocks;  // those of sides[0]
  const void* cos;
  const void* sin;
  int cols;
  int half;
  uint32_t rotary_units;
  uint32_t units;
  bool x_interleaved;
  bool y_interleaved;
  bool cos_interleaved;
  bool cos_vectorized;
  bool per_pair;
  bool transposed;
  bool rounds_products;
  bool adds_zero;
};

// Rows of one thread: where the first lies, and how many there are.
struct Place {
  int64_t x;
  int64_t y;
  int64_t cos;
  int64_t sin;
  int heads;
  int unit;
};

template <int kHeads>
__device__ __forceinline__ Place place_of(const Side& side, uint32_t item, uint32_t units) {
  const uint32_t thread_row = item / units;
  const uint32_t row = thread_row / side.chunks;
  const uint32_t chunk = thread_row - row * side.chunks;
  const uint32_t outer = row / side.n2;
  const uint32_t i0 = outer / side.n1;
  const uint32_t i1 = outer - i0 * side.n1;
  const uint32_t i2 = row - outer * side.n2;
  const auto offset = [&](const int64_t* strides) {
    return i0 * strides[0] + i1 * strides[1] + i2 * strides[2];
  };
  const uint32_t head = chunk * kHeads;
  return {.x = offset(side.x_strides) + head * side.x_strides[3],
          .y = offset(side.y_strides) + head * side.y_strides[3],
          .cos = offset(side.cos_strides),
          .sin = offset(side.sin_strides),
          .heads = static_cast<int>(min(side.heads - head, static_cast<uint32_t>(kHeads))),
          .unit = static_cast<int>(item - thread_row * units)};
}

// In, Out, Cos: of x, y, and of cos and sin. kInterleaves: x or y may be; the others are not then.
template <typename In, typename Out, typename Cos, bool kInterleaves>
__global__ void __launch_bounds__(kRopeThreads, 4) rope_kernel(const __grid_constant__ Params p) {
  constexpr int kHeads = rope_heads(sizeof(In));
  const bool is_first = blockIdx.x < p.first_blocks;
  const Side& side = p.sides[is_first ? 0 : 1];
  const uint32_t block = is_first ? blockIdx.x : blockIdx.x - p.first_blocks;
  const uint32_t item = block * kRopeThreads + threadIdx.x;
  if (item >= side.items) return;
  const Place place = place_of<kHeads>(side, item, p.units);
  const In* x = static_cast<const In*>(side.x) + place.x;
  Out* y = static_cast<Out*>(side.y) + place.y;
  const int64_t x_step = side.x_strides[3];
  const int64_t y_step = side.y_strides[3];

  if (static_cast<uint32_t>(place.unit) >= p.rotary_units) {
    const int col = 2 * p.half + (place.unit - static_cast<int>(p.rotary_units)) * 2 * kPairs;
    for (int h = 0; h < place.heads; ++h) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = col + part * kPairs;
        const int valid = of_eight(p.cols - at);
        const Vec8<In> v = load8(x + h * x_step + at, valid, side.x_vectorized);
        float values[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; ++j) values[j] = v.get(j);
        if (p.adds_zero) {
          round8<Out>(values);
#pragma unroll
          for (int j = 0; j < kPairs; ++j) values[j] = add(values[j], 0.0F);
        }
        store_first(y + h * y_step + at, rounded8<Out>(values), valid, side.y_vectorized);
      }
    }
    return;
  }

  const bool x_interleaved = kInterleaves && p.x_interleaved;
  const bool y_interleaved = kInterleaves && p.y_interleaved;
  const bool cos_interleaved = kInterleaves && p.cos_interleaved;
  const PairPlaces from(place.unit, p.half, x_interleaved);
  const PairPlaces to(place.unit, p.half, y_interleaved);
  Pairs<In> in[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < place.heads) in[h].load(x + h * x_step, from, side.x_vectorized);
  }
  Pairs<Cos> cos;
  Pairs<Cos> sin;
  {
    PairPlaces at(place.unit, p.half, cos_interleaved && !p.per_pair);
    if (p.per_pair) at.second = at.first;
    cos.load(static_cast<const Cos*>(p.cos) + place.cos, at, p.cos_vectorized);
    sin.load(static_cast<const Cos*>(p.sin) + place.sin, at, p.cos_vectorized);
  }
  const bool zips_cos = cos_interleaved && !p.per_pair;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= place.heads) break;
    float first[kPairs];
    float second[kPairs];
    float first_added[kPairs];
    float second_added[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float a = in[h].first(j, x_interleaved);
      const float b = in[h].second(j, x_interleaved);
      const RopeFactors factors =
          rope_factors(sin.first(j, zips_cos), sin.second(j, zips_cos), p.transposed);
      first[j] = mul(a, cos.first(j, zips_cos));
      second[j] = mul(b, cos.second(j, zips_cos));
      first_added[j] = mul(b, factors.by_b);
      second_added[j] = mul(a, factors.by_a);
    }
    if (p.rounds_products) {
      round8<Out>(first);
      round8<Out>(second);
      round8<Out>(first_added);
      round8<Out>(second_added);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      first[j] = add(first[j], first_added[j]);
      second[j] = add(second[j], second_added[j]);
    }
    if (p.adds_zero) {
      if (rope_rounds_before_zero(2 * p.half, p.cols)) {
        round8<Out>(first);
        round8<Out>(second);
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        first[j] = add(first[j], 0.0F);
        second[j] = add(second[j], 0.0F);
      }
    }
    if (y_interleaved) {
      float zipped[2][kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        zipped[j / 4][2 * j % 8] = first[j];
        zipped[j / 4][2 * j % 8 + 1] = second[j];
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        first[j] = zipped[0][j];
        second[j] = zipped[1][j];
      }
    }
    Out* row = y + h * y_step;
    store_first(row + to.first, rounded8<Out>(first), to.first_valid, side.y_vectorized);
    store_first(row + to.second, rounded8<Out>(second), to.second_valid, side.y_vectorized);
  }
}

bool whole_vectors(const void* data, const int64_t* strides, int count, int64_t bytes) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < count; ++i) whole = whole && strides[i] * bytes % 16 == 0;
  return whole;
}

// halves: pairs are half a row apart, so that half must be whole vectors too.
bool whole_rows(const RopeArgs& args, bool halves, int64_t bytes) {
  const int64_t half = args.rotary / 2;
  return (!halves || half * bytes % 16 == 0) && args.rotary * bytes % 16 == 0;
}

Side side_of(const RopeArgs& args, const RopeTensor& tensor, bool x_interleaved,
             bool y_interleaved) {
  const int64_t x_bytes = dtype_bytes(args.x_dtype);
  const int64_t y_bytes = dtype_bytes(args.y_dtype);
  const RopePlan plan = plan_rope(args, tensor, static_cast<int>(x_bytes));
  require(plan.items < kMaxRopeItems, "rope expects tensors of fewer than 2^38 elements");
  Side side{.x = tensor.x, .y = tensor.y, .heads = 1};
  uint32_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    const bool of_heads = i == plan.heads;
    sizes[i] = of_heads ? 1 : static_cast<uint32_t>(tensor.sizes[i]);
    side.x_strides[i] = sizes[i] == 1 ? 0 : tensor.x_strides[i];
    side.y_strides[i] = sizes[i] == 1 ? 0 : tensor.y_strides[i];
    side.cos_strides[i] = sizes[i] == 1 ? 0 : tensor.cos_strides[i];
    side.sin_strides[i] = sizes[i] == 1 ? 0 : tensor.sin_strides[i];
    if (!of_heads) continue;
    side.heads = static_cast<uint32_t>(tensor.sizes[i]);
    side.x_strides[3] = tensor.x_strides[i];
    side.y_strides[3] = tensor.y_strides[i];
  }
  side.n1 = sizes[1];
  side.n2 = sizes[2];
  side.chunks = static_cast<uint32_t>(plan.chunks);
  side.items = static_cast<uint32_t>(plan.items);
  side.x_vectorized = whole_vectors(side.x, side.x_strides, 4, x_bytes) &&
                      whole_rows(args, !x_interleaved, x_bytes);
  side.y_vectorized = whole_vectors(side.y, side.y_strides, 4, y_bytes) &&
                      whole_rows(args, !y_interleaved, y_bytes);
  return side;
}

Params params_of(const RopeArgs& args) {
  const bool reads_pairs = args.layout != RopeLayout::kHalves;
  const bool writes_pairs = args.layout == RopeLayout::kInterleaved;
  const int64_t bytes = dtype_bytes(args.x_dtype);
  const RopePlan plan = plan_rope(args, args.tensors[0], static_cast<int>(bytes));
  Params p{.cos = args.cos,
           .sin = args.sin,
           .cols = static_cast<int>(args.cols),
           .half = static_cast<int>(args.rotary / 2),
           .rotary_units = static_cast<uint32_t>(plan.rotary_units),
           .units = static_cast<uint32_t>(plan.units),
           .x_interleaved = args.transposed ? writes_pairs : reads_pairs,
           .y_interleaved = args.transposed ? reads_pairs : writes_pairs,
           .cos_interleaved = reads_pairs,
           .per_pair = args.per_pair,
           .transposed = args.transposed,
           .rounds_products = args.rounds_products,
           .adds_zero = args.transposed && !args.keeps_minus_zero};
  const int64_t cos_bytes = dtype_bytes(args.cos_dtype);
  const bool cos_halves = !args.per_pair && !p.cos_interleaved;
  p.cos_vectorized = !cos_halves || args.rotary / 2 * cos_bytes % 16 == 0;
  for (int i = 0; i < 2; ++i) {
    const RopeTensor& tensor = args.tensors[i];
    if (tensor.x == nullptr) continue;
    p.sides[i] = side_of(args, tensor, p.x_interleaved, p.y_interleaved);
    p.cos_vectorized = p.cos_vectorized &&
                       whole_vectors(args.cos, p.sides[i].cos_strides, 3, cos_bytes) &&
                       whole_vectors(args.sin, p.sides[i].sin_strides, 3, cos_bytes);
  }
  return p;
}

template <typename In, typename Out, typename Cos>
void launch_rope(const RopeArgs& args, Stream stream) {
  Params p = params_of(args);
  const auto blocks = [](uint32_t items) {
    return static_cast<unsigned>(ceil_div(items, kRopeThreads));
  };
  p.first_blocks = blocks(p.sides[0].items);
  const unsigned all = p.first_blocks + blocks(p.sides[1].items);
  if (all == 0) return;
  if (args.layout == RopeLayout::kHalves) {
    launch(rope_kernel<In, Out, Cos, false>, all, kRopeThreads, stream, p);
  } else {
    launch(rope_kernel<In, Out, Cos, true>, all, kRopeThreads, stream, p);
  }
}

template <typename T>
void launch_rounded(const RopeArgs& args, Stream stream) {
  const bool wide_cos = args.cos_dtype == Dtype::kFloat32;
  if (args.x_dtype == args.y_dtype) {
    return wide_cos ? launch_rope<T, T, float>(args, stream) : launch_rope<T, T, T>(args, stream);
  }
  require(wide_cos, "rope expects cos in float32 where x and y differ");
  if (args.x_dtype == Dtype::kFloat32) return launch_rope<float, T, float>(args, stream);
  launch_rope<T, float, float>(args, stream);
}

}  // namespace

void rope(const RopeArgs& args, Stream stream) {
  require(args.rotary >= 0 && args.rotary % 2 == 0 && args.rotary <= args.cols,
          "rope expects an even number of columns to rotate, at most all");
  require(args.cols < int64_t{1} << 30, "rope expects fewer than 2^30 columns");
  const Dtype rounded = args.x_dtype == Dtype::kFloat32 ? args.y_dtype : args.x_dtype;
  require(args.x_dtype == args.y_dtype || args.x_dtype == Dtype::kFloat32 ||
              args.y_dtype == Dtype::kFloat32,
          "rope expects x and y of one dtype, or one of them in float32");
  require(args.cos_dtype == rounded || args.cos_dtype == Dtype::kFloat32,
          "rope expects cos in x's dtype or float32");
  dispatch_input(rounded, [&](auto element) {
    using T = typename decltype(element)::type;
    if constexpr (std::is_same_v<T, float>) {
      launch_rope<float, float, float>(args, stream);
    } else {
      launch_rounded<T>(args, stream);
    }
  });
}

}  // namespace fp8::core
