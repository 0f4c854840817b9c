"""fp8.convert finds the same norms wherever it is called, and under autocast a fused norm returns
the dtype that it did before."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from fused_norms import WIDTH, Weighted, fuse, is_fused
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import fp8
from fp8.nn import _fused_norms


class InFloat32(nn.LayerNorm):
    """As OLMo's: autocast does not change the dtype of its output."""

    def forward(self, x):
        wide = [t.float() for t in (x, self.weight, self.bias)]
        return F.layer_norm(wide[0], self.normalized_shape, *wide[1:], self.eps).to(x.dtype)


@pytest.mark.parametrize(("kind", "fused"), [(InFloat32, 1), (nn.LayerNorm, 2)])
def test_layer_norms_that_autocast_on_a_gpu_leaves_alone(kind, fused, monkeypatch):
    """It makes float32 of the fused operator's output; on a CPU only the switch shows."""
    converted = fuse(kind(WIDTH).bfloat16())
    assert is_fused(converted)
    seen, op = [], _fused_norms._layer_norm
    monkeypatch.setattr(_fused_norms, "_layer_norm", lambda *args: (seen.append(1), op(*args))[1])
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    expected = converted(x)
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(converted(x), expected)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
    assert len(seen) == fused


@pytest.mark.gpu
def test_autocast_on_a_gpu():
    x = torch.randn(3, WIDTH, device="cuda")
    for eager in (InFloat32(WIDTH), nn.LayerNorm(WIDTH), Weighted(), nn.RMSNorm(WIDTH)):
        for dtype in (torch.float32, torch.bfloat16):
            eager.to("cuda", dtype)
            converted = fuse(copy.deepcopy(eager))
            for given in (x, x.bfloat16()):
                with torch.autocast("cuda", torch.bfloat16):
                    expected, y = eager(given), converted(given)
                assert y.dtype is expected.dtype
                torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)


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
