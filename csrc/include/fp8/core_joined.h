// A matrix that lies in several tensors, quantized as one. Used by the torch layer; not installed.
#pragma once

#include <array>

#include "fp8/core.h"

namespace fp8::core {

inline constexpr int kMaxJoinedParts = 4;

struct JoinedPart {
  const void* x = nullptr;  // contiguous columns
  int64_t extent = 0;       // its rows; side by side, its columns; positive
  int64_t ld = 0;           // elements from row to row
};

// The parts lie one below the other, [sum of extents, cols], or side by side, [rows, sum of
// extents]. `quantize` has the whole matrix's extents and everything else; its x, ld and whole_gpu
// are not looked at, and column_amax is not made.
struct JoinedArgs {
  QuantizeArgs quantize;
  std::array<JoinedPart, kMaxJoinedParts> parts;
  int count = 0;  // of parts
  bool side_by_side = false;
};

// Whether the kernels take these parts: at most kMaxJoinedParts of 16-bit elements, whose rows lie
// on 16 bytes; side by side, of multiples of 8 columns.
bool suits_joined(const JoinedArgs& args);

// core::quantize of the matrix: the same bits as of one that was copied together.
size_t quantize_joined_workspace_bytes(const JoinedArgs& args);
void quantize_joined(const JoinedArgs& args, Stream stream);

}  // namespace fp8::core
