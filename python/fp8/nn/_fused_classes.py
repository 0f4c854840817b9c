"""The subclass that a module takes whose forward `fp8.convert` fuses.

It keeps the names of the class that it is made of, so that code which looks at them finds what it
knows. Pickles and copies name that class, and a function that makes the subclass of it again. Where
several things of a module are fused, each is a subclass of the one before.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


def made_from(kind: type, mark: str) -> type[nn.Module] | None:
    """The class that `subclass` made `kind` of, with this mark; None for any other."""
    found: type[nn.Module] | None = vars(kind).get(mark)
    return found


def made_class(
    kind: type, original: Callable[[type], type[nn.Module] | None]
) -> type[nn.Module] | None:
    """What one fusion made among `kind` and the classes that it is made of; None if there is none.
    original: of the fusion, the class that it made another of."""
    return next((each for each in kind.__mro__ if original(each) is not None), None)


class FusedClasses:
    """Those of one kind: one for each class and the forward that it had. make: makes one, with this
    mark."""

    def __init__(self, mark: str, make: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
        self._mark, self._make = mark, make
        self._known: dict[tuple[type[nn.Module], Any], type[nn.Module]] = {}

    def original(self, kind: type) -> type[nn.Module] | None:
        """The class that a fused class was made from; None for any other."""
        return made_from(kind, self._mark)

    def own_class(self, kind: type) -> type[nn.Module] | None:
        """The class that a fused class, or one made of that, comes from; None for any other."""
        return next(filter(None, map(self.original, kind.__mro__)), None)

    def fused_class(self, base: type[nn.Module]) -> type[nn.Module]:
        """The subclass of `base` whose forward is fused."""
        key = (base, base.forward)
        if key not in self._known:
            self._known[key] = self._make(base)
        return self._known[key]

    def begin(self, base: type[nn.Module], *args: Any) -> nn.Module:
        """A fused module without attributes: what pickles and copies begin with."""
        kind: Any = self.fused_class(base)
        module: nn.Module = kind.__new__(kind, *args)
        return module


def base_of(kind: type) -> type[nn.Module] | None:
    """The class that `subclass` made `kind` of, with any mark; None for any other."""
    found: type[nn.Module] | None = vars(kind).get("_fp8_base")
    return found


def remade(kind: type, base: type[nn.Module]) -> type[nn.Module]:
    """What `kind` is, which `subclass` made, but of another class."""
    made: nn.Module = vars(kind)["_fp8_begin"].__func__(base)
    return type(made)


def put_below(
    kind: type[nn.Module], mark: str, make: Callable[[type[nn.Module]], type[nn.Module]]
) -> type[nn.Module]:
    """`kind` with a class that `make` makes below all that is fused of it, whose forwards call that
    of the class that they are made of; anew where there is one with this mark."""
    base = base_of(kind)
    if base is None:
        return make(kind)
    if made_from(kind, mark) is not None:
        return make(base)
    return remade(kind, put_below(base, mark, make))


def taken_out(kind: type[nn.Module], mark: str) -> type[nn.Module] | None:
    """The same backwards; None if no class with this mark is below what is fused."""
    base = base_of(kind)
    if base is None or made_from(kind, mark) is not None:
        return base
    below = taken_out(base, mark)
    return None if below is None else remade(kind, below)


def stacked(base: type[nn.Module], begins: tuple[Callable[..., nn.Module], ...], *args: Any) -> Any:
    """A module of several fused classes, each of the one before, without attributes: what pickles
    and copies of such begin with."""
    kind: Any = base
    for begin in begins:
        kind = type(begin(kind))
    return kind.__new__(kind, *args)


stacked.__module__, stacked.__qualname__ = "fp8.nn", "_stacked"


def subclass(
    base: type[nn.Module],
    mark: str,
    forward: Callable[..., Any],
    begin: Callable[..., nn.Module],
    **methods: Any,
) -> type[nn.Module]:
    """A new subclass of `base` with this forward and these further methods.

    mark: the attribute that has `base`. begin: begin(base, *args) is a module of the subclass
    without attributes, what pickles and copies begin with; a public name.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = super(kind, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and len(reduced) > 1:
            if reduced[1][:1] == (kind,):
                begins, own = [begin], base
                while (below := base_of(own)) is not None:
                    begins.insert(0, vars(own)["_fp8_begin"].__func__)
                    own = below
                if len(begins) > 1:
                    return (stacked, (own, (*begins,), *reduced[1][1:]), *reduced[2:])
                return (begin, (base, *reduced[1][1:]), *reduced[2:])
            if reduced[0] is kind:  # by a __reduce__ of the class: one that is not fused
                return (base, *reduced[1:])
        return reduced

    forward.__doc__ = base.forward.__doc__
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # whose signature it has
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__doc__": base.__doc__,
        mark: base,
        "_fp8_base": base,
        "_fp8_begin": staticmethod(begin),
    }
    body |= names | methods
    metaclass: Any = type(base)
    if hasattr(base.__init_subclass__, "__func__"):  # may keep a register, by name say: not of this
        kind = metaclass(base.__name__, (nn.Module,), body)
        kind.__bases__ = (base,)
    else:
        kind = metaclass(base.__name__, (base,), body)
    result: type[nn.Module] = kind
    return result
