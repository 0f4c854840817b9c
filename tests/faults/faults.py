"""Deliberate faults, and the test that must notice each: `make test-faults` runs them (run.py).

A fault replaces one piece of text that occurs once in its file; where the file has changed so that
it no longer does, tests/python/build/test_build_faults.py says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One wrong edit. `test`: "ctest NAME", "tsan NAME" or arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    test: str
    gpu: bool = False  # only a GPU test can notice

    @property
    def command(self) -> str:
        """The test as run.py takes it; of a GPU's faults the GPU tests alone."""
        return f"-m gpu {self.test}" if self.gpu else self.test


def apply(fault: Fault, root: Path) -> str:
    """Puts the fault into the tree below `root`; returns the file's text from before."""
    path = root / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: expected its text once in {fault.file}, found it "
            f"{text.count(fault.old)} times; adapt tests/faults/faults.py"
        )
    path.write_text(text.replace(fault.old, fault.new))
    return text


QUANTIZE = "tests/python/quantize/test_quantize_values.py"
LAYOUT = "tests/python/quantize/test_quantize_layout.py"
LINEAR = "tests/python/linear"
DELAYED = f"{LINEAR}/test_linear_delayed.py"
GROUPED = "tests/python/grouped"
EXPERTS = "tests/python/experts"

FAULTS = [
    # --- Python and build: nothing to compile ---
    Fault(
        "the output head is converted",
        "python/fp8/rules.py",
        'HEAD_NAMES = frozenset({"lm_head"})',
        "HEAD_NAMES = frozenset()",
        "tests/python/module/test_convert_rules.py",
    ),
    Fault(
        "from_linear forgets the recipe",
        "python/fp8/linear.py",
        "        new.recipe = name\n",
        "",
        "tests/python/module/test_from_linear.py",
    ),
    Fault(
        "half of the model's dtype reaches the static scale",
        "python/fp8/linear.py",
        "moved.dtype != torch.float32",
        "False",
        "tests/python/module/test_static_scale.py",
    ),
    Fault(
        "a later batch replaces what calibrate saw",
        "python/fp8/calibrate.py",
        "torch.maximum(running, amax.to(running.device), out=running)",
        "running.copy_(amax)",
        "tests/python/module/test_calibrate.py",
    ),
    Fault(
        "a router is taken for any other linear",
        "python/fp8/rules.py",
        "        if self.routed is not None:\n",
        "        if False:\n",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "convert changes the config that other models share",
        "python/fp8/experts.py",
        "        own = copy.copy(config)\n",
        "        own = config\n",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "an expert's rows end where they begin",
        "python/fp8/experts.py",
        "out_int32=True, right=True)",
        "out_int32=True)",
        f"{EXPERTS}/test_experts_passes.py",
    ),
    Fault(
        "the gradient of gathered rows goes to other tokens",
        "python/fp8/experts.py",
        "        rows = grad.index_select(0, back)\n",
        "        rows = grad\n",
        f"{EXPERTS}/test_experts_passes.py",
    ),
    Fault(
        "a clamped gating is taken for SiLU",
        "python/fp8/gating.py",
        "torch.linspace(-13, 17, 64), torch.linspace(19, -15, 64)",
        "torch.linspace(-3, 4, 64), torch.linspace(4, -3, 64)",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "transformers imported later is not noticed",
        "python/fp8/transformers_hook.py",
        "if fullname != MODULE or",
        "if True or",
        f"{EXPERTS}/test_experts_registration.py",
    ),
    Fault(
        "another torch minor is not noticed",
        "python/fp8/_loader.py",
        'version.split("+")[0].split(".")[:2]',
        'version.split("+")[0].split(".")[:1]',
        "tests/python/module/test_loader.py",
    ),
    Fault(
        "an RPATH names the build machine",
        "CMakeLists.txt",
        'set(CMAKE_INSTALL_RPATH "$ORIGIN;',
        'set(CMAKE_INSTALL_RPATH "/opt/build;$ORIGIN;',
        "tests/python/build/test_build_libraries.py",
    ),
    # --- host logic: one C++ test to compile ---
    Fault(
        "halves round up, not to even",
        "csrc/common/formats.h",
        "((clamped >> kShift) & 1U)",
        "1U",
        "ctest test_formats",
    ),
    Fault(
        "NaN becomes the largest value",
        "csrc/common/formats.h",
        "magnitude > 0x7F800000U ? kNanCode : code",
        "code",
        "ctest test_formats",
    ),
    Fault(
        "the last chunk of rows is skipped",
        "csrc/common/launch.h",
        "plan.row_chunks = ceil_div(plan.rows, plan.rows_per_chunk);",
        "plan.row_chunks = std::max<int64_t>(1, plan.rows / plan.rows_per_chunk);",
        "ctest test_launch",
    ),
    Fault(
        "a plan for fast accumulation serves split accumulation",
        "csrc/matmul/plan_key.h",
        "bits(accumulates_fast(args), 22)",
        "0",
        "ctest test_plan_cache",
    ),
    Fault(
        "the plan used last is forgotten first",
        "csrc/matmul/plan_cache.h",
        "if (found->second != entries_.begin()) {",
        "if (false) {",
        "ctest test_plan_cache",
    ),
    Fault(
        "the plan cache is read without its lock",
        "csrc/matmul/plan_cache.h",
        """  std::optional<Plan> find(const Key& key) {
    const std::lock_guard lock(mutex_);
""",
        "  std::optional<Plan> find(const Key& key) {\n",
        "tsan test_plan_cache",
    ),
    # --- CPU kernels and operators ---
    Fault(
        "the scale is its reciprocal",
        "csrc/cpu/quantize.cpp",
        "if (a.scale != nullptr) *a.scale = 1.0F / multiplier;",
        "if (a.scale != nullptr) *a.scale = multiplier;",
        QUANTIZE,
    ),
    Fault(
        "a given scale is multiplied by",
        "csrc/cpu/quantize.cpp",
        "multiplier = 1.0F / *a.static_scale;",
        "multiplier = *a.static_scale;",
        LAYOUT,
    ),
    Fault(
        "the last column is not transposed",
        "csrc/cpu/quantize.cpp",
        "std::clamp<int64_t>(a.cols - col0, 0, kBlock)",
        "std::clamp<int64_t>(a.cols - 1 - col0, 0, kBlock)",
        f"{QUANTIZE} {LAYOUT}",
    ),
    Fault(
        "the product replaces what it should be added to",
        "csrc/matmul/matmul.cpp",
        ": at::add_out(destination, product, into)",
        ": destination.copy_(product)",
        "tests/python/matmul/test_scaled_mm_accumulate.py",
    ),
    Fault(
        "the scales of b's rows go unchecked",
        "csrc/matmul/scaled_mm.cpp",
        "if (is_rowwise(scale_a, a) && is_rowwise(scale_b, b)) {",
        "if (is_rowwise(scale_a, a)) {",
        "tests/python/matmul/test_scaled_mm_errors.py",
    ),
    Fault(
        "the scales of squares are not padded",
        "csrc/common/launch.h",
        "return round_up(blocks_of(cols), 4);",
        "return blocks_of(cols);",
        "ctest test_launch",
    ),
    Fault(
        "a block of a column has the scale of the block before",
        "csrc/cpu/blockwise.cpp",
        "a_.scale_t[tile_row * a_.data_t.rows + col0_ + c] = group.scale;",
        "a_.scale_t[tile_row * a_.data_t.rows + col0_ + c / 2] = group.scale;",
        QUANTIZE,
    ),
    Fault(
        "the weight of a blockwise layer has the scales of its input",
        "csrc/linear/linear.cpp",
        "dgrad.granularity_b = recipe.weight_granularity;",
        "",
        f"{LINEAR}/test_linear_values.py",
    ),
    Fault(
        "the gradient is quantized in the forward's format",
        "csrc/linear/linear.cpp",
        "{.dtype = recipe.grad_dtype,",
        "{.dtype = recipe.forward_dtype,",
        f"{LINEAR}/test_linear_values.py",
    ),
    Fault(
        "the needs of x and weight are exchanged",
        "csrc/linear/autograd.cpp",
        "(needs.dx ? 1 : 0) | (needs.dweight ? 2 : 0)",
        "(needs.dx ? 2 : 0) | (needs.dweight ? 1 : 0)",
        f"{LINEAR}/test_linear_autograd.py",
    ),
    Fault(
        "a written input is taken from memory",
        "csrc/linear/memory.cpp",
        ".version = x.unsafeGetTensorImpl()->version_counter().current_version(),",
        ".version = 0,",
        f"{LINEAR}/test_linear_memory.py",
    ),
    Fault(
        "a group's columns have the reciprocal of their scale",
        "csrc/cpu/grouped.cpp",
        "a.scale_t[item / blocks * a.cols + col0 + c] = 1.0F / multipliers[c];",
        "a.scale_t[item / blocks * a.cols + col0 + c] = multipliers[c];",
        f"{GROUPED}/test_grouped_linear.py",
    ),
    Fault(
        "sentinels go to the last expert",
        "csrc/cpu/grouped.cpp",
        "return expert >= 0 && expert < a.groups ? expert : a.groups;",
        "return expert >= 0 && expert < a.groups ? expert : a.groups - 1;",
        f"{GROUPED}/test_moe_experts.py",
    ),
    Fault(
        "the weight gradient of down forgets the routing weight",
        "csrc/cpu/grouped.cpp",
        "weighted[i] = weight * h;",
        "weighted[i] = h;",
        f"{GROUPED}/test_moe_experts.py",
    ),
    Fault(
        "a changed expert weight is taken from the cache",
        "csrc/linear/memory.cpp",
        "  if (made_of != id) {",
        "  if (!made_of) {",
        f"{GROUPED}/test_grouped_module.py",
    ),
    Fault(
        "the C++ module forgets its recipe",
        "csrc/linear/module.cpp",
        "                      options.recipe(),",
        '                      "tensorwise",',
        "ctest test_nn",
    ),
    Fault(
        "as a power of two, a NaN's multiplier is Inf",
        "csrc/common/formats.h",
        "std::isnan(multiplier) ? multiplier : ",
        "",
        "ctest test_formats",
    ),
    Fault(
        "blocks forget that their scales are to be powers of two",
        "csrc/cpu/blockwise.cpp",
        "fp8_max(args.dtype), args.power_of_two);",
        "fp8_max(args.dtype), false);",
        "tests/python/quantize/test_quantize_power_of_two.py",
    ),
    Fault(
        "two recipes share an input that only one rounds to powers of two",
        "csrc/linear/memory.cpp",
        ".power_of_two = request.power_of_two",
        ".power_of_two = false",
        f"{LINEAR}/test_linear_memory.py",
    ),
    Fault(
        "what is remembered of an input serves a call with a given scale",
        "csrc/linear/memory.cpp",
        "eager_depth > 0 && !request.static_scale.defined()",
        "eager_depth > 0",
        f"{LINEAR}/test_linear_static.py",
    ),
    Fault(
        "an old amax stays in the window for a call too long",
        "csrc/cpu/quantize.cpp",
        "for (int ago = 1; ago <= core::kAmaxWindow; ++ago) {",
        "for (int ago = 1; ago <= core::kAmaxWindow + 1; ++ago) {",
        DELAYED,
    ),
    Fault(
        "a delayed scale hides an infinite value",
        "csrc/cpu/quantize.cpp",
        "const Input source{a, is_delayed(a)};",
        "const Input source{a, false};",
        DELAYED,
    ),
    Fault(
        "x and dy of a layer share a history",
        "csrc/linear/linear.cpp",
        "history_of(*args.weight, delayed::Operand::kGradOutput, recipe)",
        "history_of(*args.weight, delayed::Operand::kInput, recipe)",
        DELAYED,
    ),
    # --- kernels ---
    Fault(
        "CUDA: the first block alone records the amax of a delayed call",
        "csrc/quantize/cast.cu",
        "if (bits > seen) atomicMax(",
        "if (bits > seen && blockIdx.x == 0) atomicMax(",
        DELAYED,
        gpu=True,
    ),
    Fault(
        "CUDA: the window lacks the oldest of its calls",
        "csrc/quantize/tile.cuh",
        "if (lane < kAmaxWindow) bits",
        "if (lane < kAmaxWindow - 1) bits",
        DELAYED,
        gpu=True,
    ),
    Fault(
        "CUDA: as a power of two, a NaN's multiplier is Inf",
        "csrc/common/vectors.cuh",
        "if (power_of_two && bits <= kExponentBits) {",
        "if (power_of_two) {",
        "tests/python/quantize/test_quantize_power_of_two.py",
        gpu=True,
    ),
    Fault(
        "CUDA: blocks of a column forget that their scales are to be powers of two",
        "csrc/quantize/blockwise.cu",
        """static_cast<int>(threadIdx.x)),
                          Format::kMax, p.power_of_two);""",
        """static_cast<int>(threadIdx.x)),
                          Format::kMax, false);""",
        "tests/python/quantize/test_quantize_power_of_two.py",
        gpu=True,
    ),
    Fault(
        "CUDA: a row's scale is its reciprocal",
        "csrc/quantize/rowwise.cu",
        "p.scale[row] = group.scale;",
        "p.scale[row] = group.quant_multiplier;",
        QUANTIZE,
        gpu=True,
    ),
    Fault(
        "CUDA: the last tile of a strip is skipped",
        "csrc/quantize/cast.cu",
        "for (int64_t tile = tile_begin; tile < tile_end; ++tile) {",
        "for (int64_t tile = tile_begin; tile + 1 < tile_end; ++tile) {",
        f"{QUANTIZE} {LAYOUT}",
        gpu=True,
    ),
    Fault(
        "CUDA: in one launch, the first tile read again is not",
        "csrc/quantize/resident.cu",
        "if (i > kLast) tiles.copy(",
        "if (i > kSlots<T>) tiles.copy(",
        "tests/python/quantize/test_quantize_one_launch.py",
        gpu=True,
    ),
    Fault(
        "CUDA: in one launch, a row's second 16 bytes are as long as its first",
        "csrc/quantize/resident.cuh",
        "16 - min(max(bytes - 16 * quad, 0), 16)",
        "16 - min(max(bytes, 0), 16)",
        "tests/python/quantize/test_quantize_one_launch.py",
        gpu=True,
    ),
    Fault(
        "CUDA: in one launch, a row's maximum leaves out what its last columns hold",
        "csrc/quantize/resident_rowwise.cu",
        "(parts - warp + kWarps - 1) / kWarps",
        "(parts - 1 - warp + kWarps - 1) / kWarps",
        "tests/python/quantize/test_quantize_one_launch.py",
        gpu=True,
    ),
    Fault(
        "CUDA: the last rows do not count for the maximum",
        "csrc/quantize/statistics.cu",
        "for (int64_t row = row_begin + warp; row < row_end; row += kWarps) {",
        "for (int64_t row = row_begin + warp; row + kWarps < row_end; row += kWarps) {",
        QUANTIZE,
        gpu=True,
    ),
    Fault(
        "CUDA: a block's rows get their neighbours' scales",
        "csrc/quantize/blockwise.cu",
        "__shfl_sync(0xFFFFFFFFU, of_row, r, 16)",
        "__shfl_sync(0xFFFFFFFFU, of_row, r ^ 1, 16)",
        QUANTIZE,
        gpu=True,
    ),
    Fault(
        "CUDA: the halves of turned words are not put in order",
        "csrc/quantize/blockwise.cu",
        "swizzle % 2 == 0 ? q :",
        "true ? q :",
        QUANTIZE,
        gpu=True,
    ),
    Fault(
        "CUDA: the scale modes of a and b are exchanged",
        "csrc/matmul/lt_matmul.cpp",
        "A_SCALE_MODE, scale_mode(granularity_of_b(args))",
        "A_SCALE_MODE, scale_mode(args.granularity)",
        "tests/python/matmul/test_scaled_mm_blocks.py",
        gpu=True,
    ),
    Fault(
        "CUDA: the scales of a and b are exchanged",
        "csrc/matmul/lt_matmul.cpp",
        "CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.scale_b,",
        "CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.scale_a,",
        "tests/python/matmul/test_scaled_mm.py",
        gpu=True,
    ),
    Fault(
        "CUDA: slots of earlier warps do not count",
        "csrc/grouped/route.cu",
        "row += warp_count[w][bucket];",
        "row += 0;",
        f"{GROUPED}/test_moe_experts.py",
        gpu=True,
    ),
    Fault(
        "CUDA: a tile of a group begins where the group begins",
        "csrc/grouped/route.cu",
        "entry.row = first_row[low] + done;",
        "entry.row = first_row[low];",
        f"{GROUPED}/test_grouped_cuda.py",
        gpu=True,
    ),
    Fault(
        "CUDA: the product replaces what it should be added to",
        "csrc/matmul/lt_matmul.cpp",
        "args.accumulate ? 1.0F : 0.0F",
        "0.0F",
        "tests/python/matmul/test_scaled_mm_accumulate.py",
        gpu=True,
    ),
]
