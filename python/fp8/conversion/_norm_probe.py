"""What a module computes, if it is a norm: found by calling its class's forward with known numbers.

A copy of the module gets random parameters, so that forms differ whatever its own weights are, and
norms rows of 0 to 1e2, among which every eps shows. It is a norm of a form if its bfloat16 (or
float16) output is that form's, written in plain torch, bit for bit, and if its gradients are that
form's, both in both modes of training. Names play no part. Other dtypes of its parameters, other
numbers of dimensions and sizes of rows are asked for one by one: what was not seen to be a norm is
none.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..integrations.transformers._probe import undisturbed
from ..nn._fused_norms import LAYER, NormSpec
from ._norm_forms import Candidate, candidates, expected
from ._norm_key import DTYPES, Key

_SCALES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
_LEADING = {1: (), 3: (3, 5), 4: (2, 3, 4), 5: (2, 1, 3, 2)}  # beside those of two dimensions
_MOST_WIDTHS = 3  # to try, where no parameter says


def probe(module: nn.Module, key: Key) -> NormSpec | None:
    """The norm that a module of this key is, or None."""
    # A module may draw, dropping what it was given; the caller may be making a model on meta.
    with torch.random.fork_rng(devices=[]), undisturbed(), _alone():
        try:
            return _probe(module, key)
        except Exception:  # whatever it does with numbers, it is no norm
            return None


class _Refused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In here a collective raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("a collective")
        return func(*args, **(kwargs or {}))


def _alone() -> AbstractContextManager[Any]:
    """A module may wait for other processes, which do not probe at this time."""
    together = dist.is_available() and dist.is_initialized()
    return _Refused() if together else nullcontext()  # type: ignore[no-untyped-call]


class _Trial(NamedTuple):
    """A copy of the module with parameters of known numbers."""

    copy: nn.Module
    kind: type[nn.Module]
    parameters: dict[str, Tensor]
    width: int

    def __call__(self, x: Tensor) -> Any:
        return self.kind.forward(self.copy, x)

    def agrees(self, candidate: Candidate, x: Tensor) -> bool:
        """Whether it computes the candidate of x, in both modes of training."""
        try:
            wanted = expected(x, candidate, self.parameters)
        except RuntimeError:  # not a mixture of dtypes that F.layer_norm takes
            return False
        for training in (True, False):
            vars(self.copy)["training"] = training
            given = x.clone()
            try:
                made = self(given)
            except Exception:  # whatever it does not take
                return False
            if type(made) is not Tensor or made.dtype is not wanted.dtype:
                return False
            if made.shape != wanted.shape or not torch.equal(given, x):  # written in place
                return False
            if x.dtype is torch.float32:  # fp32 formulas may be written in another order
                if not torch.allclose(made, wanted, rtol=1e-5, atol=1e-6, equal_nan=True):
                    return False
            elif not bool(((made == wanted) | (made.isnan() & wanted.isnan())).all()):
                return False
        return True

    def follows_autocast(self, x: Tensor) -> bool:
        """Whether it returns what F.layer_norm returns under autocast on a GPU."""
        with _LayerNormInFloat32():
            made: Tensor = self(x)
        return made.dtype is torch.float32


class _LayerNormInFloat32(TorchFunctionMode):
    """In here F.layer_norm casts as autocast on a GPU does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm or func is torch.layer_norm:
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
            kwargs = {k: x.float() if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


def _probe(module: nn.Module, key: Key) -> NormSpec | None:
    kind, shapes, names, attributes = key
    own = shapes[0][2] if shapes else None
    for width in [shapes[0][1]] if shapes else _widths(attributes):
        generator = torch.Generator().manual_seed(1234)
        wide = {name: _normal(generator, width) for name, *_ in shapes}

        def trial(dtype: torch.dtype | None, wide: Any = wide, width: int = width) -> _Trial:
            parameters = {name: p.to(dtype) for name, p in wide.items()}
            return _Trial(_copy(module, kind, parameters, names), kind, parameters, width)

        asked = trial(own)
        x = _normal(generator, len(_SCALES), width)
        x *= torch.tensor(_SCALES, dtype=torch.float32)[:, None]
        best, dtypes = _best(asked, x, attributes)
        if best is None:
            continue
        pairs = [(own, d) for d in dtypes]
        for other in [d for d in DTYPES if d is not own] if shapes else []:
            cast = trial(other)
            pairs += [(other, d) for d in DTYPES if cast.agrees(best, x.to(d))]

        def made(*shape: int, dtype: torch.dtype = dtypes[0], source: Any = generator) -> Tensor:
            return _normal(source, *shape).to(dtype)

        ranks = [r for r, lead in _LEADING.items() if asked.agrees(best, made(*lead, width))]
        any_width = not shapes and asked.agrees(best, made(7, width + 8))
        keeps = 3 in ranks and not asked(made(5, 3, width).transpose(0, 1)).is_contiguous()
        return NormSpec(
            *best,
            dtypes=tuple(pairs),
            width=None if any_width else width,
            ranks=(2, *ranks),
            under_autocast=best[0] != LAYER or asked.follows_autocast(made(3, width)),
            keeps_order=keeps,
            attributes=attributes,
        )
    return None


def _best(
    asked: _Trial, x: Tensor, attributes: tuple[tuple[str, Any], ...]
) -> tuple[Candidate | None, list[torch.dtype]]:
    """What it computes, and for inputs of which dtypes."""
    best: Candidate | None = None
    dtypes: list[torch.dtype] = []
    for candidate in candidates(asked.parameters, attributes):
        now = [d for d in DTYPES if asked.agrees(candidate, x.to(d))]
        if len(now) > len(dtypes):
            if _same_gradients(asked, candidate, now):
                best, dtypes = candidate, now
            if now != [torch.float32]:  # in which forms do not differ
                break
    return best, dtypes


def _same_gradients(asked: _Trial, candidate: Candidate, dtypes: list[torch.dtype]) -> bool:
    """In float32 if the module takes it; else in what it takes, whose steps they may be apart."""
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    step = 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-4
    generator = torch.Generator().manual_seed(5)
    # Rows of one magnitude: gradients of small rows are large.
    x = _normal(generator, 13, asked.width).to(dtype).requires_grad_()
    dy = _normal(generator, 13, asked.width)
    for training in (False, True):
        vars(asked.copy)["training"] = training
        own = {name: p.clone().requires_grad_() for name, p in asked.parameters.items()}
        with torch.enable_grad():
            wanted = expected(x, candidate, own)
            copy = _copy(asked.copy, asked.kind, own, tuple(asked.copy._parameters))
            made = asked.kind.forward(copy, x)
        leaves = [x, *(p for p in copy._parameters.values() if p is not None)]
        ours = torch.autograd.grad(made, leaves, dy.to(made.dtype), allow_unused=True)
        theirs = torch.autograd.grad(wanted, [x, *own.values()], dy.to(made.dtype))
        for a, b in zip(ours, theirs, strict=True):
            if a is None or a.dtype is not b.dtype:
                return False
            near = step * float(b.abs().max())
            if not torch.allclose(a.float(), b.float(), rtol=step, atol=near):
                return False
    return True


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _copy(
    module: nn.Module, kind: Any, parameters: dict[str, Tensor], names: tuple[str, ...]
) -> nn.Module:
    """One with these parameters on the CPU; it shares nothing that a forward may write."""
    copy: nn.Module = object.__new__(kind)  # what a __new__ makes may be of another class
    vars(copy).update(vars(module))
    vars(copy)["_parameters"] = {
        name: nn.Parameter(parameters[name]) if name in parameters else None for name in names
    }
    vars(copy)["_buffers"] = dict(module._buffers)
    return copy


def _widths(attributes: tuple[tuple[str, Any], ...]) -> list[int]:
    """Sizes of rows that a module without parameters may be made for."""
    found: dict[int, None] = {}
    for _, value in attributes:
        for size in value if isinstance(value, tuple) else (value,):
            if isinstance(size, int) and not isinstance(size, bool) and 1 < size <= 65536:
                found[size] = None
    return [*list(found)[: _MOST_WIDTHS - 1], 64]
