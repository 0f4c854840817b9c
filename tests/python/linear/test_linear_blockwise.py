"""The blockwise recipe: what its scales are for, and how it is composed at ragged extents."""

from __future__ import annotations

import linear_reference
import pytest
import torch
from reference import sqnr

OPS = torch.ops.fp8


def heavy_tailed(shape, device) -> torch.Tensor:
    """randn with outliers in one channel of 256, in one token of eight: activations of transformers
    have massive ones in few tokens and channels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    channels = torch.randperm(shape[1], generator=generator)[: shape[1] // 256]
    tokens = torch.randperm(shape[0], generator=generator)[: shape[0] // 8]
    x[tokens.unsqueeze(1), channels] *= 1e6
    return x.to(device)


def test_blockwise_keeps_what_outliers_cost_other_recipes(device):
    """Signal and noise of the ordinary elements. Beside an outlier of 1e6, a step of e4m3 is
    1e6 / 448 · 2^-9 = 4 or more: nothing of randn is left. One scale for the tensor loses all, one
    for a row that row, one for a block 128 elements."""
    x = heavy_tailed((256, 2048), device)
    ordinary = x.abs() < 10
    found = {}
    for name in ("tensorwise", "rowwise", "blockwise_1x128"):
        data, scale = getattr(OPS, f"quantize_{name}")(x)
        back = OPS.dequantize(data, scale, torch.float32)
        found[name] = sqnr(back[ordinary], x[ordinary])
    print(found)
    # The noise is the lost elements: of tensorwise every one (0 dB), of rowwise one row of eight
    # (9 dB), of blockwise at most 8 of 16 blocks in these rows (12 dB).
    assert found["tensorwise"] < 3, found
    assert 7 < found["rowwise"] < 12, found
    assert found["blockwise_1x128"] >= found["rowwise"] + 3, found
    assert found["blockwise_1x128"] >= found["tensorwise"] + 10, found


def test_blockwise_gradients_under_outliers(device):
    """y and dx of tokens without outliers, where other tokens have them: blockwise gives randn's
    29 dB. tensorwise loses y; its dy is e5m2, whose range holds both at 25 dB."""
    x = heavy_tailed((256, 1024), device)
    dy = heavy_tailed((256, 768), device)
    weight = torch.randn(768, 1024, generator=torch.Generator().manual_seed(4)).to(device) / 32
    ordinary = x.abs().amax(1) < 10
    ordinary_dy = dy.abs().amax(1) < 10
    y, dx = x.double() @ weight.double().t(), dy.double() @ weight.double()
    noise = {}
    for recipe in ("tensorwise", "blockwise"):
        result = linear_reference.run(x, weight, None, dy, recipe)
        noise[recipe] = {
            "y": sqnr(result.y[ordinary], y[ordinary]),
            "dx": sqnr(result.dx[ordinary_dy], dx[ordinary_dy]),
        }
    print(noise)
    assert min(noise["blockwise"].values()) >= 27, noise
    assert noise["blockwise"]["y"] >= noise["tensorwise"]["y"] + 20, noise
    assert noise["blockwise"]["dx"] >= noise["tensorwise"]["dx"] + 2, noise


@pytest.mark.parametrize(
    ("shape", "n"),
    [((129, 130), 257), ((1, 128), 128), ((3, 5, 384), 640), ((127, 2), 3), ((300, 264), 520)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", ["blockwise", "blockwise:power_of_two"])
def test_blockwise_around_the_edges_of_blocks(device, recipe, shape, n, dtype, poisoned_memory):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(n, shape[-1], device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    dy = torch.randn(*shape[:-1], n, device=device).to(dtype)
    actual = linear_reference.run(x, weight, bias, dy, recipe)
    expected = linear_reference.linear(x, weight, bias, dy, recipe)
    linear_reference.assert_matches(actual, expected, x, dy, recipe)


def test_blockwise_non_finite_stays_in_its_row(device):
    """A NaN in one token reaches that token's y, and of dW its own column, not more."""
    x = torch.randn(200, 256, device=device)
    x[150, 17] = float("nan")
    weight = torch.randn(64, 256, device=device)
    dy = torch.randn(200, 64, device=device)
    result = linear_reference.run(x, weight, None, dy, "blockwise")
    bad = ~result.y.isfinite()
    assert bad[150].all()
    assert int(bad.sum()) == 64
    assert result.dx.isfinite().all()
    bad = ~result.dw.isfinite()
    assert bad[:, 17].all()
    assert int(bad.sum()) == 64
