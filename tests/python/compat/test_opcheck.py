"""torch.library.opcheck over the table of samples, and fake tensors against real ones."""

from __future__ import annotations

import pytest
import samples
import torch
from reference import FP8_DTYPES, codes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.fp8, name).default


@pytest.fixture
def _allclose_of_fp8(monkeypatch):
    """opcheck's test_schema compares inputs by torch.allclose, which knows no fp8."""
    original = torch.allclose

    def allclose(a, b, **options):
        if a.dtype in FP8_DTYPES:
            return torch.equal(codes(a), codes(b))
        return original(a, b, **options)

    monkeypatch.setattr(torch, "allclose", allclose)


@pytest.mark.usefixtures("_allclose_of_fp8")
@pytest.mark.parametrize("name", samples.namespace())
def test_opcheck(device, name):
    for sample in samples.samples(name, device):
        result = torch.library.opcheck(
            operator(name), sample.args, sample.kwargs, raise_exception=False
        )
        failed = {test: why for test, why in result.items() if why != "SUCCESS"}
        assert not failed, f"{sample.name}: {failed}"


def describe(value):
    if not isinstance(value, torch.Tensor):
        return value
    return (value.dtype, tuple(value.shape), value.stride(), value.device.type, value.requires_grad)


@pytest.mark.parametrize("name", samples.namespace())
def test_fake_tensors_have_the_real_layout(device, name):
    """Shapes, dtypes and strides (padded rows too), which a compiler builds on."""
    for sample in samples.samples(name, device):
        with FakeTensorMode() as mode:
            fake_args, fake_kwargs = pytree.tree_map_only(
                torch.Tensor, mode.from_tensor, (sample.args, sample.kwargs)
            )
            fake = operator(name)(*fake_args, **fake_kwargs)
        real = operator(name)(*sample.args, **sample.kwargs)
        assert pytree.tree_map(describe, fake) == pytree.tree_map(describe, real), sample.name


@pytest.mark.parametrize("name", samples.namespace())
def test_meta_tensors_have_the_real_layout(name):
    for sample in samples.samples(name, "cpu"):
        meta_args, meta_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), (sample.args, sample.kwargs)
        )
        # .to("meta") makes non-dense views contiguous, so compare on equal inputs.
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.contiguous(), (sample.args, sample.kwargs)
        )
        if any(
            describe(m)[2] != describe(r)[2]
            for m, r in zip(tensors(meta_args), tensors(args), strict=True)
        ):
            continue
        meta, real = operator(name)(*meta_args, **meta_kwargs), operator(name)(*args, **kwargs)
        for ours, expected in zip(tensors(meta), tensors(real), strict=True):
            assert ours.device.type == "meta"
            assert describe(ours)[:3] == describe(expected)[:3], sample.name


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
