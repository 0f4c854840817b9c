"""The forward of a norm that `fp8.convert` recognized: one fused operator where nothing is in the
way, else that of the module's own class.

A fused module has a subclass of its class, made once for each class and forward of it. It keeps
that one's names, so that code which looks at them finds what it knows; pickles name the original
class, and `fused_norm`, which takes it. A module of such a class that no conversion made, by
`type(norm)(64)` for instance, has no NormSpec and runs the original's forward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack as _transforms
from torch.autograd import forward_ad

from ._calls import called_through
from ._class_code import held, names_read
from ._fused_classes import made_class, made_from, subclass

_rms_norm = torch.ops.fp8.rms_norm.default
_layer_norm = torch.ops.fp8.layer_norm.default
_has_any_global_hook: Any = nn.modules.module._has_any_global_hook

LAYER = "layer"
SPEC = "fp8_norm"
"""The attribute of a fused module that holds its NormSpec."""


class NormSpec(NamedTuple):
    """What a norm was found to compute, and from what."""

    form: str  # of fp8.ops.rms_norm, or LAYER
    eps: float
    weight: str | None  # names of its parameters
    bias: str | None
    dtypes: tuple[tuple[torch.dtype | None, torch.dtype], ...]  # of parameters and input
    width: int | None  # of rows; None: any
    ranks: tuple[int, ...]  # of inputs, for which that was found
    under_autocast: bool  # y is float32 then on a GPU, as F.layer_norm's is; RMSNorm's is not
    keeps_order: bool  # y's dimensions lie in memory in the order of x's
    attributes: tuple[tuple[str, Any], ...]  # all that it has beside parameters, as found


NormSpec.__module__, NormSpec.__qualname__ = "fp8.nn", "_NormSpec"  # what pickles name


_classes: dict[tuple[type[nn.Module], Any], type[nn.Module]] = {}
_MARK = "_fp8_fused_from"


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward is fused, for the forward that `base` has now."""
    key = (base, base.forward)
    found: Any = _classes.get(key)
    if found is None or not found._fp8_intact():
        found = _classes[key] = _make(base)
    result: type[nn.Module] = found
    return result


def fused_norm(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = fused_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


fused_norm.__module__, fused_norm.__qualname__ = "fp8.nn", "_fused_norm"


def parameter_of(module: nn.Module, name: str) -> Any:
    """What the module has under the name, without running a parametrization: that draws random
    numbers, or counts, once for each look."""
    parameter = module._parameters.get(name)
    return vars(module).get(name) if parameter is None else parameter


def obstacle(module: Any, x: Any) -> str | None:
    """Why a call of a fused module with x takes the class's own forward; None if it is fused."""
    spec: NormSpec = vars(module)[SPEC]
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return "its input is no plain tensor"
    if x.is_nested or not (x.is_cuda or x.is_cpu):
        return "its input is no dense tensor on a CPU or GPU"
    if x.dim() not in spec.ranks:
        return f"its input has {x.dim()} dimensions"
    if spec.width is not None and x.shape[-1] != spec.width:
        return "its input has rows of another size"
    if (changed := _changed(module, spec)) is not None:
        return changed
    dtype = None
    for parameter_name in (spec.weight, spec.bias):
        if parameter_name is None:
            continue
        parameter = parameter_of(module, parameter_name)
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"its {parameter_name} is no plain parameter"
        if dtype is not None and parameter.dtype is not dtype:
            return f"its {parameter_name} has another dtype"
        dtype = parameter.dtype
        if parameter.shape != x.shape[-1:]:
            return f"its {parameter_name} has another shape"
        if parameter.device != x.device:
            return f"its {parameter_name} is on another device"
    if (dtype, x.dtype) not in spec.dtypes:
        return f"its input is {str(x.dtype).removeprefix('torch.')}, its parameters {dtype}"
    if (
        not spec.under_autocast
        and x.dtype is not torch.float32
        and torch.is_autocast_enabled("cuda")
    ):
        return "autocast would make its output float32"
    return None


def fused_spec(norm: Any, x: Any) -> NormSpec | None:
    """What a call of norm(x) computes, for a contiguous x, if it does that by the fused operator
    and nothing else; None where it does not."""
    if original(type(norm)) is None or called_through(norm) is not None or _has_any_global_hook():
        return None
    if x.layout is not torch.strided or not x.is_contiguous():
        return None
    if type(norm).__call__ is not nn.Module.__call__ or transformed():
        return None
    spec: NormSpec | None = norm._fp8_spec(x)
    return spec


def _changed(module: nn.Module, spec: NormSpec) -> str | None:
    """What the module has beside its own parameters that is not as it was found."""
    attributes = vars(module)
    for name, value in spec.attributes:
        if attributes.get(name, _MARK) != value:
            return f"its {name} has changed"
    for name, parameter in module._parameters.items():
        if parameter is not None and name != spec.weight and name != spec.bias:
            return f"it has a parameter {name} now"
    if module._modules:
        return "it has modules now"
    if any(buffer is not None for buffer in module._buffers.values()):
        return "it has buffers now"
    return None


def _in_order(x: Tensor) -> bool:
    """Whether x's dimensions lie in memory in their order, the outermost first."""
    strides = x.stride()
    return all(
        strides[i] >= strides[i + 1] or x.shape[i] == 1 or strides[i] == 0
        for i in range(len(strides) - 1)
    )


def transformed() -> bool:
    """Whether torch.func or forward-mode AD look on, whose rules the operators do not have."""
    return _transforms() is not None or forward_ad._current_level >= 0


def _make(base: type[nn.Module]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward
    # Beside the forward, what it calls and reads of the class; none of it in most norms.
    names = names_read(base)
    rest = held(base, names)
    overridable = tuple(dict.fromkeys(h.name for h in rest if h.name != "forward"))

    def unchanged(self: Any, spec: NormSpec) -> bool:
        known = [name for name, _ in spec.attributes]
        return all(h.same() for h in rest) and not any(
            name in vars(self) and name not in known for name in overridable
        )

    def fuses(self: Any, spec: NormSpec, x: Any) -> bool:
        return not obstacle(self, x) and (not rest or unchanged(self, spec))

    def fused_spec(self: Any, x: Any) -> NormSpec | None:
        spec: NormSpec | None = vars(self).get(SPEC)
        return spec if spec and base.forward is own and fuses(self, spec, x) else None

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec: NormSpec | None = vars(self).get(SPEC)
        if len(args) != 1 or kwargs or base.forward is not own or spec is None:
            return base.forward(self, *args, **kwargs)
        x = args[0]
        if not fuses(self, spec, x):
            return base.forward(self, x)
        compiling = torch.compiler.is_compiling()
        if not compiling and transformed():
            return base.forward(self, x)
        if not spec.keeps_order or x.is_contiguous() or _in_order(x):
            return run(self, spec, x)
        # Eager elementwise code leaves y in x's order, which a view of y may rely on.
        if compiling or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return base.forward(self, x)
        leading = range(x.dim() - 1)
        order = [*sorted(leading, key=lambda i: -x.stride(i)), x.dim() - 1]
        y = run(self, spec, x.permute(order))
        return y.permute([order.index(i) for i in range(len(order))])

    def run(self: Any, spec: NormSpec, x: Tensor) -> Tensor:
        weight = None if spec.weight is None else parameter_of(self, spec.weight)
        y: Tensor
        if spec.form == LAYER:
            bias = None if spec.bias is None else parameter_of(self, spec.bias)
            y = _layer_norm(x, weight, bias, spec.eps)
        else:
            y = _rms_norm(x, weight, spec.eps, spec.form)
        return y

    def intact() -> bool:
        return base.forward is own and all(h.same() for h in rest)

    own_methods = {"_fp8_intact": staticmethod(intact), "_fp8_spec": fused_spec}
    return subclass(base, _MARK, forward, fused_norm, **own_methods)


def stale(module: nn.Module) -> str | None:
    """Why no call of a fused module is fused, as far as its input has no part in it."""
    spec: NormSpec | None = vars(module).get(SPEC)
    kind: Any = made_class(type(module), original)
    if spec is None:
        return "made of a fused class; convert again"
    if not kind._fp8_intact():
        return "its class's forward was replaced"
    if (changed := _changed(module, spec)) is not None:
        return changed
    names = [name for name in (spec.weight, spec.bias) if name is not None]
    dtypes = {p.dtype for p in (parameter_of(module, name) for name in names) if p is not None}
    if len(dtypes) > 1 or not {d for d, _ in spec.dtypes} & (dtypes or {None}):
        kinds = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its parameters are {' and '.join(kinds)}"
    return None
