"""`fp8.GroupedLinear` and the recipes of grouped matmuls, for people who write their own mixture of
experts. Transformers' models need neither: `fp8.convert` sees to them (experts.py).
"""

import math

import torch
from torch import Tensor, nn

GROUPED_RECIPES: tuple[str, ...] = (
    "rowwise",
    "rowwise_gw_hp",
    "rowwise_fast",
    "rowwise_fast_gw_hp",
)
"""All quantize to e4m3 with a scale per row of each operand as the product reads it.

`gw_hp`: the weight gradient is made from unquantized operands (in bfloat16 on a GPU), which costs
little where groups are small. `fast`: the gradients are accumulated fast, as the forward is in all;
the others promote to fp32 in steps, as the dense recipes do."""

_grouped_linear = torch.ops.fp8.grouped_linear.default


def check_grouped_recipe(name: str) -> str:
    """The name. Raises ValueError that lists the known ones."""
    if name not in GROUPED_RECIPES:
        known = ", ".join(repr(known) for known in GROUPED_RECIPES)
        raise ValueError(f"fp8: expected a grouped recipe out of {known}, got {name!r}")
    return name


class GroupedLinear(nn.Module):
    """One linear layer per group of rows, in one FP8 product: y[r] = x[r] · weight[g]ᵀ + bias[g].

    weight: [groups, out_features, in_features] and bias: [groups, out_features], initialized as
    nn.Linear's. Rows lie sorted by group; `offsets` says where each group ends, on the device, and
    nothing waits for it.

    Args:
        groups: at most 1023.
        in_features, out_features: any; multiples of 16 avoid copies.
        bias: whether there is one.
        recipe: one of `fp8.GROUPED_RECIPES`. Unknown: ValueError.

    Example:
        >>> experts = fp8.GroupedLinear(4, 64, 32)
        >>> experts(torch.randn(10, 64), torch.tensor([3, 3, 8, 10], dtype=torch.int32)).shape
        torch.Size([10, 32])
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str = "rowwise",
    ) -> None:
        super().__init__()
        self.recipe = check_grouped_recipe(recipe)
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.weight = nn.Parameter(
            torch.empty(groups, out_features, in_features, device=device, dtype=dtype)
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(groups, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ±1 / √in_features, as nn.Linear."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """y: [T, out_features] for input: [T, in_features], offsets: [groups] int32, the row that
        ends each group; see `fp8.ops.grouped_linear`."""
        output: Tensor = _grouped_linear(input, self.weight, offsets, self.bias, self.recipe)
        return output

    def extra_repr(self) -> str:
        """Extents and recipe."""
        return (
            f"groups={self.groups}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, recipe={self.recipe}"
        )
