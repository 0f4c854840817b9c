"""What fp8.convert takes for a norm, where only some inputs would tell it from one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import fp8
from fp8.nn import _fused_norms

WIDTH = 32


def fuse(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in FP8
        return fp8.convert(model, filter=lambda *_: False, fuse={"norms"})


def is_fused(module):
    return _fused_norms.original(type(module)) is not None


def normed(x, eps, dim=-1):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


class Weighted(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self._eps = eps

    def forward(self, x):
        return (self.weight * normed(x.float(), self._eps)).to(x.dtype)


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


def in_default_dtype(dtype):
    class Context:
        def __enter__(self):
            self.before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(self.before)

    return Context()


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        FakeTensorMode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: in_default_dtype(torch.float64),
        lambda: in_default_dtype(torch.bfloat16),
    ],
)
def test_where_convert_is_called_does_not_matter(context):
    norms = nn.Sequential(Weighted(), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, None, False))
    with context():
        fuse(norms)
    assert all(map(is_fused, norms))
    assert {d for _, d in norms[0].fp8_norm.dtypes} == {
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_the_probe_waits_for_no_other_process():
    calls = []

    class Reduced(nn.Module):
        def forward(self, x):
            dist.all_reduce(x)
            calls.append(x)
            return x

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        norms = fuse(nn.Sequential(Weighted(), Reduced(), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)))
        fp8.summary(norms)
    finally:
        dist.destroy_process_group()
    assert not calls
    assert [is_fused(module) for module in norms] == [True, False, True, True]
    assert len(norms[3].fp8_norm.dtypes) == len(fuse(nn.RMSNorm(WIDTH)).fp8_norm.dtypes)


def test_a_class_that_makes_others_is_copied_as_it_is():
    class Made(Weighted):
        def __new__(cls, eps):
            return super().__new__(cls)

    assert is_fused(fuse(Made(1e-6)))
