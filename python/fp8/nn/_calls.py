"""Which forward a module has, the mark that those of fp8.Linear and fp8.GroupedLinear leave, and
who has none.

A layer without it, in a model where others have it, does not run in FP8 at all: something reads
its weight and does the product itself. The mark costs some ten nanoseconds a call. A compiler must
not see it (within checkpointed regions it refuses a forward that changes its module), so it calls
`_mark_traced` while it traces, and the compiled code does nothing.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

CALLED = "fp8_called"
"""The attribute: True, or "traced" by a compiler; absent before the first call."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _mark_traced(module: nn.Module) -> None:
    """For a forward that a compiler runs through; a method of the module's class, under this
    name, by which the compiler looks it up."""
    vars(module).setdefault(CALLED, "traced")


_mark_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
# What torch.compiler.assume_constant_result sets, which would import the compiler.


def forget_call(module: nn.Module) -> None:
    """Takes the mark back."""
    vars(module).pop(CALLED, None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `forward` was replaced on the instance. Not by itself, as accelerate leaves it there
    when it takes its hook off: the method of the class, bound to the module."""
    own = vars(module).get("forward")
    if own is None:
        return False
    of_class = getattr(own, "__func__", None) is type(module).forward
    return not (of_class and getattr(own, "__self__", None) is module)


def called_through(module: nn.Module) -> str | None:
    """What a call of `module` does beside its class's forward; None for nothing."""
    if has_own_forward(module):
        return "has a forward of its own"
    state = vars(module)
    if any(state[hooks] for hooks in _HOOKS):
        return "has hooks"
    if state.get("_compiled_call_impl") is not None:
        return "is compiled"
    return None


def never_called(model: nn.Module, calls: dict[nn.Module, Any]) -> Collection[nn.Module]:
    """Of the layers of `model` in FP8, each with its mark: those that were not called. None of them
    if no layer was and no parameter has a gradient: the model has not run yet, or elsewhere.

    Layers that share their place, the class of a parent and the name there, with a traced one are
    taken for called too, and so are layers that were compiled themselves: compiled code serves all
    modules of one form, and is traced in one.
    """
    missing = [module for module, mark in calls.items() if not mark]
    if len(missing) == len(calls) and all(p.grad is None for p in model.parameters()):
        return ()
    if "traced" in calls.values():
        places: dict[nn.Module, set[tuple[type, str]]] = {module: set() for module in calls}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child in places:
                    places[child].add((type(parent), "" if name.isdigit() else name))
        traced = {place for m, mark in calls.items() if mark == "traced" for place in places[m]}
        missing = [
            module
            for module in missing
            if not places[module] & traced and vars(module).get("_compiled_call_impl") is None
        ]
    return missing
