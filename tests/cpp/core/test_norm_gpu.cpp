// Norms on a GPU without torch, against plain loops in double precision, with what lies behind the
// results left alone.
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "device_memory.h"
#include "fp8/core_norm.h"

using namespace fp8::core;

namespace {

struct Norm {
  int64_t rows, cols;
  std::vector<float> x, dy, weight;

  Norm(int64_t rows_, int64_t cols_)
      : rows(rows_),
        cols(cols_),
        x(random_matrix(rows * cols, 1)),
        dy(random_matrix(rows * cols, 2)),
        weight(random_matrix(cols, 3)) {}

  double rstd(int64_t row, double* mean, bool layer) const {
    double sum = 0;
    double squares = 0;
    for (int64_t c = 0; c < cols; ++c) sum += x[row * cols + c];
    *mean = layer ? sum / static_cast<double>(cols) : 0;
    for (int64_t c = 0; c < cols; ++c) squares += std::pow(x[row * cols + c] - *mean, 2);
    return 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-6);
  }
};

void check_close(const std::vector<float>& actual, const std::vector<double>& expected,
                 double tolerance) {
  double worst = 0;
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(actual[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  REQUIRE(worst <= tolerance * largest);
}

void check_norm(int64_t rows, int64_t cols, bool layer) {
  INFO("rows=" << rows << " cols=" << cols << " layer=" << layer);
  const Norm n(rows, cols);
  const Buffer<float> x(n.x);
  const Buffer<float> dy(n.dy);
  const Buffer<float> weight(n.weight);
  Buffer<float> y(rows * cols);
  Buffer<float> dx(rows * cols);
  Buffer<float> dweight(cols);
  Buffer<float> dbias(cols);
  Buffer<float> mean(rows);
  Buffer<float> rstd(rows);
  const NormArgs norm{.form = layer ? NormForm::kLayer : NormForm::kScaleThenRound,
                      .dtype = Dtype::kFloat32,
                      .rows = rows,
                      .cols = cols,
                      .weight = weight.data,
                      .weight_dtype = Dtype::kFloat32};
  const NormRows dense{.stride0 = cols};
  norm_forward({.norm = norm,
                .x = x.data,
                .x_rows = dense,
                .eps = 1e-6F,
                .y = y.data,
                .mean = layer ? mean.data : nullptr,
                .rstd = rstd.data},
               nullptr);
  NormBackwardArgs args{.norm = norm,
                        .dy = dy.data,
                        .dy_rows = dense,
                        .x = x.data,
                        .x_rows = dense,
                        .mean = mean.data,
                        .rstd = rstd.data,
                        .dx = dx.data,
                        .dweight = dweight.data,
                        .dbias = layer ? dbias.data : nullptr};
  Buffer<float> workspace(norm_workspace_floats(args));
  args.workspace = workspace.data;
  norm_backward(args, nullptr);
  check(cudaDeviceSynchronize());

  std::vector<double> expected_y(rows * cols);
  std::vector<double> expected_dx(rows * cols);
  std::vector<double> expected_dweight(cols, 0);
  std::vector<double> expected_dbias(cols, 0);
  const auto width = static_cast<double>(cols);
  for (int64_t r = 0; r < rows; ++r) {
    double of_mean = 0;
    const double of_rstd = n.rstd(r, &of_mean, layer);
    double sum = 0;
    double product = 0;
    const auto hat = [&](int64_t c) { return (n.x[r * cols + c] - of_mean) * of_rstd; };
    const auto g = [&](int64_t c) { return double{n.dy[r * cols + c]} * n.weight[c]; };
    for (int64_t c = 0; c < cols; ++c) {
      expected_y[r * cols + c] = hat(c) * n.weight[c];
      expected_dweight[c] += n.dy[r * cols + c] * hat(c);
      expected_dbias[c] += n.dy[r * cols + c];
      product += g(c) * hat(c) / width;
      if (layer) sum += g(c) / width;
    }
    for (int64_t c = 0; c < cols; ++c) {
      expected_dx[r * cols + c] = of_rstd * (g(c) - hat(c) * product - sum);
    }
  }
  // Sums of cols or rows fp32 terms, in trees but for a few in a row: some 30 roundings.
  check_close(y.host(), expected_y, 1e-5);
  check_close(dx.host(), expected_dx, 1e-5);
  check_close(dweight.host(), expected_dweight, 1e-5);
  if (layer) check_close(dbias.host(), expected_dbias, 1e-5);
}

}  // namespace

TEST_CASE("norms and their gradients, rows of every kind", "[norm]") {
  for (const bool layer : {false, true}) {
    check_norm(1000, 8, layer);
    check_norm(1, 128, layer);
    check_norm(333, 128, layer);
    check_norm(20000, 128, layer);
    check_norm(7, 264, layer);
    check_norm(1, 4096, layer);
    check_norm(1100, 2048, layer);
    check_norm(40, 37, layer);
    check_norm(300, 2048, layer);
    check_norm(19, 5000, layer);
    check_norm(5, 16400, layer);
  }
}
