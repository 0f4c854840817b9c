// The passes of fp8/core_grouped.h on the CPU: reference and fallback. Same arguments; the same
// bits where only quantization and sums in a fixed order are involved (activations call the C
// library's exp, which may differ from the GPU's in the last place).
#pragma once

#include "fp8/core_grouped.h"

namespace fp8::cpu {

void route(const core::RouteArgs& args);
void scatter_rows(const core::ScatterRowsArgs& args);
void make_tile_table(const core::TileTableArgs& args);
void quantize_group_columns(const core::GroupColumnsArgs& args);
void quantize_stack_squares(const core::StackSquaresArgs& args);
void gate_forward(const core::GateForwardArgs& args);
void gate_backward(const core::GateBackwardArgs& args);
void combine(const core::CombineArgs& args);
void finish_rows(const core::FinishRowsArgs& args);
void group_sums(const core::GroupSumsArgs& args);

}  // namespace fp8::cpu
