"""Parameters that notice when somebody reads `.data`.

What is written through `p.data` moves no version counter: `p.data += delta`,
`p.data.copy_(average)`. So inside `fp8.cached_weights` the class of a weight is a subclass of
nn.Parameter that has the codes made of it forgotten whenever `.data` is read.
"""

import threading
from collections.abc import Iterable, Iterator
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

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """An nn.Parameter: who makes another one of this type means that (accelerate)."""
        return nn.Parameter(data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy: Any = nn.Parameter.__deepcopy__
        return copy(self, memo)  # of type(self)(...): a plain one

    def __reduce_ex__(self, proto: Any) -> Any:
        return nn.Parameter.__reduce_ex__(self, proto)  # type: ignore[no-untyped-call]


_lock = threading.Lock()
_watchers: dict[int, tuple[nn.Parameter, int]] = {}  # by id: the parameter, contexts that watch it


@contextmanager
def watched(weights: Iterable[Tensor]) -> Iterator[None]:
    """The plain nn.Parameters among `weights` are WatchedParameters while it, or another context
    that began meanwhile, is open."""
    mine: list[Any] = []
    with _lock:
        for weight in weights:
            if type(weight) in (nn.Parameter, WatchedParameter):
                weight.__class__ = WatchedParameter
                _, count = _watchers.get(id(weight), (weight, 0))
                _watchers[id(weight)] = (weight, count + 1)  # type: ignore[assignment]
                mine.append(weight)
    try:
        yield
    finally:
        with _lock:
            for weight in mine:
                _, count = _watchers.pop(id(weight))
                if count > 1:
                    _watchers[id(weight)] = (weight, count - 1)
                elif type(weight) is WatchedParameter:
                    weight.__class__ = nn.Parameter  # type: ignore[assignment]
