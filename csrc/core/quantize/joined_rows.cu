// A matrix in several tensors with a scale for each row, in one pass: the frame of row.cuh.
#include "core/quantize/joined.cuh"
#include "core/quantize/joined_launchers.h"
#include "core/quantize/padded_rows.cuh"
#include "core/quantize/row.cuh"

namespace fp8::core {
namespace {

constexpr int kMaxVectors = 4;  // of eight columns a thread, before a row has more threads
constexpr int kBlockThreads = 128;

template <typename Source>
struct JoinedRows : RowwiseParams {
  Source from;

  __host__ __device__ Source source() const { return from; }
  __host__ __device__ PaddedRows sink() const { return {data, scale}; }
};

}  // namespace

void launch_joined_rowwise(const JoinedArgs& args, const RowwiseParams& params,
                           cudaStream_t stream) {
  RowwiseParams planned = params;
  planned.plan = plan_rowwise(params.data.ld, kBlockThreads, kMaxVectors);
  with_joined_source(args, [&](auto source) {
    launch_rows<E4M3, 1, kMaxVectors>(JoinedRows<decltype(source)>{planned, source},
                                      params.data.rows, params.pdl, stream);
  });
}

}  // namespace fp8::core
