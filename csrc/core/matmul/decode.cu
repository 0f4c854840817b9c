// Launches the decode kernels; compiled for sm_90a.
#include <array>
#include <atomic>

#include "core/device/shared_memory.h"
#include "core/matmul/decode.cuh"
#include "core/matmul/decode_quantize.cuh"

namespace fp8::core {
namespace {

template <int kTokens, bool kBlocks, typename X>
void launch_typed(const DecodeParams& params, bool pdl, cudaStream_t stream) {
  const auto kernel = decode_kernel<kTokens, kBlocks, X>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  shared_memory_of(reinterpret_cast<const void*>(kernel), known, 0);
  launch(kernel, static_cast<unsigned>(params.plan.blocks), kDecodeThreads, stream, params,
         {.pdl = pdl, .shared_bytes = static_cast<size_t>(params.plan.shared_bytes)});
}

template <int kTokens, typename X>
void launch_tokens(const DecodeParams& params, bool blocks, bool pdl, cudaStream_t stream) {
  blocks ? launch_typed<kTokens, true, X>(params, pdl, stream)
         : launch_typed<kTokens, false, X>(params, pdl, stream);
}

}  // namespace

void launch_decode(const DecodeParams& params, bool blocks, bool pdl, cudaStream_t stream) {
  if (params.plan.source == DecodeSource::kQuantized) {
    require(params.plan.tokens == 8, "decode: more rows than a block quantizes");
    return dispatch_input(params.dtype, [&](auto type) {
      launch_tokens<8, typename decltype(type)::type>(params, blocks, pdl, stream);
    });
  }
  dispatch_input(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto quantize =
        blocks ? decode_quantize_kernel<true, T> : decode_quantize_kernel<false, T>;
    launch(quantize, static_cast<unsigned>(params.m), kDecodeQuantizeThreads, stream, params,
           {.pdl = true});
  });
  constexpr bool kOverlaps = true;
  switch (params.plan.tokens) {
    case 8:
      return launch_tokens<8, void>(params, blocks, kOverlaps, stream);
    case 16:
      return launch_tokens<16, void>(params, blocks, kOverlaps, stream);
    case 32:
      return launch_tokens<32, void>(params, blocks, kOverlaps, stream);
    default:
      return launch_tokens<64, void>(params, blocks, kOverlaps, stream);
  }
}

}  // namespace fp8::core
