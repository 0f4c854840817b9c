"""`fp8.Linear`: nn.Linear whose forward is one call of the fused FP8 operator.

It adds one string, `recipe`, to nn.Linear and no parameter, buffer or state_dict key, so the two
classes can be exchanged in place: `fp8.convert` and `fp8.revert` only change a module's class. Only
where the input has a static scale, that is a buffer, `input_scale`, and where scales are delayed,
their history is one, `amax_history`, which is in no state_dict. Pickles refer to `fp8.nn.Linear`.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._native.collectives import spare_collectives
from ..recipe import Recipe, check_recipe
from . import _distributed_checkpoint, _histories, _main_grad, _offload, _operands
from ._calls import CALLED, _mark_traced, has_own_forward
from ._sibling_calls import local as _siblings

# Looked up once: `torch.ops.fp8.fused_linear.default` costs four attribute reads a call. What it
# calls itself, the second, is 0.2 us faster where nothing traces.
_fused_linear = torch.ops.fp8.fused_linear.default
_eager_linear = getattr(_fused_linear, "_op", _fused_linear)


class Linear(nn.Linear):
    """y = x · weightᵀ + bias, with the matrix products of forward and backward in FP8.

    x: [..., in_features] bfloat16, float16 or float32, weight: [out_features, in_features] and
    bias: [out_features] of the same dtype (under autocast: any of the three). y: [...,
    out_features] in x's dtype. Weights are quantized in every call, so any optimizer and any update
    of the parameters works.

    If `weight.main_grad` is a tensor [out_features, in_features] in bfloat16, float16 or float32,
    the backward adds the weight gradient to it, in fp32 and rounded once, instead of returning it:
    `weight.grad` stays None. As in Megatron-LM and Transformer Engine a true
    `weight.overwrite_main_grad` makes it overwrite, and `weight.grad_added_to_main_grad`, where it
    exists, is set to True. Read in the forward; of another shape or device: ValueError, another
    dtype: TypeError. docs/training.md has the rest.

    Args, beyond those of nn.Linear:
        recipe: a key of `fp8.RECIPES`, with options in a string ("rowwise:power_of_two") or as an
            `fp8.Recipe`. Unknown: ValueError. The attribute `recipe` is the string.

    With an `input_scale` (see there, and `fp8.calibrate`) the input is quantized with this scale,
    in one pass over it instead of two; for recipes of one scale per tensor.

    Other dtypes (float64, integers, complex) may be held but not computed with: forward raises
    TypeError.

    Example:
        >>> layer = fp8.Linear(4096, 14336, device="cuda", dtype=torch.bfloat16, recipe="rowwise")
    """

    __module__ = "fp8.nn"  # what pickles name

    # Class default: pickles and state from before the attribute, or `__new__` alone, still give a
    # working module.
    recipe: str = "tensorwise"

    # transformers' tensor parallelism: forward gets local tensors. The operator takes no DTensor.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "tensorwise",
    ) -> None:
        name = str(check_recipe(recipe))
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = name  # and with it the history
        spare_collectives()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe = "tensorwise") -> Self:
        """An fp8.Linear that shares the Parameter, buffer and hook objects of `linear`: no copies.

        It is meant to take the place of `linear`. What is registered on one of the two later (a
        hook, another parameter) is not seen by the other; what happens to shared parameters is.

        Raises TypeError for anything but an nn.Linear or fp8.Linear itself (a subclass would lose
        its own behaviour) and for a module whose `forward` was replaced on the instance.

        Example:
            >>> model.head = fp8.Linear.from_linear(model.head, recipe="rowwise")
        """
        name = str(check_recipe(recipe))
        if type(linear) not in (nn.Linear, Linear, cls):
            raise TypeError(
                "fp8.Linear.from_linear: expected an nn.Linear itself, no subclass, "
                f"got {type(linear).__name__}"
            )
        if has_own_forward(linear):
            raise TypeError(
                "fp8.Linear.from_linear: forward was replaced on this instance and would be lost"
            )
        new = cls.__new__(cls)
        for key, value in vars(linear).items():
            # Parameters, buffers and hooks sit in containers; only the containers are new.
            if key != "forward":  # the class's own, if it is there
                vars(new)[key] = value.copy() if isinstance(value, dict | set) else value
        if isinstance(linear, Linear) and linear.input_scale is not None:
            check_static(name, "fp8.Linear.from_linear: the module")
        new._compiled_call_impl = None  # what linear.compile() made is bound to `linear`
        new.recipe = name
        spare_collectives()
        return new

    def forward(self, input: Tensor) -> Tensor:
        """y: [..., out_features] for input: [..., in_features]; see `fp8.ops.fused_linear`.

        Nested tensors give nested ones of the same structure, as of nn.Linear: jagged ones with
        the same offsets, strided ones with members of the same leading dimensions.
        """
        weight: Any
        bias: Tensor | None
        tracing = is_compiling()
        if tracing:
            self._mark_traced()
            weight, bias = self.weight, self.bias
        else:
            self.__dict__[CALLED] = True
            siblings = _siblings.scope
            if siblings is not None and (found := siblings.output(self, input)) is not None:
                return found
            # What Module.__getattr__ finds costs a failed search and its exception, some 0.4 us;
            # so does, below, what a tensor has not.
            try:
                weight, bias = (parameters := self._parameters)["weight"], parameters["bias"]
            except KeyError:  # parametrized, or set anew before each forward
                weight, bias = self.weight, self.bias
        scale = self._buffers.get("input_scale")
        if scale is not None and scale.dtype is not torch.float32:
            scale = scale.float()  # something has cast it past _apply: FSDP's buffer_dtype
        if type(input) is not Tensor or type(weight) is not nn.Parameter:
            unusual: Tensor = _operands.linear(self, input, scale)
            return unusual
        buffer = getattr(weight, "main_grad", None) if tracing else weight.__dict__.get("main_grad")
        recipe = self.recipe
        history = _histories.of(self, weight) if recipe[:7] == "delayed" else None
        output: Tensor
        if buffer is not None:
            return _main_grad.linear(input, weight, bias, recipe, buffer, scale, history)
        linear = _fused_linear if tracing else _eager_linear
        if scale is not None:
            output = linear(input, weight, bias, recipe, input_scale=scale, history=history)
        elif history is not None:
            output = linear(input, weight, bias, recipe, history=history)
        else:
            output = linear(input, weight, bias, recipe)
        return output

    _mark_traced = _mark_traced

    @property
    def input_scale(self) -> Tensor | None:
        """The static scale of the input, 0-dim float32; None: a scale is computed in every call.

        x ≈ data · input_scale, so values beyond 448 · input_scale saturate. A buffer where it is
        set (moved and saved with the module, float32 whatever the module's dtype), and not there
        where it is None. Set to anything but a tensor of one float32 element, or with a recipe that
        is not tensorwise: TypeError or ValueError, at the latest in forward.
        """
        return self._buffers.get("input_scale")

    @input_scale.setter
    def input_scale(self, scale: Tensor | None) -> None:
        if scale is None:
            self._buffers.pop("input_scale", None)
            self._non_persistent_buffers_set.discard("input_scale")
        else:
            self._buffers["input_scale"] = checked = self._checked_scale(scale)
            _offload.store_scale(self, checked)

    def _checked_scale(self, scale: object) -> Tensor:
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
            got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
            raise TypeError(f"fp8.Linear: expected input_scale as a float32 tensor, got {got}")
        if scale.numel() != 1:
            raise ValueError(
                f"fp8.Linear: expected input_scale of one element, got shape {list(scale.shape)}"
            )
        check_static(self.recipe, "fp8.Linear: the module")
        return scale.detach().reshape(())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "input_scale":  # nn.Module would write a buffer that exists past the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
            if name == "recipe":
                _histories.fit(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _histories.fit(self)  # a pickle from before the buffer

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of nn.Module, `input_scale` included, which is checked as when it is set."""
        if name == "input_scale":
            tensor = None if tensor is None else self._checked_scale(tensor)
            self._buffers.setdefault(name, None)  # else the property counts as in the way
        super().register_buffer(name, tensor, persistent)
        if name == "input_scale" and tensor is not None:
            _offload.store_scale(self, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to, .cuda, .half, ... do; the scale goes along and stays float32."""
        scale = self.input_scale
        history = self._buffers.get(_histories.NAME)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if history is not None and history.is_meta:  # what to_empty makes of it is no history
            _histories.renew(self)
        moved = self.input_scale
        if scale is not None and moved is not None and moved.dtype != torch.float32:
            self._buffers["input_scale"] = scale.to(moved.device, torch.float32)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.input_scale is None and self._may_be_static():
            weight = destination.get(f"{prefix}weight")
            _distributed_checkpoint.made_without_scale(self, weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A scale in the state_dict is taken also where this module has none yet. Of another recipe
        it stays an unexpected key."""
        key = f"{prefix}input_scale"
        persistent = "input_scale" not in self._non_persistent_buffers_set
        if self._may_be_static() and persistent:
            if key not in state_dict:
                name = f"{prefix}weight"
                beside = _distributed_checkpoint.scale_beside(state_dict.get(name), name)
                if beside is not None:  # load_state_dict's own copy of the caller's dict
                    state_dict[key] = beside
            scale, own = state_dict.get(key), self.input_scale
            if isinstance(scale, Tensor) and scale.numel() == 1:
                state_dict[key] = scale = scale.detach().reshape(()).float()
                if own is None or own.dtype != torch.float32:
                    self._take_scale(scale)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _may_be_static(self) -> bool:
        return check_recipe(self.recipe).granularity == "tensorwise"

    def _take_scale(self, scale: Tensor) -> None:
        """Make `scale`, of any device, the static scale, on the device where it belongs."""
        device = _offload.scale_device(self, scale.device)
        with torch.inference_mode(False):  # a normal tensor, whatever the caller's mode
            self.input_scale = scale.to(device, copy=True)

    def extra_repr(self) -> str:
        """nn.Linear's line, the recipe, and whether the input's scale is static."""
        static = "" if self.input_scale is None else ", input_scale=static"
        return f"{super().extra_repr()}, recipe={self.recipe}{static}"


def check_static(recipe: str, what: str) -> None:
    """Raises ValueError for a recipe under which an input cannot have a static scale."""
    if check_recipe(recipe).granularity != "tensorwise":
        raise ValueError(
            f"{what} has a static input_scale, which is for tensorwise recipes, got {recipe!r}; "
            "fp8.uncalibrate(model) goes back to dynamic scales"
        )
