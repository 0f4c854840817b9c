"""What a function of q, k, cos and sin computes: asked with known numbers, on the CPU.

It rotates if its results, its gradients and the order of its results' dimensions in memory are the
operator's, bit for bit. That tells which columns it takes for pairs, where it rounds for which
dtypes, what its cos looks like, and whether it leaves columns alone. Names play no part. What was
not seen is not taken for known.
"""

import inspect
from contextlib import suppress
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrations.transformers._probe import undisturbed
from ._rope_spec import FIRST_HALF, LAYOUTS, PAIRS, ROUNDINGS, WHOLE, RopeSpec, rotate

_COLUMNS = 32
_FLOAT32 = (torch.float32, torch.float32)
_DTYPES = (  # of q and k, of cos and sin
    _FLOAT32,
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


class _Shape(NamedTuple):
    """Leading sizes of q and of cos, which of q's are the heads, and where cos gets a dimension."""

    q: tuple[int, ...]
    cos: tuple[int, ...]
    heads: int
    place: int | None

    def of_one(self) -> "_Shape":
        """One position, as in generation."""
        q = tuple(n if i == self.heads else 1 for i, n in enumerate(self.q))
        return self._replace(q=q, cos=tuple(1 for _ in self.cos))


_SHAPES = (
    _Shape((2, 3, 5), (2, 5), 1, 1),
    _Shape((2, 5, 3), (2, 5), 2, 2),
    _Shape((5, 3), (5,), 1, 1),
    _Shape((2, 3, 5), (5,), 1, 0),
    _Shape((2, 3, 5), (2, 1, 5), 1, None),
)


def may_rotate(function: FunctionType) -> bool:
    """Whether it may be asked: it needs three or four arguments, of which any may be named."""
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError):  # it says nothing of them
        return False
    needed = [p for p in parameters if p.default is p.empty]
    return len(needed) in (3, 4) and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _parameters(function: FunctionType) -> list[inspect.Parameter]:
    """Its arguments, but for those that it takes under any name."""
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind is not p.VAR_KEYWORD]


def probe(function: FunctionType) -> RopeSpec | None:
    """What the function computes, or None. For what `may_rotate`."""
    # It may draw, and the caller may be making a model on meta.
    with torch.random.fork_rng(devices=[]), undisturbed(), suppress(Exception):
        for spec in _asked(function):
            for shape in _SHAPES:
                if (found := _recognized(function, spec, shape)) is not None:
                    return _completed(function, found, shape)
    return None


def _asked(function: FunctionType) -> list[RopeSpec]:
    """What it may compute, as far as its arguments say."""
    parameters = {p.name: p.default for p in _parameters(function)}
    *tensors, a, b = [n for n, p in parameters.items() if p is inspect.Parameter.empty]
    defaults = tuple((n, p) for n, p in parameters.items() if p is not inspect.Parameter.empty)
    axis = next((name for name, value in defaults if type(value) is int), None)
    q, k = [*tensors, None][:2]
    return [
        RopeSpec((*parameters,), defaults, str(q), k, cos, sin, axis, LAYOUTS[0], WHOLE)
        for cos, sin in ((a, b), (b, a))
    ]


def _recognized(function: FunctionType, spec: RopeSpec, shape: _Shape) -> RopeSpec | None:
    """The layout whose values it returns in float32, and how they lie in memory."""
    for columns in (WHOLE, FIRST_HALF, PAIRS):
        inputs = _Inputs(shape, _COLUMNS, _COLUMNS // 2 if columns == PAIRS else _COLUMNS)
        made = inputs.call(function, spec)
        for layout in LAYOUTS if made is not None else ():
            now = spec._replace(layout=layout, columns=columns)
            if not _same(made, inputs.rotate(now)):
                continue
            for contiguous in (False, True):
                now = now._replace(contiguous=contiguous)
                if _agrees(function, now, shape) or _agrees(
                    function, now := now._replace(keeps_minus_zero=True), shape
                ):
                    return now
                now = now._replace(keeps_minus_zero=False)
    return None


def _completed(function: FunctionType, spec: RopeSpec, shape: _Shape) -> RopeSpec | None:
    """And for which shapes and dtypes it does that."""
    if not _agrees(function, spec, shape.of_one(), columns=2 * _COLUMNS):
        return None
    shapes = tuple(
        (len(s.q) + 1, len(s.cos) + 1, None if spec.axis is None else s.place, s.place, s.heads)
        for s in _SHAPES
        if _agrees(function, spec, s)
    )
    batched = [s for s in _SHAPES if len(s.cos) > 1 and _agrees(function, spec, s)]
    any_batch = all(_agrees(function, spec, s._replace(cos=(1, *s.cos[1:]))) for s in batched)
    partial = None
    for contiguous in (False, True):
        now = spec._replace(partial=contiguous)
        if _agrees(function, now, shape, width=_COLUMNS // (4 if spec.columns == PAIRS else 2)):
            partial = contiguous
    forms = []
    for dtypes in _DTYPES:
        for rounding in ROUNDINGS:
            if _agrees(function, spec, shape, dtypes=dtypes, rounding=rounding):
                forms.append((*dtypes, spec.form(rounding)))
                break
    return spec._replace(shapes=shapes, any_batch=any_batch, partial=partial, forms=tuple(forms))


class _Inputs:
    """Known numbers: q, k, cos and sin. In memory q's heads and positions are exchanged, as those
    of a projection are, and it has a head more than k."""

    def __init__(
        self, shape: _Shape, columns: int, width: int, dtypes: tuple[torch.dtype, ...] = _FLOAT32
    ) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(77)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32)

        def heads(more: int) -> Tensor:
            sizes = [n + more * (i == shape.heads) for i, n in enumerate(shape.q)]
            x = normal(*sizes[:-2], sizes[-1], sizes[-2], columns).transpose(-2, -3)
            x.select(shape.heads, 0).zero_()
            return x.to(dtypes[0])

        self.tensors = [heads(0), heads(-1)]
        self.angles = [normal(*shape.cos, width).to(dtypes[1]) for _ in range(2)]

    def leaves(self, spec: RopeSpec) -> list[Tensor]:
        """q and k, or q, with gradients."""
        return [x.clone().requires_grad_() for x in self.tensors[: 1 if spec.k is None else 2]]

    def call(
        self, function: FunctionType, spec: RopeSpec, leaves: list[Tensor] | None = None
    ) -> list[Tensor] | None:
        """What the function returns of them; None if that cannot be."""
        leaves = leaves or self.leaves(spec)
        given = dict(zip((spec.q, str(spec.k)), leaves, strict=False))
        given |= zip((spec.cos, spec.sin), (a.clone() for a in self.angles), strict=True)
        if spec.axis is not None:
            if self.shape.place is None:
                return None
            given |= {spec.axis: self.shape.place}  # type: ignore[dict-item]
        try:
            made = function(**given)
        except Exception:  # not what it takes
            return None
        if spec.k is None:
            made = (made,)
        if type(made) is not tuple or len(made) != len(leaves):
            return None
        untouched = all(map(torch.equal, leaves, self.tensors)) and all(
            torch.equal(given[n], a) for n, a in zip((spec.cos, spec.sin), self.angles, strict=True)
        )
        return [*made] if untouched and all(type(t) is Tensor for t in made) else None

    def rotate(
        self, spec: RopeSpec, form: int | None = None, leaves: list[Tensor] | None = None
    ) -> list[Tensor]:
        """What the operator returns of them."""
        q, k = [*(leaves or self.leaves(spec)), None][:2]
        form = spec.form(ROUNDINGS[0]) if form is None else form
        assert q is not None
        made = rotate(spec, form, q, k, self.angles[0], self.angles[1], self.shape.place)
        return [made] if isinstance(made, Tensor) else [*made]


def _agrees(
    function: FunctionType,
    spec: RopeSpec,
    shape: _Shape,
    *,
    dtypes: tuple[torch.dtype, ...] = _FLOAT32,
    rounding: str = ROUNDINGS[0],
    columns: int = _COLUMNS,
    width: int | None = None,
) -> bool:
    """Whether the function does what `spec` says."""
    if width is None:
        width = columns // 2 if spec.columns == PAIRS else columns
    inputs = _Inputs(shape, columns, width, dtypes)
    leaves = [inputs.leaves(spec) for _ in range(2)]
    with torch.enable_grad():
        made = inputs.call(function, spec, leaves[0])
        ours = inputs.rotate(spec, spec.form(rounding), leaves[1])
        if made is None or not _same(made, ours) or not all(map(_lie_alike, made, ours)):
            return False
        generator = torch.Generator().manual_seed(78)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float32) for y in ours]
        for grad in grads:
            grad.select(shape.heads, -1).zero_()
        grads = [grad.to(y.dtype) for grad, y in zip(grads, ours, strict=True)]
        if not all(y.requires_grad for y in made):
            return False
        return _same(
            torch.autograd.grad(made, leaves[0], grads), torch.autograd.grad(ours, leaves[1], grads)
        )


def _same(
    a: "list[Tensor] | tuple[Tensor, ...] | None", b: "list[Tensor] | tuple[Tensor, ...]"
) -> bool:
    """Whether their bits are."""
    return a is not None and all(map(_same_bits, a, b))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size <= 1 or ours == theirs for size, ours, theirs in strides)
