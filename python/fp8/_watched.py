"""Parameters that notice when somebody reads `.data`.

What is written through `p.data` moves no version counter: `p.data += delta`,
`p.data.copy_(average)`. So inside `fp8.cached_weights` the class of a weight is a subclass of
nn.Parameter that has the codes made of it forgotten whenever `.data` is read.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_data: Any = Tensor.data  # the descriptor


class WatchedParameter(nn.Parameter):
    """An nn.Parameter, but for `.data`. Copies and pickles are nn.Parameters."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """What nn.Parameter has there; it may be written, and no version counter says so."""
        torch.ops.fp8._forget_weights([self])
        plain: Tensor = _data.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.ops.fp8._forget_weights([self])
        _data.__set__(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._as_parameter(nn.Parameter.__deepcopy__, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        return self._as_parameter(nn.Parameter.__reduce_ex__, proto)

    def _as_parameter(self, method: Callable[..., Any], *args: Any) -> Any:
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        try:
            return method(self, *args)
        finally:
            self.__class__ = WatchedParameter


@contextmanager
def watched(weights: Iterable[Tensor]) -> Iterator[None]:
    """The plain nn.Parameters among `weights` are WatchedParameters while it is open."""
    changed = []
    try:
        for weight in weights:
            if type(weight) is nn.Parameter:
                weight.__class__ = WatchedParameter
                changed.append(weight)
        yield
    finally:
        for weight in changed:
            if type(weight) is WatchedParameter:
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
