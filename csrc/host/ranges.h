// NVTX ranges: operators and autograd nodes by name on the timeline of Nsight Systems and of what
// else listens to NVTX. torch.profiler needs none of them, since it hears of both from PyTorch.
//
// NVTX itself is the switch. A tool says by NVTX_INJECTION64_PATH that it listens, which is looked
// up once; without one a range is two tests of a pointer, 3 to 4 ns (a loop of them, 2.1 GHz Xeon),
// against some 10 us that an operator takes on the host. So there is no variable to set.
//
// The headers come with the CUDA Toolkit and link nothing. Without them there are no ranges.
#pragma once

#include <cstddef>
#include <utility>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define FP8_HAS_NVTX 1
#endif

namespace fp8 {

// From here to the end of the scope. `name` is for the tool to copy.
class Range {
 public:
#ifdef FP8_HAS_NVTX
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
#else
  explicit Range(const char* /*name*/) {}
#endif
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

// A name as a template argument.
template <size_t kSize>
struct RangeName {
  char text[kSize]{};
  // NOLINTNEXTLINE(google-explicit-constructor): a string literal is meant to become one.
  consteval RangeName(const char (&literal)[kSize]) {
    for (size_t i = 0; i < kSize; ++i) text[i] = literal[i];
  }
};

// `function`, under a range: Ranged<"fp8::scaled_mm", &kernel::scaled_mm>::call.
template <RangeName kName, auto kFunction>
struct Ranged;
template <RangeName kName, typename Result, typename... Args, Result (*kFunction)(Args...)>
struct Ranged<kName, kFunction> {
  static Result call(Args... args) {
    const Range range(kName.text);
    return kFunction(std::forward<Args>(args)...);
  }
};

}  // namespace fp8
