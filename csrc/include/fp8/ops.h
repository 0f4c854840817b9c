// fp8/ops.h: the operators as C++ functions. Each goes through PyTorch's dispatcher, so autograd
// and autocast apply as in Python (torch.ops.fp8.*). Link libfp8_torch; no Python is needed.
//
// Words: `scale` is the dequantization factor (x ~ data * scale); e4m3 = float8_e4m3fn, e5m2 =
// float8_e5m2. M tokens, N out-features, K in-features. High precision means bfloat16, float16 or
// float32.
//
// Quantization of a scaling group (the tensor, a row, or a block): amax = max |x|, quant_multiplier
// = fp8_max / amax (fp8_max 448 for e4m3, 57344 for e5m2; 1 if amax is 0; at most FLT_MAX), data =
// round to nearest even, saturating, of float(x) * quant_multiplier, scale = 1 / quant_multiplier.
// NaN or Inf in a group makes its scale non-finite. With power_of_two, quant_multiplier is rounded
// down to a power of two, and scale is one too.
//
// Errors: c10::TypeError for dtypes, c10::ValueError for shapes, devices and recipes,
// c10::NotImplementedError for double backward. Messages name the op, what was expected and what
// came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace fp8 {

// The recipe of grouped_linear and moe_experts where none is given: its weight gradients are exact,
// and measured against "rowwise" it is faster in every shape.
inline constexpr std::string_view kDefaultGroupedRecipe = "rowwise";

// x [..., K] high precision -> data (x's shape, dtype; rows padded to 16 elements in memory), scale
// [] fp32. With `scale` ([] fp32, on x's device): static scaling, quant_multiplier = 1 / scale;
// values out of range saturate, Inf too; the static scale is returned, and power_of_two must be
// false.
std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn,
    const std::optional<at::Tensor>& scale = std::nullopt, bool power_of_two = false);

// x [..., K] -> data, scale x.shape[:-1] + [1]: one scale per row.
std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x,
                                                    at::ScalarType dtype = at::kFloat8_e4m3fn,
                                                    bool power_of_two = false);

// x [..., K] with M the product of the leading dimensions -> data, data_t [K, M] row-major, scale
// [].
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn,
    const std::optional<at::Tensor>& scale = std::nullopt, bool power_of_two = false);

// x [..., K] -> data, data_t [K, M], scale x.shape[:-1] + [1], scale_t [K, 1]: data_t is quantized
// along M, with scaling groups of its own.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn, bool power_of_two = false);

// Blocks, as DeepSeek-V3 trains with: x [..., K] with M the product of the leading dimensions ->
// data, and one scale for 128 elements of a row: scale [M, ceil(K / 128)], with strides (1, M
// padded to 16), which is how a matmul reads it.
std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn, bool power_of_two = false);

// The same with one scale for 128 rows by 128 columns, as weights have it: scale [ceil(M / 128),
// ceil(K / 128)], with rows padded to four scales.
std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn, bool power_of_two = false);

// x [..., K] -> data, data_t [K, M], scale, scale_t [K, ceil(M / 128)]: data_t has scaling groups
// of its own, along M.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn, bool power_of_two = false);

// x [..., K] -> data, data_t [K, M], scale, scale_t [ceil(K / 128), ceil(M / 128)]: the transposes
// of data and of scale.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose(
    const at::Tensor& x, at::ScalarType dtype = at::kFloat8_e4m3fn, bool power_of_two = false);

// data [..., K] e4m3 or e5m2 of any strides -> float(data) * scale in dtype. scale: [],
// data.shape[:-1] + [1], or with M the product of data's leading dimensions [M, ceil(K / 128)] or
// [ceil(M / 128), ceil(K / 128)].
at::Tensor dequantize(const at::Tensor& data, const at::Tensor& scale,
                      at::ScalarType dtype = at::kBFloat16);

// a [M, K], b [N, K] FP8; scale_a and scale_b both [], or [M, 1] and [N, 1], or each in blocks:
// [M, ceil(K / 128)] or [ceil(M / 128), ceil(K / 128)], and the same with N; bias [N] in out_dtype
// (or bf16 for fp32). Returns (a * scale_a) (b * scale_b)^T + bias, [M, N] in out_dtype.
// fast_accum: Hopper's tensor cores keep about 14 bits while they accumulate; false promotes to
// fp32 on the way (split accumulation). With block scales accumulation is always split. Blocks of
// 128x128 on both sides have no FP8 matmul: they take the slower way over fp32.
at::Tensor scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                     const at::Tensor& scale_b,
                     const std::optional<at::Tensor>& bias = std::nullopt,
                     at::ScalarType out_dtype = at::kBFloat16, bool fast_accum = true);

// out [M, N] += (a * scale_a) (b * scale_b)^T, in place; returns out.
at::Tensor& scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                  const at::Tensor& scale_a, const at::Tensor& scale_b,
                                  bool fast_accum = false);

// x [..., K], weight [N, K], bias [N], all of one high-precision dtype -> y [..., N] in that dtype.
// Quantizes x and weight as the recipe says ("tensorwise", "rowwise", "rowwise_gw_hp",
// "blockwise", "delayed", "rowwise_fast", "rowwise_fast_gw_hp") and multiplies in FP8.
// Differentiable once. Options follow the recipe's name after a colon: "rowwise:power_of_two"
// quantizes x, weight and dy with power_of_two. "fast": gradients accumulate fast, as the forward
// does in all but "blockwise"; "gw_hp": the weight gradient is made of unquantized operands.
//
// history (make_history, with "delayed"): of the calls with one weight. The call moves it on, and
// so does its backward; result and next history depend on the arguments alone. x, weight and dy
// each take the scale of the largest amax of the last 16 records, and of their own amax where that
// would saturate or be more than 64 times (dy: 1024 times) as large; a tensor that comes again
// keeps its scale (core::Delayed). Inf becomes NaN. dy with a bias gradient takes its own amax.
// Without a history "delayed" is "tensorwise".
//
// input_scale ([] fp32 on x's device, with "tensorwise" or "delayed"): static scaling of x, in one
// pass over it and whatever its amax, as in quantize_tensorwise: values out of range saturate, Inf
// too. weight and dy are quantized as ever. dx takes no notice of saturation; the scale has no
// gradient.
at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias = std::nullopt,
                        std::string_view recipe = "tensorwise",
                        const std::optional<at::Tensor>& input_scale = std::nullopt,
                        const std::optional<at::Tensor>& history = std::nullopt);

// An empty history for fused_linear: [3, core::kAmaxHistorySize] int32 on the device of `options`,
// of x, weight and dy. Not part of what a layer computes: it may begin anew at any time.
at::Tensor make_history(const at::TensorOptions& options = {});

// fused_linear whose backward adds the weight gradient to main_grad [N, K] (bfloat16, float16 or
// float32, any strides), in fp32 and rounded once, and gives autograd none: weight.grad() stays
// undefined. overwrite: it takes the place of what main_grad held. Each backward that reaches the
// weight does so once; nothing happens where the weight needs no gradient.
at::Tensor fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, std::string_view recipe,
                             const at::Tensor& main_grad, bool overwrite = false,
                             const std::optional<at::Tensor>& input_scale = std::nullopt,
                             const std::optional<at::Tensor>& history = std::nullopt);

// A linear layer whose weight is FP8 and stays it, of a checkpoint or made once: x [..., K] in high
// precision, weight [N, K] e4m3, bias [N] in x's dtype -> y [..., N] = x (weight * weight_scale)^T
// + bias in x's dtype. weight_scale, fp32: one element; one for each row, [N], [N, 1] or [1, N]; or
// one for each 128x128 block, [ceil(N / 128), ceil(K / 128)], the last ones of any extent. A shape
// that could be two of these is what input_granularity says; without it one element is the whole
// weight's, and the grid of blocks goes before [1, N].
//
// x is quantized to e4m3 in the call: with one scale ("tensorwise"), one for each row ("rowwise")
// or one for 128 elements of a row ("blockwise"), with power_of_two if asked for. A weight of
// blocks takes "blockwise", others one of the first two; by default "rowwise". input_scale (one
// element, fp32): a static scale of x for weights without blocks, as in fused_linear. The values
// are fused_linear's where it quantizes x and weight so, to the bit, but for few rows with decode:
// then, on compute capability 9.0, a kernel of its own multiplies up to 64 rows with a weight of
// 2^20 elements or more, unless x has one scale that is not given; up to 32 where x and weight have
// one scale each, or blocks and a weight of more than 2^25 elements. Codes and scales are the same,
// sums are added in another order, and up to there a row has the same bits whatever the others are.
//
// Differentiable once, in x and bias. dx is made of the same codes: dy, times the scales of the
// weight's rows, in e4m3 with a scale for each row; with blocks, for 128 elements of a row. Nothing
// of x is saved. Nothing is copied of a contiguous weight whose extents are multiples of 16, but
// for the gradient, which reads it transposed.
at::Tensor linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& weight_scale,
                         const std::optional<at::Tensor>& bias = std::nullopt,
                         const std::optional<at::Tensor>& input_scale = std::nullopt,
                         std::optional<std::string_view> input_granularity = std::nullopt,
                         bool power_of_two = false, bool decode = true);

// Linear layers that read one x, as one: x [..., K], weights [N_i, K], biases [N_i] or none each
// (or no biases at all) -> y_i [..., N_i] = x W_i^T + b_i. Values and gradients are, bit for bit,
// those of one fused_linear whose weight is the weights one below the other, split: one product
// forward, one for dx, which is rounded once where several gradients would be added, and one for
// the weight gradients of neighbouring weights. Nothing is copied together in high precision. So
// with one scale per tensor the weights share theirs, and so do the gradients of the results; with
// a scale per row y_i has the bits of a fused_linear of its own. The y_i are columns of one tensor,
// with its distance from row to row; with gradients, one of at most a quarter of all columns has
// memory of its own. Each is a tensor of its own to autograd, and may be modified
// in place. A y_i that no gradient reaches is left out of the backward. At most 62 weights;
// history: one for all of them. Differentiable once.
std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::ArrayRef<at::Tensor> weights,
                                      at::ArrayRef<std::optional<at::Tensor>> biases = {},
                                      std::string_view recipe = "tensorwise",
                                      const std::optional<at::Tensor>& history = std::nullopt);

// The MLP of a transformer as one node: y = down(h) with h = act(gate(x)) * up(x), or act(gate(x))
// without up; each product a fused_linear, each step between them rounded as PyTorch's own
// activations round. x [..., K], gate and up [I, K], down [H, I] -> y [..., H]. Merged, gate is
// [2 I, K] without up, the gate's half first, or second with gate_second. activation: "silu",
// "gelu", "gelu_tanh", "relu", "relu_squared", and with a gate "clamped_silu" (see moe_experts,
// alpha and limit of it). save: "bf16" keeps the products of gate and up for the backward,
// "fp8" e4m3 codes of them with a scale for each row, which only the backward reads: y has the same
// bits, the gradients are those of what the codes stand for; "recompute" makes the products again.
// Histories: one for each layer, with "delayed"; x is quantized once, with gate's. Values, and
// gradients unless "fp8" is saved, are those of the composition, bit for bit, but that dx through
// two weights is summed inside the second product. Differentiable once.
struct MlpOptions {
  std::string_view activation = "silu";
  std::string_view recipe = "tensorwise";
  std::optional<at::Tensor> gate_bias = std::nullopt;  // [I] or [2 I]
  std::optional<at::Tensor> up_bias = std::nullopt;    // [I]
  std::optional<at::Tensor> down_bias = std::nullopt;  // [H]
  std::string_view save = "bf16";
  bool gate_second = false;
  double alpha = 1.702;
  double limit = 7.0;
  std::optional<at::Tensor> gate_history = std::nullopt;  // make_history
  std::optional<at::Tensor> up_history = std::nullopt;
  std::optional<at::Tensor> down_history = std::nullopt;
};
at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
               const at::Tensor& down, const MlpOptions& options = {});

// Products over groups whose extents only the device knows: offsets [E] int32, E below 1024, has
// the row or column that ends each group. All codes are e4m3, and nothing waits for the offsets.
//   rows     a [R, K], b [E, N, K] -> [R, N]: a[r] b[g]^T for the rows r of group g, zeros for rows
//            past the last offset. Groups of any extent, 0 too. scale_a and scale_b both [], or
//            [R, 1] and [E, N, 1], or in blocks [R, ceil(K / 128)] and [E, ceil(N / 128),
//            ceil(K / 128)].
//   columns  a [M, L], b [N, L] -> [E, M, N]: a[:, g] b[:, g]^T for the columns of group g, which
//            are a multiple of 32, and at least that, zeros beyond the group's own: how weight
//            gradients come about. scale_a [E, M], scale_b [E, N].
// out_dtype and fast_accum as in scaled_mm. On Hopper one kernel of ours; elsewhere ATen's, which
// round to bf16, and with scales in blocks fp32 products, group by group, that wait for the
// offsets. Offsets that descend or exceed R or L give undefined values, and are not noticed. No
// gradient.
at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                      const at::Tensor& scale_b, const at::Tensor& offsets,
                      at::ScalarType out_dtype = at::kBFloat16, bool fast_accum = true);

// x [T, K] sorted by group, weight [E, N, K] (stored so, or as [E, K, N]), offsets [E] int32, the
// row that ends each group, bias [E, N] -> y [T, N] with y[r] = x[r] W[g]^T + b[g] for the rows r
// of group g, zeros for rows past the last offset. All but offsets of one high-precision dtype; E
// below 1024. Nothing waits for the offsets. Takes the recipes of fused_linear whose operands are
// e4m3 with scales per row or block ("rowwise", "rowwise_gw_hp", "blockwise", "rowwise_fast",
// "rowwise_fast_gw_hp"), with their options; the weight gradient of "gw_hp" and of "blockwise" is
// made in bf16 on a GPU, in fp32 on the CPU.
// GPUs other than Hopper round products to bf16 first. Differentiable once.
at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias = std::nullopt,
                          std::string_view recipe = kDefaultGroupedRecipe);

// The experts of a mixture, routing given: x [T, H], top_k_index [T, k] int64, top_k_weights [T,
// k], gate_up [E, 2 I, H], down [E, H, I] (stored so, or with the last two dimensions exchanged),
// gate_up_bias [E, 2 I], down_bias [E, H] -> y [T, H] with y[t] = sum over t's experts e of
// weight * (h W_down[e]^T + b_down[e]), h = act(gate) * up, gate and up the halves of x[t]
// W_gate_up[e]^T + b_gate_up[e] (interleaved: its even and odd elements). activation: "silu",
// "gelu", "gelu_tanh", or "clamped_silu" with alpha and limit: gate = min(gate, limit), up =
// clamp(up, -limit, limit), h = gate * sigmoid(alpha * gate) * (up + 1). Indices outside [0, E)
// contribute nothing. H and I multiples of 16. Recipes as grouped_linear has them. Deterministic;
// differentiable once.
at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down,
                       const std::optional<at::Tensor>& gate_up_bias = std::nullopt,
                       const std::optional<at::Tensor>& down_bias = std::nullopt,
                       std::string_view activation = "silu", bool interleaved = false,
                       double alpha = 1.702, double limit = 7.0,
                       std::string_view recipe = kDefaultGroupedRecipe);

// moe_experts whose weights are FP8 and stay it: gate_up [E, 2 I, H] and down [E, H, I] e4m3, read
// where they lie if they are contiguous, and their scales, fp32, which multiply. Of a weight [E, N,
// K] a scale is one for each expert, [E], [E, 1] or [E, 1, 1]; for each row, [E, N] or [E, N, 1];
// or, of both weights, one for each 128x128 block, [E, ceil(N / 128), ceil(K / 128)]. x and h are
// quantized with a scale for each row, or, beside blocks, for 128 elements of one;
// input_granularity, "rowwise" or "blockwise", says which where shapes leave it open (none:
// blocks). The values are moe_experts' where it quantizes the weights so, to the bit ("rowwise",
// "blockwise"). Gradients reach x, top_k_weights and the biases; that of x is made of the same
// codes: rows times the scales of the weight's out-features, quantized, times the codes transposed,
// of which each backward makes a copy; nothing of x is saved. Deterministic; differentiable once.
struct ExpertsFrozenOptions {
  std::optional<at::Tensor> gate_up_bias = std::nullopt;  // [E, 2 I]
  std::optional<at::Tensor> down_bias = std::nullopt;     // [E, H]
  std::string_view activation = "silu";
  bool interleaved = false;
  double alpha = 1.702;
  double limit = 7.0;
  std::optional<std::string_view> input_granularity = std::nullopt;
  bool power_of_two = false;
};
at::Tensor experts_frozen(const at::Tensor& x, const at::Tensor& top_k_index,
                          const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                          const at::Tensor& gate_up_scale, const at::Tensor& down,
                          const at::Tensor& down_scale, const ExpertsFrozenOptions& options = {});

// RMSNorm over the last dimension: x [..., K] high precision, weight [K] high precision or none (1)
// -> y [..., K], contiguous. With xhat = x / sqrt(mean(x^2) + eps) in fp32 and T the dtype of x,
// form "scale_then_round" is y = T(weight * xhat), as F.rms_norm computes it; "round_then_scale" y
// = weight * T(xhat), in the wider of both dtypes (Llama's); "scale_by_one_plus" y = T((1 + weight)
// * xhat) (Gemma's). eps none: 2^-23. Forward and backward are one pass each and round where these
// formulas do, written in eager PyTorch: only the order of fp32 sums is this library's. It depends
// on K alone, so a row's result does not depend on the others, and it is the same on CPU and GPU.
// Differentiable once.
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight = std::nullopt,
                    std::optional<double> eps = std::nullopt,
                    std::string_view form = "scale_then_round");

// LayerNorm over the last dimension: x [..., K] high precision, weight and bias [K] high precision
// or none -> y = T(weight * (x - mean(x)) / sqrt(var(x) + eps) + bias), contiguous. The rest as
// rms_norm has it. In CUDA's autocast it computes in fp32, as F.layer_norm.
at::Tensor layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight = std::nullopt,
                      const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5);

// sum = x + residual, both [..., K] of one dtype, in which the sum is rounded, and y =
// rms_norm(sum, weight, eps, form) -> y, sum. In the backward the gradient of the sum joins dx in
// the same pass.
std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight = std::nullopt,
    std::optional<double> eps = std::nullopt, std::string_view form = "scale_then_round");

// Rotary position embedding: each pair (a, b) of a row becomes (a cos - b sin, b cos + a sin). q
// and k [..., D] of one high-precision dtype T, of 1 to 4 dimensions, rotated in one pass; k may be
// none, and is an empty tensor in the result then. cos and sin broadcast to q[..., :R] and k[...,
// :R], with R = rotary_dim (none: their columns) even; or to [..., R / 2], a column for each pair.
// They are in T or float32 and have no gradient. Columns from R on are copied.
//
// layout: which columns are pairs. "halves": i and i + R / 2 (Llama's rotate_half); "interleaved":
// 2 i and 2 i + 1; "interleaved_to_halves": read as the latter, written as the former (DeepSeek
// V3). rounding: "each" rounds every product and sum, to the wider of both dtypes, in which the
// results are, as eager PyTorch does in x * cos + rotate_half(x) * sin; "sum" rounds the sum to T,
// its gradient's products and sum too: (x.float() * cos + rotate_half(x).float() * sin).to(T);
// "once" rounds the result and the gradient once, as if x were x.float().
//
// Values and gradients have the bits of these formulas in eager PyTorch. Results lie in memory in
// the order of q's and k's dimensions, as eager's; gradients too. Differentiable any number of
// times.
std::tuple<at::Tensor, at::Tensor> rope(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                        const at::Tensor& cos, const at::Tensor& sin,
                                        std::string_view layout = "halves",
                                        std::optional<int64_t> rotary_dim = std::nullopt,
                                        std::string_view rounding = "each");

// For programs that call none of the functions above and only load models that use torch.ops.fp8
// (TorchScript, AOTInductor): refers to libfp8_torch, which a linker would leave out otherwise, and
// so has the operators registered before main. Throws c10::Error if they are not.
void ensure_registered();

}  // namespace fp8
