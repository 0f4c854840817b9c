"""`fp8.autotune`: measures cuBLASLt's candidates for each matmul of a model and keeps the best.

The measuring is in C++ (csrc/torch/matmul/autotune.cpp), at the place where a matmul is planned.
Here the layers are run, forward and backward, on random tensors of their shapes while that is
switched on: so exactly the problems of real calls are tuned, padding and dtypes included.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import nn

from .._native import loader
from .._native.progress import progress
from ..nn._fused_siblings import joint_layers
from ..nn._linear import Linear
from ..recipe import Recipe, check_recipe

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_one_at_a_time = Lock()


@dataclass(frozen=True)
class Tuned:
    """One matmul problem. Times are medians with a cold L2; 0 where they are not known."""

    problem: str
    first_us: float
    """Of the algorithm that cuBLASLt's heuristic puts first."""
    chosen_us: float
    """Of the one that runs from now on."""
    source: str
    """`measured` now, read from the `file`, or in `memory`: tuned before in this process."""

    @property
    def gain(self) -> float:
        """How many times as fast: first_us / chosen_us; 1 where they are not known."""
        return self.first_us / self.chosen_us if self.chosen_us else 1.0


@dataclass(frozen=True)
class AutotuneReport:
    """What `fp8.autotune` found. `str()` is a table."""

    problems: tuple[Tuned, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left out and why, and where the results are kept."""

    def __str__(self) -> str:
        rows = [("problem", "first us", "chosen us", "gain", "source")]
        for tuned in self.problems:
            first, chosen = (f"{us:.1f}" if us else "-" for us in (tuned.first_us, tuned.chosen_us))
            gain = f"{tuned.gain:.2f}x"
            rows.append((_short(tuned.problem), first, chosen, gain, tuned.source))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
            )
            for row in rows
        ]
        sources = Counter(tuned.source for tuned in self.problems)
        changed = sum(tuned.chosen_us != tuned.first_us for tuned in self.problems)
        total = (
            f"{len(self.problems)} problems: {sources['measured']} measured, "
            f"{sources['file']} from the file, {sources['memory']} tuned before; "
            f"{changed} with another algorithm than the first"
        )
        return "\n".join([*(lines if self.problems else []), total, *self.notes])


@dataclass(frozen=True)
class _Case:
    """One layer's forward and backward."""

    m: int
    k: int
    n: int
    bias: bool
    dtype: torch.dtype
    recipe: str
    device: torch.device


def autotune(
    model: nn.Module | Iterable[tuple[int, int, int]],
    tokens: int | Sequence[int] | None = None,
    *,
    recipe: str | Recipe | None = None,
    dtype: torch.dtype | None = None,
    bias: bool | None = None,
) -> AutotuneReport:
    """Measure which cuBLASLt algorithm is the fastest for each matmul of a model, and use it.

    By default a matmul runs the algorithm that cuBLASLt's heuristic puts first. This function
    measures up to eight candidates per problem, cold and in turns, and changes to another one if it
    is at least 2% faster. Results hold for this process and are kept on disk, per GPU model and
    cuBLASLt version (`fp8.info()["autotune"]` shows where): what was measured once is not measured
    again. Without this call, or `FP8_AUTOTUNE=1`, the file is not read.

    It takes well under a second for most problems, needs the memory of one layer's forward and
    backward and about 300 MB, waits for the GPU, and should have the GPU for itself. Call it before
    the training and before any CUDA graph capture. Under `torch.autocast`, call it inside that
    context. The state of the random generators does not change.

    Another algorithm adds in another order, so results may change in their last bits, within the
    same error bounds. Candidates that are nearly equal may be chosen differently by two
    measurements; with the same file the choice is the same.

    Args:
        model: a module, of which every distinct `fp8.Linear` on a CUDA device is tuned, or shapes
            (M, K, N): tokens, in-features, out-features.
        tokens: with a model: M, the product of the input's leading dimensions, or several of them.
            Default 8192. The choice holds for these M alone.
        recipe: with shapes: a recipe as `fp8.Linear` takes it. Default "tensorwise".
        dtype: with shapes: bfloat16, float16 or float32, of x, weight and y. Default bfloat16.
        bias: with shapes: whether the layers have one. Default False.

    Returns:
        AutotuneReport: `print` it to see each problem with the times of the first choice and of the
        chosen one. Layers on the CPU have nothing to tune; the report says so.

    Raises TypeError or ValueError for arguments that mean nothing (a model with `recipe`, `dtype`
    or `bias`, shapes with `tokens`, extents below 1), and RuntimeError during a CUDA graph capture.

    Example:
        >>> model = fp8.convert(model.cuda())
        >>> print(fp8.autotune(model, tokens=8192))
        problem                                                first us  chosen us   gain  source
        m=8192 n=14336 k=4096 a=e4m3 b=e4m3 out=bfloat16 ...      812.3      750.1  1.08x  measured
    """
    if isinstance(model, nn.Module):
        for name, value in (("recipe", recipe), ("dtype", dtype), ("bias", bias)):
            if value is not None:
                raise ValueError(f"fp8.autotune: {name} is for shapes; a model has its own")
        every = _cases_of_model(model, _token_counts(8192 if tokens is None else tokens))
    else:
        if tokens is not None:
            raise ValueError("fp8.autotune: tokens is for a model; a shape (M, K, N) has them")
        name = str(check_recipe("tensorwise" if recipe is None else recipe))
        every = _cases_of_shapes(model, name, dtype or torch.bfloat16, bool(bias))
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fp8.autotune: call it before the CUDA graph capture, not inside")
    cases = [case for case in every if case.device.type == "cuda" and case.dtype in _DTYPES]
    notes = []
    if not every:
        notes.append("nothing to tune: no fp8.Linear, or no shapes")
    elif len(cases) < len(every):
        notes.append(
            f"{len(every) - len(cases)} of {len(every)} cases left out: cuBLASLt multiplies on a "
            "CUDA device, for layers in bfloat16, float16 or float32"
        )
    with _one_at_a_time, _measuring() as problems:
        for case in progress(cases, "fp8.autotune", "layer"):
            _run(case)
    for gpu in sorted({torch.cuda.get_device_name(case.device) for case in cases}):
        file = loader.native().autotune_file(gpu)
        notes.append(f"kept in {file}" if file else "not kept: no folder (see FP8_CACHE_DIR)")
    return AutotuneReport(tuple(problems), tuple(notes))


@contextmanager
def _measuring() -> Iterator[list[Tuned]]:
    """Tunes each problem that is met inside; at the end the list holds them."""
    problems: list[Tuned] = []
    native = loader.native()
    native.autotune_open()
    try:
        yield problems
    finally:
        problems += [Tuned(*facts) for facts in native.autotune_close()]


def _cases_of_model(model: nn.Module, tokens: Sequence[int]) -> list[_Case]:
    """The distinct layers, and those that are computed as one, for each number of tokens."""
    modules = list(model.modules())
    groups: list[list[Any]] = [[module] for module in modules if isinstance(module, Linear)]
    groups += [layers for module in modules for layers in joint_layers(module)]
    cases = [
        _Case(
            m,
            layers[0].in_features,
            sum(layer.out_features for layer in layers),
            any(layer.bias is not None for layer in layers),
            layers[0].weight.dtype,
            layers[0].recipe,
            layers[0].weight.device,
        )
        for m in tokens
        for layers in groups
    ]
    return list(dict.fromkeys(cases))


def _cases_of_shapes(
    shapes: Iterable[tuple[int, int, int]], recipe: str, dtype: torch.dtype, bias: bool
) -> list[_Case]:
    if not isinstance(shapes, Iterable):
        raise TypeError(
            f"fp8.autotune: expected an nn.Module or shapes (M, K, N), got {type(shapes).__name__}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"fp8.autotune: expected dtype bfloat16, float16 or float32, got {dtype}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    cases = []
    for shape in shapes:
        if not (isinstance(shape, Sequence) and len(shape) == 3 and all(map(_is_extent, shape))):
            raise ValueError(
                f"fp8.autotune: expected shapes (M, K, N) of positive integers, got {shape!r}"
            )
        cases.append(_Case(*shape, bias, dtype, recipe, device))
    return list(dict.fromkeys(cases))


def _token_counts(tokens: object) -> list[int]:
    counts = list(tokens) if isinstance(tokens, Sequence) else [tokens]
    if not counts or not all(map(_is_extent, counts)):
        raise ValueError(
            f"fp8.autotune: expected tokens, a positive integer or several, got {tokens!r}"
        )
    return counts


def _is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _run(case: _Case) -> None:
    """The three matmuls of one layer, as a training step runs them."""
    generator = torch.Generator(case.device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=case.device, dtype=dtype)

    with torch.inference_mode(False), torch.enable_grad():
        shapes = [(case.m, case.k), (case.n, case.k)] + [(case.n,)] * case.bias
        inputs = [random(*shape, dtype=case.dtype).requires_grad_() for shape in shapes]
        y = torch.ops.fp8.fused_linear(*inputs, recipe=case.recipe)
        torch.autograd.grad(y, inputs, random(*y.shape, dtype=y.dtype))


def _short(problem: str) -> str:
    """As in the file, without strides and alignments."""
    text = re.sub(r" (?:ld[abo]|align)=\S+", "", problem.removeprefix("matmul "))
    return text.replace("float8_e4m3fn", "e4m3").replace("float8_e5m2", "e5m2")
