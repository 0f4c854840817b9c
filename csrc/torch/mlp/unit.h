// The activation between an MLP's products: its forward and backward, each with the quantization
// that follows. On a GPU one pass where there is a kernel for the recipe; else ATen's operators,
// then a quantization, with the same bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "torch/common/recipe.h"
#include "torch/mlp/mlp.h"
#include "torch/quantize/operand.h"

namespace fp8::mlp_node {

// As core::MlpActivation counts them.
enum class Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kReluSquared, kClampedSilu };

// By ATen's operator, with its gradient; not of what has two inputs (kClampedSilu).
at::Tensor act(Activation activation, const at::Tensor& x);

// What a unit computes, and where its gate and up lie.
struct Unit {
  Form form = Form::kSeparate;
  Activation activation = Activation::kSilu;
  bool gate_second = false;  // of a merged product
  double alpha = 1.702;
  double limit = 7.0;
};

// Views of the products. up is undefined where the unit is plain. Both are in a product's dtype, or
// e4m3 codes with a scale for each row.
struct Products {
  at::Tensor gate;                       // [M, I]
  at::Tensor up;                         // [M, I]
  at::Tensor joint;                      // [M, 2 I], merged: what both are halves of
  at::ScalarType dtype = at::kBFloat16;  // of a product
  at::Tensor gate_scale;                 // [>= M] fp32, with codes
  at::Tensor up_scale;                   // the same; of a merged product gate's
};
Products products_of(const Unit& unit, const at::Tensor& gate_out,  // [M, I] or merged [M, 2 I]
                     const at::Tensor& up_out);                     // [M, I], separate

// A product as a backward may keep it: e4m3, in half of 16 bits. Its rows have a scale each, which
// takes no pass of its own and no workspace, and e4m3 as it is without a scale reaches 2^15 below a
// row's amax before it loses bits. See docs/fused.md for what that costs a gradient.
Side store(const at::Tensor& product);  // [M, N]; undefined for undefined
Products products_of(const Unit& unit, const Side& gate_out, const Side& up_out, int64_t features,
                     at::ScalarType dtype);

// h as down's products read it.
Operand quantize_h(const Unit& unit, const Products& products, const QuantizeRequest& request);

// The gradients of the two products, as the layers' products read them, and h transposed.
struct Wanted {
  bool gate = false;
  bool up = false;  // of a merged product: with gate
  bool h = false;
  bool values = false;  // in high precision too, not only as FP8
};
struct UnitGradients {
  at::Tensor gate;  // [M, I], merged [M, 2 I]; undefined where a kernel wrote codes alone
  at::Tensor up;    // [M, I]
  at::Tensor h;     // [M, I]
  Operand q_gate;
  Operand q_up;
  Operand q_h;
};
struct GradientRequests {
  QuantizeRequest gate;
  QuantizeRequest up;
  QuantizeRequest h;
};
UnitGradients backward_unit(const Unit& unit, const Products& products,
                            const at::Tensor& dh,  // [M, I]; undefined where only h is wanted
                            const Wanted& wanted, const GradientRequests& requests);

}  // namespace fp8::mlp_node
