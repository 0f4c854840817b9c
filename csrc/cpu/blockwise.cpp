// Quantization in blocks on the CPU, threaded over tiles of 128 x 128, which hold every scaling
// group whole: the same cut as csrc/core/quantize/blockwise.cu.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/loops.h"
#include "host/formats.h"
#include "host/launch.h"

namespace fp8::cpu {
namespace {

constexpr int64_t kTile = core::kScaleBlock;

struct Group {
  float multiplier;
  float scale;
};

Group group_of(uint32_t amax_bits, const core::QuantizeArgs& args) {
  const float multiplier =
      quant_multiplier(std::bit_cast<float>(amax_bits), fp8_max(args.dtype), args.power_of_two);
  return {multiplier, 1.0F / multiplier};
}

// Scales of squares: one of this tile, and by the last tile of a row the padding after it.
void store_square_scale(float* scale, int64_t row, int64_t col, int64_t cols, float value) {
  const int64_t ld = core::round_up(cols, 4);
  scale[row * ld + col] = value;
  if (col == cols - 1) std::fill(scale + row * ld + cols, scale + (row + 1) * ld, 1.0F);
}

class Tile {
 public:
  explicit Tile(const core::QuantizeArgs& args)
      : a_(args), square_(args.granularity == core::Granularity::kBlock128x128) {}

  void quantize(int64_t tile_row, int64_t tile_col) {
    row0_ = tile_row * kTile;
    col0_ = tile_col * kTile;
    rows_ = std::clamp<int64_t>(a_.rows - row0_, 0, kTile);
    cols_ = rows_ > 0 ? std::clamp<int64_t>(a_.cols - col0_, 0, kTile) : 0;
    read();
    if (square_) find_square(tile_row, tile_col);
    if (a_.data.data != nullptr && col0_ < a_.data.ld) cast(tile_col);
    if (a_.data_t.data != nullptr && row0_ < a_.data_t.ld) cast_transposed(tile_row);
  }

 private:
  float* line(int64_t r) { return values_.data() + r * kTile; }

  void read() {
    if (cols_ == 0) return;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t offset = ((row0_ + r) * a_.ld + col0_) * dtype_bytes(a_.x_dtype);
      widen(static_cast<const char*>(a_.x) + offset, a_.x_dtype, cols_, line(r));
    }
  }

  void find_square(int64_t tile_row, int64_t tile_col) {
    uint32_t bits = 0;
    for (int64_t r = 0; r < rows_; ++r) bits = std::max(bits, amax_bits(line(r), cols_));
    const Group group = group_of(bits, a_);
    multiplier_.fill(group.multiplier);
    const int64_t cols = core::blocks_of(a_.data.ld);
    if (row0_ < a_.data.rows && tile_col < cols) {
      store_square_scale(a_.scale, tile_row, tile_col, cols, group.scale);
    }
    const int64_t cols_t = core::blocks_of(a_.data_t.ld);
    if (col0_ < a_.data_t.rows && tile_row < cols_t) {
      store_square_scale(a_.scale_t, tile_col, tile_row, cols_t, group.scale);
    }
  }

  void cast(int64_t tile_col) {
    const int64_t width = std::min(a_.data.ld - col0_, kTile);
    const int64_t height = std::min(a_.data.rows - row0_, kTile);
    for (int64_t r = 0; r < height; ++r) {
      uint8_t* out = static_cast<uint8_t*>(a_.data.data) + (row0_ + r) * a_.data.ld + col0_;
      const int64_t count = r < rows_ ? cols_ : 0;
      float multiplier = multiplier_[0];
      if (!square_) {
        const Group group = group_of(amax_bits(line(r), count), a_);
        multiplier = group.multiplier;
        a_.scale[tile_col * a_.data.rows + row0_ + r] = group.scale;
      }
      encode(line(r), multiplier, a_.dtype, count, out);
      std::memset(out + count, 0, width - count);
    }
  }

  void cast_transposed(int64_t tile_row) {
    const int64_t width = std::min(a_.data_t.ld - row0_, kTile);
    const int64_t height = std::min(a_.data_t.rows - col0_, kTile);
    if (!square_) {
      std::array<uint32_t, kTile> bits{};
      for (int64_t r = 0; r < rows_; ++r) amax_update(line(r), cols_, bits.data());
      for (int64_t c = 0; c < height; ++c) {
        const Group group = group_of(bits[c], a_);
        multiplier_[c] = group.multiplier;
        a_.scale_t[tile_row * a_.data_t.rows + col0_ + c] = group.scale;
      }
    }
    codes_.fill(0);
    for (int64_t r = 0; r < rows_; ++r) {
      encode_columns(line(r), multiplier_.data(), a_.dtype, cols_, codes_.data() + r * kTile);
    }
    for (int64_t c = 0; c < height; ++c) {
      uint8_t* out = static_cast<uint8_t*>(a_.data_t.data) + (col0_ + c) * a_.data_t.ld + row0_;
      for (int64_t r = 0; r < width; ++r) out[r] = codes_[r * kTile + c];
    }
  }

  const core::QuantizeArgs& a_;
  const bool square_;
  int64_t row0_ = 0;
  int64_t col0_ = 0;
  int64_t rows_ = 0;  // of the tile that are in the matrix
  int64_t cols_ = 0;
  std::array<float, kTile * kTile> values_{};
  std::array<float, kTile> multiplier_{};  // per column; all the same in a square
  std::array<uint8_t, kTile * kTile> codes_{};
};

}  // namespace

void quantize_blockwise(const core::QuantizeArgs& args) {
  const int64_t rows = std::max({args.rows, args.data.rows, args.data_t.ld});
  const int64_t cols = std::max({args.cols, args.data.ld, args.data_t.rows});
  const int64_t across = core::blocks_of(cols);
  at::parallel_for(0, across * core::blocks_of(rows), 2, [&](int64_t begin, int64_t end) {
    const auto tile = std::make_unique<Tile>(args);  // 80 KiB, too much for a stack
    for (int64_t i = begin; i < end; ++i) tile->quantize(i / across, i % across);
  });
}

}  // namespace fp8::cpu
