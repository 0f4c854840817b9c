// What mlp's backward takes of its forward.
#pragma once

#include "torch/common/recipe.h"
#include "torch/mlp/mlp.h"

namespace fp8::mlp_node {

inline bool is_tensorwise(const Recipe& recipe) {
  return recipe.granularity == core::Granularity::kTensorwise;
}

// What the backward takes, by what it is for.
struct Saves {
  bool to_h;      // the gradient of h, and what lies before it
  bool products;  // gate_out and up_out
  bool fp8;       // these as codes
  bool x;         // for the weight gradients of gate and up
  bool weights;   // of gate and up: amaxes, tensorwise
  bool recompute;

  explicit Saves(int64_t needs)
      : to_h((needs & mlp_needs::kToH) != 0),
        products(to_h || (needs & mlp_needs::kDown) != 0),
        fp8((needs & mlp_needs::kFp8) != 0 && products),
        x((needs & (mlp_needs::kGate | mlp_needs::kUp)) != 0),
        weights((needs & mlp_needs::kX) != 0),
        recompute((needs & mlp_needs::kRecompute) != 0 && products) {
    if (!recompute) return;
    products = false;
    x = false;
    weights = true;
  }
};

}  // namespace fp8::mlp_node
