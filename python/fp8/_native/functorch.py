"""Batching rules: what torch.vmap makes of the operators.

A rule calls the operator once per example and stacks the results, which are those of a loop
therefore, bit for bit: with one scale per tensor each example has its own, and a product of more
rows may add in another order. So is a history that they share: the calls move it on in turn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_functorch: Any = torch._C._functorch
_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def batching_rule(op: Any) -> Callable[..., Any]:
    """The kernel of `op`, an OpOverload, for batched tensors."""
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.is_write and not a.name.endswith("history")]
    returns = op._schema.returns
    is_list = len(returns) == 1 and str(returns[0].type) == "List[Tensor]"
    in_place = len(returns) == 1 and returns[0].alias_info is not None

    def batched(*args: Any, **kwargs: Any) -> Any:
        given = {i: args[i] if i < len(args) else kwargs.get(arguments[i].name) for i in written}
        writes = [i for i in written if given[i] is not None]
        interpreter: Any = pyfunctorch.retrieve_current_functorch_interpreter()
        level = interpreter.level()
        operands, spec = tree_flatten((args, kwargs))
        unwrapped = [
            _functorch._unwrap_batched(operand, level)
            if isinstance(operand, Tensor)
            else (operand, None)
            for operand in operands
        ]
        values, dims = zip(*unwrapped, strict=True)
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            if all(dim is None for dim in dims):  # batched at another level
                return _call(op, values, spec)
            for i in writes:
                if _functorch._unwrap_batched(given[i], level)[1] is None:
                    raise RuntimeError(
                        f"vmap: {op} writes {arguments[i].name}, which has no batch dimension, "
                        "and reads tensors that have one: expected it batched too"
                    )
            results = _loop(op, values, dims, spec, interpreter.batch_size())
        if in_place:
            return given[writes[0]]  # itself, as operators in place do
        wrapped = tuple(
            None if result is None else _functorch._add_batch_dim(result, 0, level)
            for result in results
        )
        if is_list:
            return list(wrapped)
        return wrapped if len(returns) > 1 else wrapped[0]

    return batched


def _loop(
    op: Any, values: Sequence[Any], dims: Sequence[int | None], spec: TreeSpec, size: int
) -> list[Tensor | None]:
    """The stacked results [size, ...] of a call for each example; None where the calls have it."""

    def example(i: int) -> list[Any]:
        return [
            value if dim is None else value.select(dim, i)
            for value, dim in zip(values, dims, strict=True)
        ]

    if size == 0:  # one call for the shapes, of zeros; what it writes is not the caller's
        shapes = [
            (value.clone() if isinstance(value, Tensor) else value)
            if dim is None
            else value.new_zeros(value.movedim(dim, 0).shape[1:])
            for value, dim in zip(values, dims, strict=True)
        ]
        return [
            r if r is None else r.new_empty((0, *r.shape))
            for r in _call(op, shapes, spec, as_tuple=True)
        ]
    calls = [_call(op, example(i), spec, as_tuple=True) for i in range(size)]
    return [None if r[0] is None else torch.stack(r) for r in zip(*calls, strict=True)]


def _call(op: Any, values: Sequence[Any], spec: TreeSpec, as_tuple: bool = False) -> Any:
    args, kwargs = tree_unflatten(values, spec)
    result = op(*args, **kwargs)
    return result if not as_tuple or isinstance(result, tuple | list) else (result,)
