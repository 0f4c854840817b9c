"""What a function of tensors computes, learned by asking it; and when to ask again.

`values_of` runs a function, a module's activation say, on a few numbers, so that the caller can
compare its values with those of functions that it knows. `State` remembers what the function was
made of at that time, in a form that is compared in microseconds: numbers, functions, modules and
their attributes, by identity. Nothing here depends on the caller's default dtype or device, on its
grad or inference mode, or on modes such as FakeTensorMode.
"""

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_MAX_ITEMS = 64
"""A container with more items is compared by identity alone: a vocabulary, say, in a config."""

_MAX_DEPTH = 5
_INTERNAL = tuple(vars(nn.Module()))
"""What nn.Module.__init__ puts first into every module."""

_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _torch_modules._global_forward_hooks,
    _torch_modules._global_forward_pre_hooks,
    _torch_modules._global_backward_hooks,
    _torch_modules._global_backward_pre_hooks,
)
_HOOKS = tuple(name for name in _INTERNAL if name.endswith(("_hooks", "_pre_hooks")))
_MISSING = object()


@contextmanager
def undisturbed() -> Iterator[None]:
    """In here a tensor without a device is made on the CPU and is a normal one, without gradients.
    Dtypes are for the caller to name: the default is of the process, other threads' too."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        yield


def values_of(function: Callable[..., Any], *inputs: Tensor) -> Tensor | None:
    """The tensor that function(*inputs) returns, if it is a function of the inputs and of constants
    alone; to be called within `undisturbed`, with inputs that were made there.

    None if it raises, returns something else, draws random numbers (the generator is put back), or
    touches any tensor that is neither an input nor made of the inputs: a parameter or a buffer,
    frozen or not, or one that its closure holds. Of such a function values say nothing.
    """
    generator = torch.get_rng_state()
    try:
        with _Origins(inputs) as origins:
            values = function(*(x.clone() for x in inputs))
    except Exception:
        return None  # it wants something else than numbers
    finally:
        drew = not torch.equal(generator, torch.get_rng_state())
        if drew:
            torch.set_rng_state(generator)
    if drew or origins.foreign or not isinstance(values, Tensor) or not origins.knows(values):
        return None
    return values


class _Origins(TorchFunctionMode):
    """Notes whether a tensor is used that does not come from the inputs."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.foreign = False
        self._known = {id(x): x for x in inputs}  # held: an identity is not given twice

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in _leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.foreign |= not self.knows(value)
            elif isinstance(value, torch.Generator) or hasattr(value, "__array__"):
                self.foreign = True  # a generator or an array of its own
        result = func(*args, **kwargs)
        self._known |= {id(x): x for x in _leaves(result) if isinstance(x, Tensor)}
        return result


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


class _AnyTensor:
    """Stands for a tensor among remembered values: a tensor is not kept alive, and a function that
    `values_of` answers for reads none."""


class State:
    """What a module is made of, as `same` compares it later.

    Of a module: its class and its attributes, with those of its children and their hooks; of other
    objects: attributes, items, what a function closes over and the globals that it names. Objects
    are compared by identity, numbers and strings by value, tensors not at all. What C code, and
    code below `torch`, reads besides is taken not to change.

    The module itself is not referred to, so it may refer to the State without a cycle.
    """

    def __init__(
        self,
        root: nn.Module,
        method: str | Callable[..., Any],
        own: tuple[str, ...] = (),
        apart: Iterable[nn.Module] = (),
    ) -> None:
        """method: what was asked, or its name. own: attributes of `root` that are the caller's and
        do not count; one may hold this State. apart: modules that are not looked into; only which
        ones they are counts."""
        # A mapping (None: the root's attributes), its keys and values from an index on, the index.
        self._mappings: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], int]] = []
        self._lists: list[tuple[Any, tuple[Any, ...]]] = []
        self._names: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._kinds: list[tuple[Any, type]] = []
        self._hooks: list[Any] = [*_GLOBAL_HOOKS]
        self._empty: list[Any] = []  # of the modules' dicts of children and tensors
        self._root_kind = type(root)
        self._root_training = root.training
        self._own = own
        self._seen: dict[int, Any] = {id(module): module for module in apart}
        self._root: nn.Module | None = root
        self._visit(root, 0)
        self._visit(getattr(root, method, None) if isinstance(method, str) else method, 0)
        self._root, self._seen = None, {}
        self.hooked = any(self._hooks)

    def same(self, root: nn.Module) -> bool:
        """Whether nothing has changed. A few microseconds; no work on tensors."""
        if type(root) is not self._root_kind or root.training is not self._root_training:
            return False
        if any(self._hooks) is not self.hooked or any(self._empty):
            return False
        for mapping, keys, values, start in self._mappings:
            now: Any
            names: Any
            if mapping is None:
                have = vars(root)
                names = [name for name in [*have][start:] if name not in self._own]
                now = [have[name] for name in names]
            else:
                names, now = [*mapping], mapping.values()
                if start:
                    names, now = names[start:], [*now][start:]
            if tuple(names) != keys:
                return False
            if not all(map(is_, now, values)) and not all(map(_alike, now, values)):
                return False
        return (
            all(type(owner) is kind for owner, kind in self._kinds)
            and all(_alike(have.get(name, _MISSING), value) for have, name, value in self._names)
            and all(_alike(_content(cell), value) for cell, value in self._cells)
            and all(
                len(items) == len(values) and all(map(_alike, items, values))
                for items, values in self._lists
            )
        )

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _MAX_DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._visit_module(value, depth)
        elif isinstance(value, Tensor | torch.Generator | type | types.ModuleType):
            return
        elif isinstance(value, types.FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__, depth)
            self._visit(value.__self__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(part, depth + 1)
        elif isinstance(value, dict):
            self._note(value, depth)
        elif isinstance(value, list | tuple):
            if len(value) <= _MAX_ITEMS:
                self._lists.append((value, tuple(map(_stored, value))))
                for item in value:
                    self._visit(item, depth + 1)
        elif hasattr(value, "__dict__"):
            self._kinds.append((value, type(value)))
            if callable(value):
                self._visit_class(type(value))
            self._note(vars(value), depth, whole=True)

    def _visit_module(self, module: nn.Module, depth: int) -> None:
        have = vars(module)
        # Of what every module has, only `training`, tensors, children and hooks reach a forward.
        start = len(_INTERNAL) if tuple(have)[: len(_INTERNAL)] == _INTERNAL else 0
        self._note(have, depth, start=start, whole=True)
        for inner in (have["_parameters"], have["_buffers"], have["_modules"]):
            if inner:
                self._note(inner, depth)
            else:
                self._empty.append(inner)
        if module is not self._root:
            self._visit(type(module).forward, depth)
            self._kinds.append((module, type(module)))
            self._names.append((have, "training", have.get("training")))
            self._hooks += [have[name] for name in _HOOKS if name in have]
        self._visit_class(type(module))

    def _visit_class(self, kind: type) -> None:
        """Methods and constants of the class and its bases."""
        if id(kind) in self._seen:
            return
        self._seen[id(kind)] = kind
        for base in kind.__mro__:
            if base not in (nn.Module, object):
                self._note(vars(base), _MAX_DEPTH, whole=True)

    def _visit_function(self, function: types.FunctionType, depth: int) -> None:
        if (function.__module__ or "").partition(".")[0] == "torch":
            return
        for cell in function.__closure__ or ():
            self._cells.append((cell, _stored(_content(cell))))
            self._visit(_content(cell), depth + 1)
        self._visit(function.__defaults__, depth + 1)
        self._visit(function.__kwdefaults__, depth + 1)
        names = _names(function.__code__)
        for name in names:
            value = function.__globals__.get(name, _MISSING)
            if value is _MISSING:
                continue
            self._names.append((function.__globals__, name, _stored(value)))
            if isinstance(value, types.ModuleType | type):
                self._note_names(vars(value), names)
            else:
                self._visit(value, depth + 1)

    def _note_names(self, have: Mapping[str, Any], names: set[str], levels: int = 3) -> None:
        """What code with these names may read of a module or class: settings.mode, nn.f.silu."""
        for name in names & have.keys():
            self._names.append((have, name, _stored(have[name])))
            if isinstance(have[name], types.ModuleType) and levels > 1:
                self._note_names(vars(have[name]), names, levels - 1)

    def _note(self, have: Any, depth: int, *, start: int = 0, whole: bool = False) -> None:
        if len(have) > _MAX_ITEMS and not whole:
            return
        is_root = self._root is not None and have is vars(self._root)
        items = [*have.items()][start:]
        if is_root:
            items = [item for item in items if item[0] not in self._own]
        keys = tuple(key for key, _ in items)
        values = tuple(_stored(value) for _, value in items)
        self._mappings.append((None if is_root else have, keys, values, start))
        if depth < _MAX_DEPTH:
            for _, value in items:
                self._visit(value, depth + 1)


def _stored(value: Any) -> Any:
    return _AnyTensor if isinstance(value, Tensor) else value


def _alike(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if before is _AnyTensor:
        return isinstance(now, Tensor)
    return type(now) is type(before) and isinstance(now, _PLAIN) and bool(now == before)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)
