// Products of which a row has the same bits whatever the other rows are, and however many: what
// fp8.batch_invariant() asks for of every forward. cuBLASLt does not promise that: its choice
// depends on M, and with it the order of sums.
//
// One kernel makes all of them. On compute capability 9.0 it is that of grouped products
// (core/matmul/grouped_kernel.cuh) with one group: its order is a function of K and of how sums are
// accumulated alone. On the CPU it is cpu::multiply, since at::mm's order is a function of M too.
// Elsewhere there is none, and a forward raises.
#pragma once

namespace at {
class Tensor;  // declared alone: fp8._C sees no torch header
}  // namespace at

namespace fp8 {

struct Output;
struct Recipe;
struct Side;

namespace batch_invariant {

// While a scope is open, or always with FP8_BATCH_INVARIANT=1. Costs one relaxed load. A
// forward of dense layers asks once and passes the answer on: another thread may open or close a
// scope meanwhile.
bool enabled();

// Scopes nest, and are process-wide, because a forward may run again in autograd's own threads.
void open_scope();
void close_scope();

// enabled(). If it is, ValueError in the name of fp8::`op` for a recipe with scales that depend on
// more than a row.
bool checked(const char* op, const Recipe& recipe, bool static_input);
// The same of fp8::linear_frozen, whose x has one scale; for a caller who knows that it is enabled.
void check_frozen(bool static_input);

// a b^T of fp32 matrices on the CPU: [m, k], [n, k] -> [m, n].
at::Tensor multiply_cpu(const at::Tensor& a, const at::Tensor& b);

// The product of torch/matmul/matmul.h on a GPU, rounded once, bias included. NotImplementedError
// where the kernel does not run, or refuses the extents.
at::Tensor multiply_cuda(const Side& a, const Side& b, const Output& output);

}  // namespace batch_invariant
}  // namespace fp8
