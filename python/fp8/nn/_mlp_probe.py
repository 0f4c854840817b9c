"""What a module computes, if it is the MLP of a transformer: found by calling its class's forward
with stand-ins for its linear layers, which note what they are given and answer with known numbers.

It is one if what comes out *is* the last layer's answer, the first ones were given x itself, and
the last one was given act(a) · b, act(a), or that of the halves of a, bit for bit as PyTorch's own
functions have it, and its gradients; in both modes of training, with and without gradients. Names
play no part; dropout, multipliers and norms in between show by themselves.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..integrations.transformers._gating import number_of
from ..integrations.transformers._probe import State, undisturbed, values_of
from ._linear import Linear
from ._mlp_forms import Form, expected, forms, numbers, same

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIMS = (3, 2, 4, 1)  # of x, the usual ones first
_SIMPLE = (bool, int, float, str, torch.dtype, type(None))
_LEAST = 2048  # numbers in an answer, so that all signs and sizes meet


class MLPSpec(NamedTuple):
    """What an MLP was found to compute, and for what."""

    form: Form
    dtypes: tuple[torch.dtype, ...]  # of x and the linears' answers
    dims: tuple[int, ...]  # of x
    autocast: bool  # the same where it is on
    attributes: tuple[tuple[str, Any], ...]  # that are plain values
    activations: tuple[str, ...] | None  # attributes that were called; None: not known


MLPSpec.__module__, MLPSpec.__qualname__ = "fp8.nn", "_MLPSpec"  # what pickles name


def linears_of(module: nn.Module) -> dict[str, nn.Linear] | None:
    """The two or three linear children of a module that may be an MLP, by what it has: no other
    child, nor itself, holds a tensor."""
    linears: dict[str, nn.Linear] = {}
    for name, child in module._modules.items():
        if type(child) is nn.Linear or type(child) is Linear:
            linears[name] = child
        elif child is not None and any(_tensors(inner) for inner in child.modules()):
            return None
    few = 2 <= len(linears) <= 3 and len(set(linears.values())) == len(linears)
    return linears if few and not _tensors(module) else None


def _tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def state_of(module: nn.Module, base: type[nn.Module], own: tuple[str, ...] = ()) -> State:
    """What a module whose own class is `base` is made of: not its linears, nor what no class's code
    reads under its name (fully_shard keeps its books in such attributes)."""
    own = (*own, *(name for name in vars(module) if name.startswith("__")))
    return State(module, base.forward, own, (linears_of(module) or {}).values())


def probe(module: nn.Module, base: type[nn.Module]) -> MLPSpec | None:
    """The MLP that `module` is by the forward of `base`, or None."""
    linears = linears_of(module)
    if linears is None or not inspect.isfunction(base.forward):
        return None
    try:
        # Hooks of the caller's (a checkpointed region's) must not see what is saved here.
        with undisturbed(), saved_tensors_hooks(lambda t: t, lambda t: t):
            return _Question(module, base, linears).found()
    except Exception:  # whatever it does with numbers, it is no MLP
        return None


class _NoMLP(Exception):
    """What a layer was given, or what came out, is not as in an MLP."""


class _Question:
    """A copy of a module with stand-ins, and what it does with them."""

    def __init__(
        self, module: nn.Module, base: type[nn.Module], linears: dict[str, nn.Linear]
    ) -> None:
        self.base: Any = base
        self.calls: list[tuple[str, Tensor]] = []  # name of the layer, and what it was given
        self.autocast: list[bool] = []  # whether it was on in these calls
        self.answers: dict[str, Tensor] = {}
        self.numbers: dict[int, list[Tensor]] = {}
        self.layers = {name: self._stand_in(name, linear) for name, linear in linears.items()}
        self.clone = self._clone(module)
        self.attributes = tuple(
            (name, value)
            for name, value in vars(module).items()
            if name[0] != "_" and name != "training" and isinstance(value, _SIMPLE)
        )

    def _stand_in(self, name: str, linear: nn.Linear) -> nn.Linear:
        layer = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features

        def forward(input: Tensor) -> Tensor:
            self.calls.append((name, input))
            self.autocast += [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
            return self.answers[name]

        vars(layer)["forward"] = forward
        layer.bias = None if linear.bias is None else nn.Parameter(torch.zeros(1))
        return layer

    def _clone(self, module: nn.Module) -> nn.Module:
        """It shares nothing that a forward usually writes: no child, and no container."""
        clone: nn.Module = self.base.__new__(self.base)
        for name, value in vars(module).items():
            if name.startswith("__"):  # as state_of
                continue
            usual = isinstance(value, list | dict | set)
            vars(clone)[name] = value.copy() if usual else value
        children = vars(clone)["_modules"]
        for name, child in children.items():
            children[name] = self.layers[name] if name in self.layers else copy.deepcopy(child)
        return clone

    def ask(self, x: Tensor, *answers: Tensor) -> Tensor:
        """What the last layer was given, if the rest is as in an MLP."""
        self.calls.clear()
        self.autocast.clear()
        self.answers = dict(zip(self.layers, answers, strict=True))
        for layer in self.layers.values():  # of one number: shapes may be looked at, and dtypes
            number = x.new_full((1, 1), 3.0)
            weight = number.expand(layer.out_features, layer.in_features)
            vars(layer)["_parameters"] |= {"weight": weight}
            if layer._parameters.get("bias") is not None:
                vars(layer)["_parameters"] |= {"bias": weight[:, 0]}
        before = x._version
        y = self.base.forward(self.clone, x)
        if sorted(name for name, _ in self.calls) != sorted(self.layers):
            raise _NoMLP
        *first, (last, given) = self.calls
        if y is not self.answers[last] or any(given is not x for _, given in first):
            raise _NoMLP
        if x._version != before or y._version != 0:  # written in place
            raise _NoMLP
        return given

    def found(self) -> MLPSpec | None:
        """What the copy computes."""
        self._train(False)
        state = State(self.clone, self.base.forward, apart=self.layers.values())
        if state.hooked:
            return None
        start = next(((d, t) for t in _DTYPES for d in _DIMS if self._order(d, t)), None)
        if start is None:
            return None
        form = next((form for form in self._forms() if self._is(form, *start, False, False)), None)
        if form is None:
            return None
        modes = [(training, graded) for training in (True, False) for graded in (True, False)]
        dtypes = tuple(t for t in _DTYPES if all(self._is(form, start[0], t, *m) for m in modes))
        if not dtypes:
            return None
        dims = tuple(d for d in _DIMS if self._is(form, d, dtypes[0], True, True))
        autocast = torch.bfloat16 in dtypes and self._is_in_autocast(form, start[0])
        self._train(False)
        if not state.same(self.clone):  # it remembers something of a call
            return None
        return MLPSpec(form, dtypes, dims, autocast, self.attributes, self._called(*start))

    def _order(self, dims: int, dtype: torch.dtype) -> list[str]:
        """Names in the order of calls; none if it is no MLP."""
        self._train(False)
        made = values_of(self.ask, *self._inputs(dims, dtype))
        return [] if made is None else [name for name, _ in self.calls]

    def _forms(self) -> Iterator[Form]:
        layers = [self.layers[name] for name, _ in self.calls]
        sizes = [(layer.in_features, layer.out_features) for layer in layers]
        alpha = number_of(self.clone, ("alpha", "swiglu_alpha"), 1.702)
        limit = number_of(self.clone, ("limit", "swiglu_limit"), 7.0)
        return forms([name for name, _ in self.calls], sizes, alpha, limit)

    def _inputs(self, dims: int, dtype: torch.dtype) -> list[Tensor]:
        """x, and an answer for each layer."""
        if dims not in self.numbers:
            self.numbers[dims] = self._make_inputs(dims)
        return [t.to(dtype, copy=True) for t in self.numbers[dims]]

    def _make_inputs(self, dims: int) -> list[Tensor]:
        generator = torch.Generator("cpu").manual_seed(1234)
        values = numbers()
        layers = self.layers.values()
        sizes = [n for layer in layers for n in (layer.in_features, layer.out_features)]
        rows = max(2, min(_LEAST // max(min(sizes), 1) + 1, 2**18 // max(*sizes, 1)))
        shape = {1: (), 2: (rows,), 3: (1, rows), 4: (1, 1, rows)}[dims]
        first = next(iter(self.layers.values()))
        kind: Any = {"generator": generator, "dtype": torch.float32}
        inputs = [torch.randn(*shape, first.in_features, **kind)]
        for layer in self.layers.values():
            size = (*shape, layer.out_features)
            index = torch.randint(len(values), size, generator=generator)
            inputs.append(values[index])
        return inputs

    def _is(self, form: Form, dims: int, dtype: torch.dtype, training: bool, graded: bool) -> bool:
        """Whether values, and gradients, have the bits of this form's."""
        return self._agrees(form, self._inputs(dims, dtype), training, graded)

    def _agrees(self, form: Form, inputs: list[Tensor], training: bool, graded: bool) -> bool:
        self._train(training)
        x, *answers = inputs
        with torch.set_grad_enabled(graded):
            answers = [answer.requires_grad_(graded) for answer in answers]
            made = values_of(self.ask, x, *answers)
            if made is None or self.calls[-1][0] != form.down:
                return False
            leaves = dict(zip(self.layers, answers, strict=True))
            wanted = expected(form, leaves[form.gate], None if form.up is None else leaves[form.up])
            if all(self.autocast):
                made = made.to(wanted.dtype)  # as the last layer does
            if not same(made, wanted) or made.requires_grad is not graded:
                return False
            if not graded:
                return True
            first = [leaves[name] for name in (form.gate, form.up) if name is not None]
            generator = torch.Generator("cpu").manual_seed(5)
            dh = torch.randn(made.shape, generator=generator, dtype=torch.float32).to(made.dtype)
            ours = torch.autograd.grad(made, first, dh, allow_unused=True)
            theirs = torch.autograd.grad(wanted, first, dh)
        return all(a is not None and same(a, b) for a, b in zip(ours, theirs, strict=True))

    def _is_in_autocast(self, form: Form, dims: int) -> bool:
        """Whether it is so, too, where autocast casts x, and it stays on for every layer."""
        on_cuda = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                x, *answers = self._inputs(dims, torch.bfloat16)
                agrees = self._agrees(form, [x.float(), *answers], True, True)
                return agrees and all(self.autocast)
        finally:
            torch.set_autocast_enabled("cuda", on_cuda)

    def _train(self, mode: bool) -> None:
        for module in self.clone.modules():
            vars(module)["training"] = mode

    def _called(self, dims: int, dtype: torch.dtype) -> tuple[str, ...] | None:
        """Attributes of the module that it calls with a tensor alone. The copy is spent then."""
        called: dict[str, None] = {}

        def noting(name: str, function: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                    called[name] = None
                return function(*args, **kwargs)

            return forward

        for name, child in self.clone._modules.items():
            if child is not None and name not in self.layers:
                vars(child)["forward"] = noting(name, child.forward)
        for name, value in vars(self.clone).items():
            if name[0] != "_" and callable(value) and name != "forward":
                vars(self.clone)[name] = noting(name, value)
        return tuple(called) if self._order(dims, dtype) else None
