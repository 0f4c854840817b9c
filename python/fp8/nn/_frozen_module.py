"""What modules with codes for parameters share: how they move, are copied, pickled and loaded.

Codes and scales are not numbers of the model's dtype: `.to(dtype)` and its like leave their values
alone and change `compute_dtype`, what the other parameters are in.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import _frozen_state


class FrozenModule(nn.Module):
    """A base beside nn.Module or one of its subclasses, and before it."""

    code_names: ClassVar[tuple[str, ...]]  # of the parameters that are codes, all on one device
    compute_dtype: torch.dtype

    def _kept(self) -> list[str]:
        """The names of codes and scales."""
        raise NotImplementedError

    def _misfit(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Brings what `state_dict` has for this module to its dtypes and shapes; or why not."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to, .cuda, .half, ... do. Codes and scales go where `fn` sends integers."""
        own = {id(p) for name in self._kept() if (p := self._parameters.get(name)) is not None}
        device = getattr(self, self.code_names[0]).device
        probe = torch.empty(0, dtype=self.compute_dtype, device=device)

        def apply(tensor: Tensor) -> Tensor:
            return _frozen_state.moved(fn, tensor) if id(tensor) in own else fn(tensor)

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(probe).dtype
        return self

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: the codes as bytes, since pickle has no float8 (torch.save does)."""
        return vars(self) | {
            "_parameters": _frozen_state.as_bytes(self._parameters, self.code_names)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self)["_parameters"] = _frozen_state.from_bytes(self._parameters, self.code_names)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Nothing is loaded but codes with their scales; see _frozen_state."""
        problem = self._misfit(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
