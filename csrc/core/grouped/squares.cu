// Weights of experts in squares of 128 x 128, as they lie and transposed, in one pass. A block of
// 256 threads holds a square in registers, as two tiles of tile.cuh, and writes both copies of its
// codes; squares never cross a matrix. Bound by bandwidth: 2 + 1 + 1 bytes an element.
#include "core/grouped/device.cuh"
#include "core/quantize/tile.cuh"

namespace fp8::core {
namespace {

constexpr int kHalves = 2;  // tiles of a square, side by side
static_assert(kTileRows == kScaleBlock && kHalves * kTileCols == kScaleBlock);

struct SquaresParams {
  StackSquaresArgs args;
  unsigned across;  // squares
  bool vectorized;
};

// The scale of a square, one of [groups, row tiles, square_scale_ld(contracted)]; the last of a row
// writes ones into the padding behind it.
__device__ __forceinline__ void put_square_scale(float* scale, int64_t row, int64_t col,
                                                 int64_t contracted, float value) {
  const int64_t cols = (contracted + kScaleBlock - 1) / kScaleBlock;
  const int64_t ld = (cols + 3) / 4 * 4;
  const int64_t end = col == cols - 1 ? ld : col + 1;
  for (int64_t i = col; i < end; ++i) scale[row * ld + i] = i == col ? value : 1.0F;
}

template <typename T, typename Format>
__global__ void __launch_bounds__(kThreads) stack_squares_kernel(const SquaresParams p) {
  __shared__ alignas(16) uint32_t transposed[kTransposedWords];
  __shared__ uint32_t scratch[kWarps];
  let_next_start();
  const StackSquaresArgs& a = p.args;
  const int64_t group = blockIdx.y;
  const int64_t tile_row = blockIdx.x / p.across;
  const int64_t tile_col = blockIdx.x % p.across;
  const int64_t first = group * a.rows * a.cols;  // the matrix's first element, and code
  const int64_t row = tile_row * kTileRows + threadIdx.x / kColGroups * kRowsPerThread;
  const int64_t col = tile_col * kScaleBlock + threadIdx.x % kColGroups * 8;
  const MatrixSource<T> source{static_cast<const T*>(a.x) + first, a.rows, a.cols, a.cols,
                               p.vectorized};
  Vec8<T> v[kHalves][kRowsPerThread];
  PackedAmax<T> amax;
  amax.clear();
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int64_t at = col + h * kTileCols;
    load_tile(source, row, a.rows - row, at, of_eight(a.cols - at), v[h]);
  }
#pragma unroll
  for (int i = 0; i < kHalves * kRowsPerThread; ++i)
    amax.update(v[i / kRowsPerThread][i % kRowsPerThread]);
  const GroupScale square = scale_from_amax(block_max<kWarps>(amax.max_float_bits(), scratch),
                                            Format::kMax, a.power_of_two);
  wait_for_previous();
  if (threadIdx.x == 0) {
    const int64_t down = (a.rows + kScaleBlock - 1) / kScaleBlock;
    if (a.data != nullptr) {
      put_square_scale(a.scale, group * down + tile_row, tile_col, a.cols, square.scale);
    }
    if (a.data_t != nullptr) {
      put_square_scale(a.scale_t, group * p.across + tile_col, tile_row, a.rows, square.scale);
    }
  }
  const Destination to{static_cast<uint8_t*>(a.data_t) + first, a.cols, a.rows};
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int64_t at = col + h * kTileCols;
    uint2 codes[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      codes[r] = encode8<Format>(v[h][r], [&](int) { return square.quant_multiplier; });
      if (a.data != nullptr && row + r < a.rows && at < a.cols) {
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(a.data) + first + (row + r) * a.cols + at) =
            codes[r];
      }
    }
    if (a.data_t == nullptr) continue;
    if (h > 0) __syncthreads();  // the first half has left
    store_transposed_tile(to, a.rows, tile_row * kTileRows, at - threadIdx.x % kColGroups * 8,
                          codes, transposed);
  }
}

}  // namespace

void quantize_stack_squares(const StackSquaresArgs& args, Stream stream) {
  require(args.groups > 0 && args.rows > 0 && args.cols > 0 && args.rows % 16 == 0 &&
              args.cols % 16 == 0,
          "quantize_stack_squares expects matrices whose extents are multiples of 16");
  require(on_16_bytes(args.data) && on_16_bytes(args.data_t),
          "quantize_stack_squares expects 16-byte aligned destinations");
  const int64_t across = blocks_of(args.cols);
  const int64_t squares = across * blocks_of(args.rows);
  require(squares <= kMaxGridX && args.groups <= 65535, "quantize_stack_squares: too many squares");
  const SquaresParams params{args, static_cast<unsigned>(across), on_16_bytes(args.x)};
  const dim3 grid(static_cast<unsigned>(squares), static_cast<unsigned>(args.groups));
  dispatch_input(args.x_dtype, [&](auto input) {
    dispatch_format(args.dtype, [&](auto format) {
      launch(stack_squares_kernel<typename decltype(input)::type, typename decltype(format)::type>,
             grid, kThreads, stream, params);
    });
  });
}

}  // namespace fp8::core
