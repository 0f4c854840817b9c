// Measured choice among cuBLASLt's candidates. Off unless asked for: by FP8_AUTOTUNE=1 for every
// problem when it is first met, or while a scope is open (fp8.autotune in Python opens one). What
// was measured is kept on disk (host/tuning.h) and not measured again.
#pragma once

#include <string>
#include <vector>

#include "fp8/core.h"

namespace at {
class Tensor;  // declared alone: fp8._C sees no torch header
}  // namespace at

namespace fp8::autotune {

// Whether problems are tuned when they are met: costs one relaxed load.
bool enabled();

// Puts the best known or measured plan for this call in place of `plan`, and remembers it. Does
// nothing if `plan` is tuned already, or during a CUDA graph capture. Allocates (twice the L2,
// workspace, and a copy of `out` when args.accumulate), runs each candidate ten times and waits for
// the GPU. What it leaves in `out` is undefined, unless args.accumulate: then `out` is not touched.
void tune(const core::MatmulArgs& args, core::MatmulPlan& plan,
          const at::Tensor& out);  // what args.out points to, contiguous

struct Problem {
  std::string text;
  double first_us = 0;   // the heuristic's first choice; 0 where not known
  double chosen_us = 0;  // what runs from now on
  const char* source;    // "measured", "file", or "memory": tuned before in this process
};

// A scope is process-wide, because a backward runs in autograd's own threads.
void open_scope();
std::vector<Problem> close_scope();  // the problems that were met while scopes were open

}  // namespace fp8::autotune
