"""What the sample calls of all operators are made of: see samples.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fp8

OPS = torch.ops.fp8
RECIPES = tuple(fp8.RECIPES)  # in the order of their numbers, as private operators take them
ROWWISE, GW_HP, BLOCKWISE, DELAYED = map(
    RECIPES.index, ("rowwise", "rowwise_gw_hp", "blockwise", "delayed")
)
POWER_OF_TWO = 1 << 8  # where such a number has its option


@dataclass
class Sample:
    """Arguments of one call. Every tensor is fresh, so a sample may be modified."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Table = dict[str, Callable[[str], list[Sample]]]
"""Of each operator its sample calls on a device."""


def inputs(device: str) -> dict[str, Tensor]:
    """x of the dtypes, ranks and layouts that take different ways through a quantize kernel."""
    matrix = torch.randn(24, 40, device=device)
    return {
        "bf16 [32, 64]": torch.randn(32, 64, device=device, dtype=torch.bfloat16),
        "fp16 [5, 7]": torch.randn(5, 7, device=device, dtype=torch.float16),
        "fp32 [2, 3, 20]": torch.randn(2, 3, 20, device=device),
        "1-D": torch.randn(33, device=device, dtype=torch.bfloat16),
        "no rows": torch.randn(0, 16, device=device, dtype=torch.bfloat16),
        "no columns": torch.randn(3, 0, device=device, dtype=torch.bfloat16),
        "transposed": matrix.t(),
        "sliced": matrix[1:, 3:30],
        "expanded": matrix[:1].expand(9, -1),
    }
