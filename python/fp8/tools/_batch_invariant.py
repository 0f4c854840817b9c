"""`fp8.batch_invariant`: rows whose bits do not depend on the rows beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

from .._native import loader


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the context, each row of a layer's output is a function of that row of x alone: it has
    the same bits whatever the other rows are, and however many (1, 64, 65, 8192).

    For a sampler and a trainer that are to agree to the bit, and for finding out what a change
    changes. Outside of it cuBLASLt adds in an order that depends on M, and few rows of frozen
    layers have a kernel of their own.

    It holds for the forward of `fp8.Linear`, `fp8.FrozenLinear`, `fp8.MergedLinear`,
    `fp8.GatedMLP`, `fp8.MLP`, `fp8.GroupedLinear` and experts, and of the operators below them, on
    weights that do not change, with recipes that have a scale for each row or block: all of
    "rowwise.." and "blockwise". One kernel makes all their products then, on Hopper and on the CPU
    (another one: CPU and GPU do not agree to the bit). Gradients are made as ever. What lies
    between the layers is the caller's: attention, and norms that are not fp8's, need batch
    invariant kernels of their own.

    The switch is of the process, whatever the thread; contexts nest. CUDA graphs keep what was on
    at their capture. Where activations are recomputed, keep it open over the backward too.
    `FP8_BATCH_INVARIANT=1` is the same for the whole process.

    Its price is in docs/guarantees.md; `python benchmarks/bench_decode.py` measures it.

    Raises, in the calls inside: ValueError, which names the recipe, for "tensorwise" without a
    static scale and "delayed", whose scales depend on all rows; NotImplementedError on a GPU of
    another compute capability than 9.0.

    Example:
        >>> layer = fp8.Linear(64, 48, recipe="rowwise")
        >>> x = torch.randn(65, 64)
        >>> with torch.no_grad(), fp8.batch_invariant():
        ...     torch.equal(layer(x)[:1], layer(x[:1]))
        True
    """
    native = loader.native()
    native.batch_invariant_open()
    try:
        yield
    finally:
        native.batch_invariant_close()
