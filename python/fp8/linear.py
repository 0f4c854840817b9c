"""`fp8.Linear`: nn.Linear whose forward is one call of the fused FP8 operator.

It adds one string, `recipe`, to nn.Linear and no parameter, buffer or state_dict key, so the two
classes can be exchanged in place: `fp8.convert` and `fp8.revert` only change a module's class.
Pickles refer to `fp8.linear.Linear`.
"""

from typing import Self

import torch
from torch import Tensor, nn

from . import main_grad
from .recipe import Recipe, check_recipe

# Looked up once: `torch.ops.fp8.fused_linear.default` costs four attribute reads a call.
_fused_linear = torch.ops.fp8.fused_linear.default


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
    dtype: TypeError. The README has the rest.

    Args, beyond those of nn.Linear:
        recipe: a key of `fp8.RECIPES`, with options in a string ("rowwise:power_of_two") or as an
            `fp8.Recipe`. Unknown: ValueError. The attribute `recipe` is the string.

    Other dtypes (float64, integers, complex) may be held but not computed with: forward raises
    TypeError.

    Example:
        >>> layer = fp8.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16,
        recipe="rowwise")
    """

    # Class default: pickles and state from before the attribute, or `__new__` alone, still give a
    # working module.
    recipe: str = "tensorwise"

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
        self.recipe = name

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
        if "forward" in vars(linear):
            raise TypeError(
                "fp8.Linear.from_linear: forward was replaced on this instance and would be lost"
            )
        new = cls.__new__(cls)
        for key, value in vars(linear).items():
            # Parameters, buffers and hooks sit in containers; only the containers are new.
            vars(new)[key] = value.copy() if isinstance(value, dict | set) else value
        new._compiled_call_impl = None  # what linear.compile() made is bound to `linear`
        new.recipe = name
        return new

    def forward(self, input: Tensor) -> Tensor:
        """y: [..., out_features] for input: [..., in_features]; see `fp8.ops.fused_linear`."""
        weight = self.weight
        buffer = getattr(weight, "main_grad", None)
        if buffer is not None:
            return main_grad.linear(input, weight, self.bias, self.recipe, buffer)
        output: Tensor = _fused_linear(input, weight, self.bias, self.recipe)
        return output

    def extra_repr(self) -> str:
        """nn.Linear's line, and the recipe."""
        return f"{super().extra_repr()}, recipe={self.recipe}"
