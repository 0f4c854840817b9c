"""`fp8.GroupedLinear`: many linear layers of one shape, each for its own group of rows."""

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..recipe import DEFAULT_GROUPED_RECIPE, Recipe, check_grouped_recipe
from . import _main_grad
from ._calls import CALLED, _mark_traced

_grouped_linear = torch.ops.fp8.grouped_linear.default


class GroupedLinear(nn.Module):
    """y[r] = x[r] · weight[g]ᵀ + bias[g] for the rows r of each group g, in FP8 forward and
    backward: the experts of a mixture, say, on tokens sorted by expert.

    weight: [num_groups, out_features, in_features] and bias: [num_groups, out_features], bfloat16,
    float16 or float32, initialized as num_groups nn.Linears one after the other are. Weights are
    quantized in every call; `fp8.cached_weights` changes that. `weight.main_grad`, of the weight's
    shape, takes the weight's gradient as that of `fp8.Linear` does.

    Args:
        num_groups: up to 1023.
        in_features, out_features, bias, device, dtype: as nn.Linear has them.
        recipe: out of `fp8.GROUPED_RECIPES`, with options in a string ("rowwise:power_of_two") or
            as an `fp8.Recipe`. Others: ValueError. The attribute `recipe` is the string.

    Example:
        >>> layer = fp8.GroupedLinear(8, 64, 128)
        >>> offsets = torch.tensor([3, 3, 10, 10, 10, 10, 10, 16], dtype=torch.int32)
        >>> layer(torch.randn(16, 64), offsets).shape  # three rows for group 0, seven for group 2
        torch.Size([16, 128])
    """

    __module__ = "fp8.nn"  # what pickles name

    bias: Tensor | None
    recipe: str = DEFAULT_GROUPED_RECIPE

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = DEFAULT_GROUPED_RECIPE,
    ) -> None:
        name = str(check_grouped_recipe(recipe))
        super().__init__()
        self.num_groups = num_groups
        self.in_features = in_features
        self.out_features = out_features
        self.recipe = name
        shape = (num_groups, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew, a group after the other, as nn.Linear does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
        for group in range(self.num_groups):
            nn.init.kaiming_uniform_(self.weight[group], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias[group], -bound, bound)

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """y: [T, out_features] for input: [T, in_features], sorted by group, and offsets:
        [num_groups] int32 on the same device, the row that ends each group. Rows past the last
        offset give zeros, and have a gradient of zero. See `fp8.ops.grouped_linear`.
        """
        if is_compiling():
            self._mark_traced()
        else:
            self.__dict__[CALLED] = True
        weight, bias = self.weight, self.bias
        traced = not isinstance(weight, Tensor)  # torch.fx: any attribute is one more node
        buffer = getattr(self._parameters.get("weight") if traced else weight, "main_grad", None)
        if buffer is not None and traced:
            raise NotImplementedError(
                "fp8.GroupedLinear: expected weights without main_grad under torch.fx, got one, "
                "to which the graph would not add; trace first"
            )
        if buffer is not None:
            target = _main_grad.target_of("fp8.GroupedLinear", weight, buffer)
            return _main_grad.grouped_linear(input, weight, offsets, bias, self.recipe, target)
        output: Tensor = _grouped_linear(input, weight, offsets, bias, self.recipe)
        return output

    _mark_traced = _mark_traced

    def extra_repr(self) -> str:
        """Groups, features, bias and recipe."""
        return (
            f"num_groups={self.num_groups}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, recipe={self.recipe}"
        )
