// For test_ranges.py: a tool that writes a line for each NVTX range to the file $NVTX_HEARD.
#include "../../cpp/nvtx_listener.h"

#include <cstdio>
#include <cstdlib>

namespace {

void write(char sign, const char* name) {
  static std::FILE* file = std::fopen(std::getenv("NVTX_HEARD"), "w");
  std::fprintf(file, "%c%s\n", sign, name);
  std::fflush(file);
}

}  // namespace

extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_export_table) {
  nvtx_listener::on_push = [](const char* name) { write('<', name); };
  nvtx_listener::on_pop = [] { write('>', ""); };
  return nvtx_listener::listen(get_export_table);
}
