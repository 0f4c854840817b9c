// The passes of moe_experts on tensors, which its forward and backward share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fp8/core_grouped.h"
#include "torch/common/recipe.h"
#include "torch/quantize/operand.h"

namespace fp8::grouped {

// T tokens, k slots each; see core_grouped.h.
struct Routing {
  at::Tensor offsets;  // [E] int32
  at::Tensor place;    // [T * k] int32
  at::Tensor source;   // [T * k] int32
};

Routing sort_by_expert(const at::Tensor& experts,  // [T, k] int64
                       int64_t groups);

struct Gate {
  core::Activation activation;
  bool interleaved;
  double alpha;
  double limit;
};

core::GateArgs gate_args(const Gate& gate,
                         const at::Tensor& gate_up_out,  // [T * k, 2 I]
                         const at::Tensor& bias,         // [E, 2 I], or undefined
                         const at::Tensor& offsets);     // [E] int32

// act(gate) * up as rows of an operand, quantized as they are computed: [T * k, I].
Side gated_rows(const Gate& gate,
                const at::Tensor& gate_up_out,  // [T * k, 2 I]
                const at::Tensor& bias,         // [E, 2 I], or undefined
                const at::Tensor& offsets,      // [E] int32
                const Recipe& recipe);

// A token's rows added up: [tokens, H].
at::Tensor combine_rows(const at::Tensor& rows,  // [T * k, H]
                        int64_t tokens, const Routing& routing,
                        const at::Tensor& weights,  // [T, k] fp32, or undefined
                        const at::Tensor& experts,  // [T, k] int64, or undefined
                        const at::Tensor& bias);    // [E, H], or undefined

// Per expert the sum of its rows of x, or of the rows that its slots come from: [E, cols].
at::Tensor sum_by_expert(const at::Tensor& x,  // [T * k, cols], or gathered [T, cols]
                         const Routing& routing, bool gathered,
                         const at::Tensor& weights);  // [T, k] fp32, or undefined

// What down's bias adds to the routing weights' gradient: dy · bias of each slot's expert.
void add_bias_part(const at::Tensor& dy,          // [T, H]
                   const at::Tensor& down_bias,   // [E, H]
                   const at::Tensor& experts,     // [T, k] int64
                   const at::Tensor& d_weights);  // [T, k] fp32, added to

// For vector loads: contiguous on 16 bytes. Undefined for None.
at::Tensor contiguous(const std::optional<at::Tensor>& t);

}  // namespace fp8::grouped
