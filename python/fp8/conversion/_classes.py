"""A module's class, changed to a fused one and back: what the fusions share."""

from collections.abc import Callable

from torch import nn

from ..nn._calls import has_own_forward
from ..nn._fused_classes import base_of


def refused(module: nn.Module, make: Callable[[], object]) -> str | None:
    """Why a module that is not fused must be left as it is. make: makes the class it would get."""
    if has_own_forward(module):
        return "its forward was replaced on the instance; convert before that"
    try:
        make()
    except Exception as error:  # of what the class does when a subclass is made
        return f"its class takes no subclass: {error}"
    return None


def replaced(module: nn.Module) -> str | None:
    """That a forward of its own was put on a module that was changed; None if none was."""
    return "its forward was replaced on the instance" if has_own_forward(module) else None


def change(module: nn.Module, kind: type[nn.Module]) -> None:
    if not has_own_forward(module):
        vars(module).pop("forward", None)  # that of the class it was: see has_own_forward
    module.__class__ = kind


def give_back(module: nn.Module, base: type[nn.Module] | None, *attributes: str) -> str | None:
    """The class `base`, without these attributes; why not, where there is no such class."""
    if base is None:
        return f"its class is {type(module).__name__}, made of a fused one"
    for name in attributes:
        vars(module).pop(name, None)
    change(module, base)
    return None


def innermost(
    kind: type[nn.Module], original: Callable[[type], type[nn.Module] | None]
) -> type[nn.Module]:
    """The class below what is fused of `kind`, or of the class that it is made of. original: of one
    fusion, the class that it made another of."""
    for each in kind.__mro__:
        if (base := original(each)) is not None:
            return base
    while (base := base_of(kind)) is not None:
        kind = base
    return kind
