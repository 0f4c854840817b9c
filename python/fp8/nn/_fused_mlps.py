"""The forward of an MLP that `fp8.convert` recognized: one node where nothing is in the way, else
that of the module's own class.

What was recognized holds as long as nothing changes of what the module is made of: its activation
and its attributes, its children, the code. Every call looks at that, in microseconds, and asks anew
if it did. A copy, deep or unpickled, refers to other objects, and is asked in its first call.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..integrations.transformers._probe import State
from ._fused_classes import made_from, subclass
from ._mlp import differ, fused, more_than_plain
from ._mlp_probe import MLPSpec, linears_of, probe, state_of

NOTES = "fp8_mlp"
"""The attribute of a fused module that holds its Notes."""

_MARK = "_fp8_mlp_from"
_classes: dict[tuple[type[nn.Module], Any], type[nn.Module]] = {}


class Notes:
    """What is known of one fused module."""

    spec: MLPSpec | None
    """What was found last, of the module or of the one that it is a copy of."""

    save: str
    """As `fp8.ops.mlp` takes it."""

    def __init__(self, spec: MLPSpec | None = None, save: str = "bf16") -> None:
        self.spec = spec
        self.save = save
        # For one mode of training and the other; one tuple: threads replace all of it.
        self._found: tuple[tuple[weakref.ref[nn.Module], State, MLPSpec | None], ...] = ()
        self._owner: Callable[[], nn.Module | None] = _nobody

    def __reduce__(self) -> tuple[type["Notes"], tuple[MLPSpec | None, str]]:
        return Notes, (self.spec, self.save)

    def belong_to(self, module: nn.Module) -> None:
        """These are the notes of `module`."""
        self._owner = weakref.ref(module)

    def know(self, module: nn.Module, base: type[nn.Module], spec: MLPSpec) -> None:
        """`module`, whose own class is `base`, was found to be this."""
        self.spec, state = spec, state_of(module, base, own=(NOTES,))
        self._found = ((weakref.ref(module), state, None if state.hooked else spec),)
        self._owner = weakref.ref(module)

    def look(self, module: nn.Module) -> MLPSpec | None:
        """What `module`, which has these notes, computes now; None if it is no MLP any more."""
        for owner, state, spec in self._found:
            if owner() is module and state.same(module):
                return spec
        base = own_class(type(module))
        if base is None:
            return None
        state = state_of(module, base, own=(NOTES,))
        spec = None if state.hooked else probe(module, base)
        self._found = ((weakref.ref(module), state, spec), *self._found[:1])
        self.spec = spec or self.spec
        return spec

    def traced_look(self) -> tuple[Any, ...] | None:
        """For a compiler, which calls this while it traces, outside of the trace, and takes the
        answer for a constant: a plain tuple, which it can unpack."""
        module = self._owner()
        spec = None if module is None else self.look(module)
        return None if spec is None else (tuple(spec.form), *spec[1:])

    traced_look._dynamo_marked_constant = True  # type: ignore[attr-defined]
    # What torch.compiler.assume_constant_result sets, which would import the compiler.


Notes.__module__, Notes.__qualname__ = "fp8.nn", "_MLPNotes"  # what pickles name


def _nobody() -> None:
    return None


def own_class(kind: type) -> type[nn.Module] | None:
    """The class that a fused class, or one made of that, comes from; None for any other."""
    for parent in kind.__mro__:
        if (found := made_from(parent, _MARK)) is not None:
            return found
    return None


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward is fused."""
    key = (base, base.forward)
    if key not in _classes:
        _classes[key] = _make(base)
    return _classes[key]


def fused_mlp(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = fused_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


fused_mlp.__module__, fused_mlp.__qualname__ = "fp8.nn", "_fused_mlp"


def obstacle(module: nn.Module) -> str | None:
    """Why no call of a fused module is one node; None if those of the kind recognized are."""
    layers = linears_of(module)
    notes: Notes | None = vars(module).get(NOTES)
    if notes is None or notes.spec is None:
        return "nothing is known of it"
    for name in filter(None, (notes.spec.form.gate, notes.spec.form.up, notes.spec.form.down)):
        child = module._modules.get(name)
        why = "is missing" if child is None else more_than_plain(child)
        if why is not None and type(getattr(child, "weight", None)).__name__ != "DTensor":
            return f"{name} {why}"  # a sharded weight is whole when the module is called
    if layers is None or notes.look(module) is None:
        return "it does not compute what it did"
    if (what := differ([*layers.values()])) is not None:
        return f"its layers differ in {what}"
    fit = _fit(module._modules, *notes.spec.form[:4])
    return None if fit else "its weights have other shapes"


def _fit(children: Any, gate: str, up: str | None, down: str, merged: bool) -> bool:
    """Whether weights have the shapes of the layers that were recognized: others may be there now,
    which are broadcast, or would be taken for another form."""
    first, last = children[gate].weight.shape, children[down].weight.shape
    same = up is None or children[up].weight.shape == first
    return same and bool(first[0] == (2 if merged else 1) * last[1])


def _run(module: Any, x: Any) -> Tensor | None:
    """The call as one node, or None."""
    notes: Notes | None = vars(module).get(NOTES)
    if notes is None or type(x) is not Tensor or x.is_nested or not (x.is_cuda or x.is_cpu):
        return None
    layer = None if notes.spec is None else module._modules.get(notes.spec.form.gate)
    if layer is not None and "weight" not in layer._parameters:
        return None  # of a replica, say: not asked for each
    spec: Any = notes.traced_look() if is_compiling() else notes.look(module)
    if spec is None:
        return None
    form, dtypes, dims, autocast, attributes, activations = spec
    gate, up, down, merged, activation, gate_second, alpha, limit = form
    if x.dtype not in dtypes or x.dim() not in dims:
        return None
    children = module._modules
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # A power, on a GPU, is computed in float32 then, and the product with b too.
        powers = activation == "relu_squared" and (merged or up is not None)
        if not autocast or powers or torch.get_autocast_dtype(device) not in dtypes:
            return None
    elif x.dtype is not getattr(children[gate].weight, "dtype", None):
        return None
    if not _fit(children, gate, up, down, merged):
        return None
    if is_compiling() and not _holds_in_trace(module, x, attributes, activations):
        return None
    return fused(
        x,
        children[gate],
        None if up is None else children[up],
        children[down],
        activation,
        notes.save,
        gate_second=gate_second,
        alpha=alpha,
        limit=limit,
    )


def _holds_in_trace(
    module: Any, x: Tensor, attributes: tuple[tuple[str, Any], ...], activations: Any
) -> bool:
    """Makes a compiler's trace, which takes what was found for a constant, depend on what it was
    found from: reads the attributes, and runs the activations on no numbers."""
    if activations is None:
        return False
    for name, value in attributes:
        if getattr(module, name, _MARK) != value:
            return False
    for name in activations:
        getattr(module, name)(x.new_empty((0, 2)))
    return True


def _make(base: type[nn.Module]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and base.forward is own:
            y = _run(self, args[0])
            if y is not None:
                return y
        return base.forward(self, *args, **kwargs)

    def setstate(self: Any, state: Any) -> None:
        base.__setstate__(self, state)  # type: ignore[no-untyped-call]
        notes: Notes | None = vars(self).get(NOTES)
        if notes is not None:  # a shallow copy has the other one's
            vars(self)[NOTES] = own_notes = Notes(notes.spec, notes.save)
            own_notes.belong_to(self)

    return subclass(base, _MARK, forward, fused_mlp, __setstate__=setstate)
