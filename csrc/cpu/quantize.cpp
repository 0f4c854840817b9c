// Quantization on the CPU, threaded over rows or column blocks. Every element is widened to fp32
// first, so all input dtypes share the loops of loops.h.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <variant>
#include <vector>

#include "cpu/history.h"
#include "cpu/kernels.h"
#include "cpu/loops.h"
#include "host/formats.h"
#include "host/launch.h"

namespace fp8::cpu {
namespace {

constexpr int64_t kBlock = 64;  // columns and rows of a tile that is transposed in cache

struct Input {
  const core::QuantizeArgs& args;
  bool hides_infinity = false;  // a scale of earlier calls would: Inf is read as NaN
  void widen_row(int64_t row, int64_t col, int64_t count, float* out) const {
    const auto* base = static_cast<const char*>(args.x);
    const int64_t offset = (row * args.ld + col) * dtype_bytes(args.x_dtype);
    widen(base + offset, args.x_dtype, count, out);
    if (hides_infinity) infinite_to_nan(out, count);
  }
};

int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_elements));
}

void store(void* out, core::Dtype dtype, int64_t i, float value) {
  if (dtype == core::Dtype::kFloat32) {
    static_cast<float*>(out)[i] = value;
  } else if (dtype == core::Dtype::kBFloat16) {
    static_cast<c10::BFloat16*>(out)[i] = c10::BFloat16(value);
  } else {
    static_cast<c10::Half*>(out)[i] = c10::Half(value);
  }
}

float tensor_amax(const Input& in) {
  const auto& a = in.args;
  const uint32_t bits = at::parallel_reduce(
      0, a.rows, grain(a.cols), 0U,
      [&](int64_t begin, int64_t end, uint32_t found) {
        std::vector<float> row(a.cols);
        for (int64_t r = begin; r < end; ++r) {
          in.widen_row(r, 0, a.cols, row.data());
          found = std::max(found, amax_bits(row.data(), a.cols));
        }
        return found;
      },
      [](uint32_t x, uint32_t y) { return std::max(x, y); });
  return std::bit_cast<float>(bits);
}

Report finite_report(const Input& in) {
  const auto& a = in.args;
  Report all = at::parallel_reduce(
      0, a.rows, grain(a.cols), Report{},
      [&](int64_t begin, int64_t end, Report found) {
        std::vector<float> row(a.cols);
        for (int64_t r = begin; r < end; ++r) {
          in.widen_row(r, 0, a.cols, row.data());
          found.amax = std::max(found.amax, finite_amax_bits(row.data(), a.cols));
          found.print +=
              mix_bits(fold_bits(row.data(), a.cols) ^ (static_cast<uint32_t>(r) * 0x9E3779B1U));
        }
        return found;
      },
      [](const Report& x, const Report& y) {
        return Report{std::max(x.amax, y.amax), x.print + y.print};
      });
  all.print = fingerprint_of(all.print);
  return all;
}

// Delayed scaling: the amax that makes the scale.
float delayed_amax(const Input& in, uint32_t* history) {
  if (is_delayed(in.args)) {
    return std::bit_cast<float>(settle_amax(history, finite_report(in), in.args.dtype));
  }
  const float own = tensor_amax(in);
  record_amax(history, std::bit_cast<uint32_t>(own));
  return own;
}

// What makes the scale, where that is not given.
float scale_amax(const Input& in) {
  if (const auto* known = std::get_if<core::KnownAmax>(&in.args.scaling)) return *known->amax;
  const auto* delayed = std::get_if<core::Delayed>(&in.args.scaling);
  return delayed != nullptr ? delayed_amax(in, delayed->history) : tensor_amax(in);
}

// multiplier(row, widened row) gives each row's quant_multiplier.
template <typename Multiplier>
void cast_rows(const Input& in, const Multiplier& multiplier) {
  const auto& a = in.args;
  auto* out = static_cast<uint8_t*>(a.data.data);
  at::parallel_for(0, a.data.rows, grain(a.data.ld), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.cols);
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* line = out + r * a.data.ld;
      if (r >= a.rows) {
        std::memset(line, 0, a.data.ld);
        continue;
      }
      in.widen_row(r, 0, a.cols, row.data());
      encode(row.data(), multiplier(r, row.data()), a.dtype, a.cols, line);
      std::memset(line + a.cols, 0, a.data.ld - a.cols);
    }
  });
}

// multipliers: one per column
void cast_transposed(const Input& in, const std::vector<float>& multipliers) {
  const auto& a = in.args;
  auto* out = static_cast<uint8_t*>(a.data_t.data);
  at::parallel_for(0, core::ceil_div(a.data_t.rows, kBlock), 1, [&](int64_t begin, int64_t end) {
    std::array<float, kBlock> row{};
    std::array<uint8_t, kBlock * kBlock> tile{};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col0 = block * kBlock;
      const int64_t cols = std::clamp<int64_t>(a.cols - col0, 0, kBlock);
      const int64_t out_rows = std::min(a.data_t.rows - col0, kBlock);
      for (int64_t row0 = 0; row0 < a.data_t.ld; row0 += kBlock) {
        const int64_t out_cols = std::min(a.data_t.ld - row0, kBlock);
        tile.fill(0);
        for (int64_t r = 0; r < kBlock && row0 + r < a.rows && cols > 0; ++r) {
          in.widen_row(row0 + r, col0, cols, row.data());
          encode_columns(row.data(), multipliers.data() + col0, a.dtype, cols, &tile[r * kBlock]);
        }
        for (int64_t c = 0; c < out_rows; ++c) {
          uint8_t* line = out + (col0 + c) * a.data_t.ld + row0;
          for (int64_t r = 0; r < out_cols; ++r) line[r] = tile[r * kBlock + c];
        }
      }
    }
  });
}

// Column results are kept by one thread a column block, rows in order: the same bits with any
// number of threads.
template <typename Update>
void over_columns(const Input& in, const Update& update) {
  const auto& a = in.args;
  at::parallel_for(0, core::ceil_div(a.cols, kBlock), 1, [&](int64_t begin, int64_t end) {
    std::array<float, kBlock> row{};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col0 = block * kBlock;
      const int64_t cols = std::min(a.cols - col0, kBlock);
      for (int64_t r = 0; r < a.rows; ++r) {
        in.widen_row(r, col0, cols, row.data());
        update(r, col0, cols, row.data());
      }
    }
  });
}

void column_sums(const Input& in) {
  const auto& a = in.args;
  std::vector<float> sums(a.cols, 0.0F);
  over_columns(in, [&](int64_t /*row*/, int64_t col0, int64_t cols, const float* row) {
    add_to(row, cols, sums.data() + col0);
  });
  for (int64_t c = 0; c < a.cols; ++c) store(a.column_sum, a.column_sum_dtype, c, sums[c]);
}

void quantize_tensorwise(const Input& in) {
  const auto& a = in.args;
  float multiplier = 0.0F;
  if (const auto* given = std::get_if<core::StaticScale>(&a.scaling)) {
    multiplier = 1.0F / *given->scale;
    if (a.scale != nullptr) *a.scale = *given->scale;
  } else {
    const float amax = scale_amax(in);
    multiplier = quant_multiplier(amax, fp8_max(a.dtype), a.power_of_two);
    if (a.scale != nullptr) *a.scale = 1.0F / multiplier;
    if (a.amax_out != nullptr) *a.amax_out = amax;
  }
  const Input source{a, is_delayed(a)};
  if (a.data.data != nullptr) {
    cast_rows(source, [&](int64_t, const float*) { return multiplier; });
  }
  if (a.data_t.data != nullptr) cast_transposed(source, std::vector<float>(a.cols, multiplier));
}

// max |x| of the columns of each group of rows.
void group_column_amax(const Input& in) {
  const auto& a = in.args;
  auto* bits = reinterpret_cast<uint32_t*>(a.column_amax);
  std::fill_n(bits, a.rows / a.group_rows * a.cols, 0U);
  over_columns(in, [&](int64_t row, int64_t col0, int64_t cols, const float* values) {
    amax_update(values, cols, bits + row / a.group_rows * a.cols + col0);
  });
}

void quantize_rowwise(const Input& in) {
  const auto& a = in.args;
  const float format_max = fp8_max(a.dtype);
  if (a.data.data != nullptr) {
    cast_rows(in, [&](int64_t r, const float* row) {
      const float multiplier = quant_multiplier(std::bit_cast<float>(amax_bits(row, a.cols)),
                                                format_max, a.power_of_two);
      a.scale[r] = 1.0F / multiplier;
      return multiplier;
    });
    std::fill(a.scale + a.rows, a.scale + a.data.rows, 1.0F);
  }
  if (a.column_amax != nullptr) group_column_amax(in);
  if (a.data_t.data != nullptr) {
    std::vector<uint32_t> bits(a.cols, 0U);
    over_columns(in, [&](int64_t /*row*/, int64_t col0, int64_t cols, const float* row) {
      amax_update(row, cols, bits.data() + col0);
    });
    std::vector<float> multipliers(a.cols);
    for (int64_t c = 0; c < a.cols; ++c) {
      multipliers[c] = quant_multiplier(std::bit_cast<float>(bits[c]), format_max, a.power_of_two);
      a.scale_t[c] = 1.0F / multipliers[c];
    }
    std::fill(a.scale_t + a.cols, a.scale_t + a.data_t.rows, 1.0F);
    cast_transposed(in, multipliers);
  }
}

template <typename Format>
std::array<float, 256> make_table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code)
    table[code] = fp8::decode<Format>(static_cast<uint8_t>(code));
  return table;
}

const std::array<float, 256>& decode_table(core::Dtype dtype) {
  static const std::array<float, 256> e4m3 = make_table<E4M3>();
  static const std::array<float, 256> e5m2 = make_table<E5M2>();
  return dtype == core::Dtype::kE4M3 ? e4m3 : e5m2;
}

}  // namespace

void quantize(const core::QuantizeArgs& args) {
  const Input in{args};
  if (is_blockwise(args.granularity)) {
    quantize_blockwise(args);
  } else if (args.granularity == core::Granularity::kTensorwise) {
    quantize_tensorwise(in);
  } else {
    quantize_rowwise(in);
  }
  if (args.column_sum != nullptr) column_sums(in);
}

void quantize_joined(const core::JoinedArgs& joined) {
  core::QuantizeArgs whole = joined.quantize;
  const int64_t bytes = dtype_bytes(whole.x_dtype);
  std::vector<char> copy(whole.rows * whole.cols * bytes);
  int64_t begin = 0;
  for (int i = 0; i < joined.count; ++i) {
    const core::JoinedPart& part = joined.parts[i];
    const int64_t rows = joined.side_by_side ? whole.rows : part.extent;
    const int64_t cols = joined.side_by_side ? part.extent : whole.cols;
    const int64_t first = joined.side_by_side ? begin : begin * whole.cols;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(copy.data() + (first + r * whole.cols) * bytes,
                  static_cast<const char*>(part.x) + r * part.ld * bytes, cols * bytes);
    }
    begin += part.extent;
  }
  whole.x = copy.data();
  whole.ld = whole.cols;
  quantize(whole);
}

void dequantize(const core::DequantizeArgs& a) {
  const auto& table = decode_table(a.dtype);
  at::parallel_for(0, a.rows, grain(a.cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* codes = static_cast<const uint8_t*>(a.data) + r * a.row_stride;
      const float* scales = a.scale + r / a.scale_block_rows * a.scale_row_stride;
      for (int64_t c = 0; c < a.cols; ++c) {
        const float scale = scales[c / a.scale_block_cols * a.scale_col_stride];
        const float value = table[codes[c * a.col_stride]] * scale;
        store(a.out, a.out_dtype, r * a.cols + c, value);
      }
    }
  });
}

void decode(const void* codes, core::Dtype dtype, int64_t rows, int64_t cols, int64_t ld,
            float* out) {
  const auto& table = decode_table(dtype);
  at::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* line = static_cast<const uint8_t*>(codes) + r * ld;
      for (int64_t c = 0; c < cols; ++c) out[r * cols + c] = table[line[c]];
    }
  });
}

// Of b 32 rows and 128 columns at a time, transposed, which all rows of a read.
void multiply(const float* a, const float* b, int64_t m, int64_t n, int64_t k, float* out) {
  constexpr int64_t kDepth = 128;
  at::parallel_for(0, core::ceil_div(n, kProductTile), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> w(kDepth * kProductTile);
    std::vector<float> sums(m * kProductTile);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kProductTile;
      const int64_t cols = std::min<int64_t>(kProductTile, n - first);
      std::fill(w.begin(), w.end(), 0.0F);
      std::fill(sums.begin(), sums.end(), 0.0F);
      for (int64_t start = 0; start < k; start += kDepth) {
        const int64_t depth = std::min(kDepth, k - start);
        for (int64_t j = 0; j < cols; ++j) {
          const float* row = b + (first + j) * k + start;
          for (int64_t i = 0; i < depth; ++i) w[i * kProductTile + j] = row[i];
        }
        for (int64_t r = 0; r < m; ++r) {
          add_products(a + r * k + start, w.data(), depth, sums.data() + r * kProductTile);
        }
      }
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t j = 0; j < cols; ++j) out[r * n + first + j] += sums[r * kProductTile + j];
      }
    }
  });
}

}  // namespace fp8::cpu
