"""What fp8.convert takes for a norm, where only some inputs would tell it from one."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_norms import WIDTH, Weighted, fuse, is_fused, normed
from torch import nn
from torch.nn import functional as F

from fp8.nn import _fused_norms


def assert_as_before(module, x):
    """The converted copy computes the same, or raises as the module does."""
    converted = fuse(copy.deepcopy(module))
    try:
        expected = module(x)
    except Exception as error:
        with pytest.raises(type(error)):
            converted(x)
        return converted
    near = 1e-5 if x.dtype is torch.float32 else 2**-6
    torch.testing.assert_close(converted(x), expected, rtol=near, atol=near, equal_nan=True)
    return converted


def test_private_attributes_tell_norms_apart():
    norms = nn.Sequential(Weighted(1e-6), Weighted(1e-2))
    converted = assert_as_before(norms, 0.01 * torch.randn(3, WIDTH))
    assert all(map(is_fused, converted))
    for module in (*norms, *converted):
        module._eps = 1.0
    torch.testing.assert_close(converted(torch.ones(3, WIDTH)), norms(torch.ones(3, WIDTH)))


class Channels(nn.Module):
    """Of the second dimension, which is the last of a matrix alone."""

    def forward(self, x):
        return normed(x, 1e-6, dim=1)


class Samples(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[1:])


class Tokens(nn.Module):
    def forward(self, x):
        _rows, _columns = x.shape
        return normed(x, 1e-6)


@pytest.mark.parametrize("kind", [Channels, Samples, Tokens])
@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (2, WIDTH, WIDTH), (2, 3, 5, WIDTH)])
def test_other_numbers_of_dimensions_are_asked_for(kind, shape):
    assert is_fused(assert_as_before(kind(), torch.randn(shape)))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_rows_of_another_size_raise_as_before(kind):
    converted = assert_as_before(kind(WIDTH, elementwise_affine=False), torch.randn(3, 2 * WIDTH))
    assert is_fused(converted)


def test_a_norm_of_one_size_is_of_that_alone():
    class ByRoot(nn.Module):
        def forward(self, x):
            return 8 * x / (x.pow(2).sum(-1, keepdim=True) + 64e-6).sqrt()

    assert is_fused(assert_as_before(ByRoot(), torch.randn(3, 64)))
    assert_as_before(ByRoot(), torch.randn(3, WIDTH))


class Normalized(Weighted):
    def forward(self, x):
        y = F.normalize(x.float(), dim=-1) * WIDTH**0.5
        return (self.weight * y).to(x.dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_rows_show_eps(scale, dtype):
    x = (scale * torch.randn(4, WIDTH)).to(dtype)
    for module in (Weighted(0.0), Weighted(1e-30), Normalized(), nn.LayerNorm(WIDTH, eps=0.0)):
        assert_as_before(module.to(dtype), x)
    assert is_fused(fuse(Weighted(0.0)))


def test_gradients_of_training_count():
    class Frozen(Weighted):
        def forward(self, x):
            weight = self.weight.detach() if self.training else self.weight
            return (weight * normed(x.float(), self._eps)).to(x.dtype)

    assert not is_fused(fuse(Frozen()))


@pytest.mark.parametrize("kind", [Weighted, lambda: nn.LayerNorm(WIDTH)])
def test_parameters_of_another_dtype_are_fused_too(kind, monkeypatch):
    """As after model.bfloat16(), and in FSDP2's mixed precision."""
    converted = fuse(kind().float())
    seen = []
    for name in ("_rms_norm", "_layer_norm"):
        op = getattr(_fused_norms, name)
        monkeypatch.setattr(
            _fused_norms, name, lambda *args, op=op: (seen.append(args[0].dtype), op(*args))[1]
        )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert converted.to(dtype)(torch.randn(3, WIDTH, dtype=dtype)).dtype is dtype
    assert seen == [torch.bfloat16, torch.float16, torch.float32]


def test_a_class_that_makes_others_is_copied_as_it_is():
    class Made(Weighted):
        def __new__(cls, eps):
            return super().__new__(cls)

    assert is_fused(fuse(Made(1e-6)))
