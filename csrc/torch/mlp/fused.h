// The kernels of an MLP's activation: which requests they take, and their arguments. unit.h
// chooses.
#pragma once

#include "torch/mlp/unit.h"

namespace fp8::mlp_node {

// Whether kernels can read gate and up, and dh where there is one: aligned rows of whole sixteens.
bool suits_kernels(const Products& p, const at::Tensor& dh);

// Whether fused_backward makes what is asked for.
bool is_fused(const Unit& unit, const Products& p, const Wanted& wanted,
              const GradientRequests& requests);

// Whether it reads codes of gate and up, where p has them; else they are to be decoded before.
bool reads_codes(const Unit& unit, const Products& p);

// e4m3, row-major.
Operand fused_h(const Unit& unit, const Products& p, const QuantizeRequest& request);

// FP8 alone: both ways, and h transposed.
UnitGradients fused_backward(const Unit& unit, const Products& p, const at::Tensor& dh,
                             const Wanted& wanted, const GradientRequests& requests);

// The gradients of the products in their dtype, and h; on their way to other passes.
UnitGradients fused_values(const Unit& unit, const Products& p, const at::Tensor& dh,
                           const Wanted& wanted);

}  // namespace fp8::mlp_node
