"""A small language model for the tests of convert, revert and summary; and its input."""

from collections import OrderedDict

import pytest
import torch
from torch import nn


def block(width: int) -> nn.Sequential:
    up, down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
    return nn.Sequential(OrderedDict(up=up, relu=nn.ReLU(), down=down))


@pytest.fixture
def model() -> nn.Sequential:
    """[B, T] tokens -> [B, T, 48] logits. Linears: blocks.{0,1}.{up,down}, lm_head."""
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(48, 32),
            blocks=nn.Sequential(block(32), block(32)),
            norm=nn.LayerNorm(32),
            lm_head=nn.Linear(32, 48, bias=False),
        )
    )


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(48, (2, 7))
