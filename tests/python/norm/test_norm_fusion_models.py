"""Models with fused norms: pickles and copies, reverts, the choice of fusions, the summary,
checkpointing and compilation; and fp8.RMSNorm."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fused_norms import WIDTH, fuse, is_fused
from model_norms import NORMS, Llamas
from reference import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.nn import _fused_norms


def model():
    layers = [nn.Linear(WIDTH, WIDTH), Llamas(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", NORMS)
def test_pickle_and_copies(name):
    module = fuse(nn.Sequential(NORMS[name]()))
    x = torch.randn(3, WIDTH)
    pickled = pickle.dumps(module, protocol=0)
    assert b"fp8.nn" in pickled
    assert b"fp8.nn._" not in pickled
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (loaded, copy.deepcopy(module), copy.copy(module), pickle.loads(pickled)):
        assert type(copied[0]) is type(module[0])
        assert torch.equal(copied(x), module(x))
    fp8.revert(loaded)
    assert not is_fused(loaded[0])
    assert is_fused(module[0])


def test_revert_gives_everything_back():
    plain = model()
    kinds, attributes = [type(m) for m in plain], [dict(vars(m)) for m in plain]
    fp8.convert(plain, filter=lambda *_: True)
    assert [is_fused(m) for m in plain] == [False, True, False, True]
    fp8.revert(plain)
    assert [type(m) for m in plain] == kinds
    assert [vars(m).keys() for m in plain] == [a.keys() for a in attributes]


def test_by_default_only_where_something_is_converted():
    with pytest.warns(UserWarning, match="converted nothing"):
        assert not any(map(is_fused, fp8.convert(model(), filter=lambda *_: False)))
    assert sum(map(is_fused, fp8.convert(model(), filter=lambda *_: True))) == 2
    assert sum(map(is_fused, fp8.convert(model(), filter=lambda *_: True, fuse=False))) == 0
    assert sum(map(is_fused, fp8.convert(model(), filter=lambda *_: False, fuse=["norms"]))) == 2


def test_another_call_takes_fusions_back():
    converted = fp8.convert(model(), filter=lambda *_: True)
    fp8.convert(converted, filter=lambda *_: True)
    assert sum(map(is_fused, converted)) == 2
    fp8.convert(converted, filter=lambda *_: True, fuse=False)
    assert sum(map(is_fused, converted)) == 0


@pytest.mark.parametrize(
    ("fuse", "kind", "message"),
    [
        ("norms", TypeError, "expected fuse as a bool or a set of names"),
        (3, TypeError, "expected fuse as a bool or a set of names"),
        ({"norms", "gates"}, ValueError, "expected fuse out of .*norms.*, got 'gates'"),
    ],
)
def test_fuse_errors(fuse, kind, message):
    plain = model()
    with pytest.raises(kind, match=message):
        fp8.convert(plain, fuse=fuse)
    assert type(plain[0]) is nn.Linear


def test_a_convert_that_fails_leaves_the_model_as_it_was(monkeypatch):
    plain = model()
    kinds, attributes = [type(m) for m in plain], [dict(vars(m)) for m in plain]

    def fail(base):
        if base is nn.LayerNorm:
            raise KeyboardInterrupt
        return _fused_norms._make(base)

    monkeypatch.setattr("fp8.conversion._norm_fusion.fused_class", fail)
    with pytest.raises(KeyboardInterrupt):
        fp8.convert(plain, filter=lambda *_: True)
    assert [type(m) for m in plain] == kinds
    assert [vars(m).keys() for m in plain] == [a.keys() for a in attributes]


def test_summary_names_every_norm():
    converted = fp8.convert(model(), filter=lambda *_: True)
    converted.append(Llamas())
    converted[4].forward = converted[4].forward.__func__.__get__(converted[4])
    converted.append(Llamas())
    converted[5].forward = lambda x: x
    lines = fp8.summary(converted).splitlines()
    assert lines[2].split(None, 3) == ["1", "32", "float32", "fused: rms_norm, round_then_scale"]
    assert lines[4].split(None, 3) == ["3", "32", "float32", "fused: layer_norm"]
    assert lines[5].endswith("- (not fused: rms_norm, round_then_scale)")
    assert "its forward was replaced on the instance" in lines[6]
    assert lines[-1] == "2 norms fused"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_and_compiled(reentrant):
    converted = fuse(model()[1:])
    x = torch.randn(3, WIDTH, requires_grad=True)
    (expected,) = torch.autograd.grad(converted(x).square().sum(), x)
    y = checkpoint(converted, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert_same_bits(x.grad, expected, "checkpointed")
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert_same_bits(dx, expected, "compiled")


def test_meta_models_are_recognized():
    with torch.device("meta"):
        meta = model()
        fuse(meta)
    assert [is_fused(m) for m in meta] == [False, True, False, True]


def test_rms_norm_module():
    ours, theirs = fp8.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, nn.RMSNorm)
    assert not fp8.RMSNorm(WIDTH, form="scale_by_one_plus").weight.any()
    assert fp8.RMSNorm([WIDTH], None, False)(x).shape == x.shape
    assert "form='scale_then_round'" in repr(ours)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    with pytest.raises(ValueError, match="expected form out of"):
        fp8.RMSNorm(WIDTH, form="gemma")
    with pytest.raises(ValueError, match="normalized_shape of one dimension"):
        fp8.RMSNorm((2, WIDTH))
