"""What a module computes, if it is a norm: found by calling its class's forward with known numbers.

A copy of the module gets random parameters, so that forms differ whatever its own weights are, and
norms rows of 1e-4 to 1e2, where eps shows. It is a norm of a form if its bfloat16 (or float16)
output is that form's, written in plain torch, bit for bit, in both modes of training, and if its
gradients are that form's. Names play no part.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn._fused_norms import LAYER, NormSpec

_ROWS = 13
_SIMPLE = (bool, int, float, str, tuple, torch.dtype, type(None))
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FORMS = ("scale_then_round", "round_then_scale", "scale_by_one_plus")
_USUAL_EPS = (1e-6, 1e-5, 1e-8, 1e-12)  # where no attribute has it
_MOST_WIDTHS = 3  # to try, where no parameter says
_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm)


class Key(tuple[Any, ...]):
    """What decides what a module computes: equal keys, equal norms."""

    __slots__ = ()


def key_of(module: nn.Module) -> Key | None:
    """None for a module that cannot be a norm, by what it has: at most two parameters, of one
    dimension and one size, no buffers or children, and attributes that are plain values."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") and kind not in _TORCH_NORMS:
        return None
    if module._modules or any(b is not None for b in module._buffers.values()):
        return None
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None]
    if len(parameters) > 2 or len({(p.shape, p.dtype) for _, p in parameters}) > 1:
        return None
    for _, parameter in parameters:
        if parameter.dim() != 1 or parameter.numel() < 1 or parameter.dtype not in _DTYPES:
            return None
    attributes = attributes_of(module)
    if not all(isinstance(value, _SIMPLE) for _, value in attributes):
        return None
    if not _takes_one_tensor(kind):
        return None
    shapes = tuple((name, p.shape[0], p.dtype) for name, p in parameters)
    try:
        hash(attributes)
    except TypeError:
        return None
    return Key((kind, shapes, tuple(module._parameters), attributes))


def attributes_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What the module holds beside parameters, buffers, children and what is torch's or private."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("training", "fp8_norm", "forward")
    )


def probe(module: nn.Module, key: Key) -> NormSpec | None:
    """The norm that a module of this key is, or None."""
    # A module may draw, dropping what it was given; the caller may be making a model on meta.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            return _probe(module, key)
        except Exception:  # whatever it does with numbers, it is no norm
            return None


def _probe(module: nn.Module, key: Key) -> NormSpec | None:
    _, shapes, names, attributes = key
    parameter_dtype = shapes[0][2] if shapes else None
    for width in [shapes[0][1]] if shapes else _widths(attributes):
        generator = torch.Generator().manual_seed(1234)
        parameters = {
            name: torch.randn(width, generator=generator).to(parameter_dtype) for name, *_ in shapes
        }
        clone = _clone(module, parameters, names)
        scales = torch.logspace(-4, 2, _ROWS)[:, None]
        x = torch.randn(_ROWS, width, generator=generator) * scales
        best: NormSpec | None = None
        for candidate in _candidates(parameters, attributes):
            dtypes = tuple(d for d in _DTYPES if _agrees(clone, candidate, parameters, x.to(d)))
            if len(dtypes) <= (len(best.dtypes) if best else 0):
                continue
            if _same_gradients(clone, candidate, parameters, x, dtypes):
                form, eps, weight, bias = candidate
                best = NormSpec(form, eps, weight, bias, dtypes, parameter_dtype, attributes)
            if dtypes != (torch.float32,):  # in which forms do not differ
                break
        if best is not None:
            return best
    return None


Candidate = tuple[str, float, str | None, str | None]  # form, eps, weight, bias


def _candidates(
    parameters: dict[str, Tensor], attributes: tuple[tuple[str, Any], ...]
) -> Iterator[Candidate]:
    found = [v for _, v in attributes if isinstance(v, float) and 0 < v < 0.1]
    every = dict.fromkeys([*found, *_USUAL_EPS, torch.finfo(torch.float32).eps])
    first, second = [*parameters, None, None][:2]
    for eps in every:
        if second is None:
            for form in _FORMS if first is not None else _FORMS[:1]:
                yield form, eps, first, None
            yield LAYER, eps, first, None
        if first is not None:
            yield LAYER, eps, second, first
            yield LAYER, eps, first, second


def expected(x: Tensor, candidate: Candidate, parameters: dict[str, Tensor]) -> Tensor:
    """The candidate in plain torch operations."""
    form, eps, weight_name, bias_name = candidate
    weight = None if weight_name is None else parameters[weight_name]
    if form == LAYER:
        bias = None if bias_name is None else parameters[bias_name]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    hat = x.float()
    hat = hat * torch.rsqrt(hat.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return hat.to(x.dtype)
    if form == "round_then_scale":
        return weight * hat.to(x.dtype)
    factor = 1.0 + weight.float() if form == "scale_by_one_plus" else weight
    return (hat * factor).to(x.dtype)


def _agrees(
    clone: nn.Module, candidate: Candidate, parameters: dict[str, Tensor], x: Tensor
) -> bool:
    with torch.no_grad():
        try:
            wanted = expected(x, candidate, parameters)
        except RuntimeError:  # not a mixture of dtypes that F.layer_norm takes
            return False
        for training in (True, False):
            vars(clone)["training"] = training
            given = x.clone()
            try:
                made = type(clone).forward(clone, given)
            except Exception:  # whatever it does not take
                return False
            if type(made) is not Tensor or made.dtype is not wanted.dtype:
                return False
            if made.shape != wanted.shape or not torch.equal(given, x):  # written in place
                return False
            if x.dtype is torch.float32:  # fp32 formulas may be written in another order
                if not torch.allclose(made, wanted, rtol=1e-5, atol=1e-6):
                    return False
            elif not torch.equal(made, wanted):
                return False
    return True


def _same_gradients(
    clone: nn.Module,
    candidate: Candidate,
    parameters: dict[str, Tensor],
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> bool:
    """In float32 if the module takes it; else in what it takes, whose steps they may be apart."""
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    # Rows of one magnitude: gradients of small rows are large.
    rows = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
    leaves = [rows.to(dtype).requires_grad_()]
    leaves += [p.detach().clone().requires_grad_() for p in parameters.values()]
    own = dict(zip(parameters, leaves[1:], strict=True))
    with torch.enable_grad():
        wanted = expected(leaves[0], candidate, own)
        clone = _clone(clone, own, tuple(clone._parameters))
        copies = [leaves[0], *(clone._parameters[name] for name in own)]
        made = type(clone).forward(clone, leaves[0])
        dy = torch.randn(made.shape, generator=torch.Generator().manual_seed(5)).to(made.dtype)
        ours = torch.autograd.grad(made, copies, dy, allow_unused=True)
        theirs = torch.autograd.grad(wanted, leaves, dy)
    step = 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-4
    for a, b in zip(ours, theirs, strict=True):
        if a is None or a.dtype is not b.dtype:
            return False
        if not torch.allclose(a.float(), b.float(), rtol=step, atol=step * float(b.abs().max())):
            return False
    return True


def _clone(module: nn.Module, parameters: dict[str, Tensor], names: tuple[str, ...]) -> nn.Module:
    """One with these parameters on the CPU; it shares nothing that a forward may write."""
    kind: Any = type(module)
    clone: nn.Module = kind.__new__(kind)
    vars(clone).update(vars(module))
    vars(clone)["_parameters"] = {
        name: nn.Parameter(parameters[name]) if name in parameters else None for name in names
    }
    vars(clone)["_buffers"] = dict(module._buffers)
    return clone


def _widths(attributes: tuple[tuple[str, Any], ...]) -> list[int]:
    """Sizes of rows that a module without parameters may be made for."""
    found: dict[int, None] = {}
    for _, value in attributes:
        for size in value if isinstance(value, tuple) else (value,):
            if isinstance(size, int) and not isinstance(size, bool) and 1 < size <= 65536:
                found[size] = None
    return [*list(found)[: _MOST_WIDTHS - 1], 64]


def _takes_one_tensor(kind: type) -> bool:
    """Whether forward(self, x) is a call of a plain function."""
    forward = kind.forward  # type: ignore[attr-defined]
    if not inspect.isfunction(forward):
        return False
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(needed) == 1 and needed[0].kind is needed[0].POSITIONAL_OR_KEYWORD
