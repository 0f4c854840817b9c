// The smallest tool that listens to NVTX: calls `on_push(name)` and `on_pop()`. It is what
// Nsight Systems injects, reduced to two callbacks.
#pragma once

#include <nvtx3/nvToolsExt.h>

namespace nvtx_listener {

inline void (*on_push)(const char* name) = nullptr;
inline void (*on_pop)() = nullptr;

inline int push(const char* name) {
  on_push(name);
  return 0;
}
inline int pop() {
  on_pop();
  return 0;
}

// NVTX calls this once, before its first event; 1: the tool listens.
inline int listen(NvtxGetExportTableFunc_t get_export_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(
      const_cast<void*>(get_export_table(NVTX_ETID_CALLBACKS)));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size) == 0 ||
      size <= NVTX_CBID_CORE_RangePop) {
    return 0;
  }
  *table[NVTX_CBID_CORE_RangePushA] = reinterpret_cast<NvtxFunctionPointer>(push);
  *table[NVTX_CBID_CORE_RangePop] = reinterpret_cast<NvtxFunctionPointer>(pop);
  return 1;
}

}  // namespace nvtx_listener
