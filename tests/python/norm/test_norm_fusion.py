"""fp8.convert's fusion of norms: what is recognized, what stays as it was, what falls back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from reference import assert_same_bits
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.nn import _fused_norms

FUSED = {"norms"}
WIDTH = 32


class Weighted(nn.Module):
    """What the norms below share; each writes its formula as some model does."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-6, ones: float = 1.0):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), ones) + 0.1 * torch.randn(width))
        self.small = eps

    def hat(self, x):
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small)


class Llamas(Weighted):
    def forward(self, hidden_states):
        return self.gamma * self.hat(hidden_states).to(hidden_states.dtype)


class Olmos(Weighted):
    def forward(self, x):
        return (self.gamma * self.hat(x)).to(x.dtype)


class Gemmas(Weighted):
    def forward(self, x):
        return (self.hat(x) * (1.0 + self.gamma.float())).type_as(x)


class Constant(Weighted):
    """eps is in the code, and a second argument may change everything."""

    def forward(self, x, gate=None):
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        y = self.gamma * y.to(x.dtype)
        return y if gate is None else y * gate


class Bare(nn.Module):
    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


NORMS = {
    "round_then_scale": Llamas,
    "scale_then_round": Olmos,
    "scale_by_one_plus": lambda: Gemmas(ones=0.0),
    "constant eps": Constant,
    "no weight": Bare,
    "torch's RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "torch's RMSNorm, eps by default": lambda: nn.RMSNorm(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer norm, nothing": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
}


def fuse(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in FP8
        return fp8.convert(model, filter=lambda *_: False, fuse=FUSED, **options)


def is_fused(module):
    return _fused_norms.original(type(module)) is not None


def calls_of(monkeypatch):
    """How many fused calls there were, as a list that grows."""
    seen = []
    for name in ("_rms_norm", "_layer_norm"):
        op = getattr(_fused_norms, name)

        def count(*args, op=op):
            seen.append(op)
            return op(*args)

        monkeypatch.setattr(_fused_norms, name, count)
    return seen


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_is_recognized_by_what_it_computes(monkeypatch, device, name, dtype):
    module = NORMS[name]().to(device, dtype)
    parameters, state = dict(module.named_parameters()), module.state_dict()
    kind, before = type(module), copy.deepcopy(module)
    assert fuse(module) is module
    assert is_fused(module)
    assert isinstance(module, kind)
    assert type(module).__name__ == kind.__name__
    assert all(p is parameters[n] for n, p in module.named_parameters())
    assert list(module.state_dict()) == list(state)
    seen = calls_of(monkeypatch)
    x, y = (torch.randn(4, 7, WIDTH, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    ours, eager = module(x), before(x)
    assert len(seen) == 1
    torch.testing.assert_close(ours, eager, rtol=2**-6 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    if dtype.itemsize == 2:
        assert float((ours == eager).float().mean()) > 0.98
    leaves = [x, *parameters.values()]
    grads = torch.autograd.grad(ours, leaves, y)
    theirs = torch.autograd.grad(eager, [x, *before.parameters()], y)
    for a, b in zip(grads, theirs, strict=True):
        step = 2**-5 if dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(a, b, rtol=step, atol=step * float(b.abs().max()))


class Wrong:
    """Modules that are nearly norms."""

    class Detached(Olmos):
        def forward(self, x):
            wide = x.float()
            root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small).detach()
            return (self.gamma * (wide * root)).to(x.dtype)

    class Noisy(Olmos):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    class Shifted(Olmos):
        def forward(self, x):
            return super().forward(x) + float(self.training)

    class Sum(Olmos):
        def forward(self, x):
            return super().forward(x) + x

    class InPlace(Olmos):
        def forward(self, x):
            return x.copy_(super().forward(x))

    class Stateful(Olmos):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += 1
            return super().forward(x)

    class Clamped(Olmos):
        def forward(self, x):
            return super().forward(x.clamp(-50, 50))

    class TwoInputs(Olmos):
        def forward(self, x, gate):
            return super().forward(x) * gate


@pytest.mark.parametrize("name", [n for n in vars(Wrong) if not n.startswith("_")])
def test_what_is_nearly_a_norm_is_left_alone(name):
    module = getattr(Wrong, name)()
    random, attributes = torch.get_rng_state(), dict(vars(module))
    fuse(module)
    assert not is_fused(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(module).keys() == attributes.keys()


@pytest.mark.parametrize("kind", [nn.Identity, nn.SiLU, nn.Softmax, nn.BatchNorm1d, nn.GroupNorm])
def test_other_modules_are_left_alone(kind):
    arguments = {nn.BatchNorm1d: (WIDTH,), nn.GroupNorm: (1, WIDTH)}
    assert type(fuse(kind(*arguments.get(kind, ())))) is kind


def test_layer_norm_over_two_dimensions_is_left_alone():
    assert type(fuse(nn.LayerNorm((3, WIDTH)))) is nn.LayerNorm


def falls_back(monkeypatch, module, *args, **kwargs):
    """The call computes what the class's own forward does, bit for bit, and nothing is fused."""
    seen = calls_of(monkeypatch)
    base = _fused_norms.original(type(module)) or type(module)
    before = len(seen)
    result = module(*args, **kwargs)
    if not any(isinstance(b, parametrize.ParametrizationList) for b in module.children()):
        expected = base.forward(module, *args, **kwargs)
        assert torch.equal(result, expected)
    assert len(seen) == before
    return result


def test_calls_of_another_kind_run_the_classs_own_forward(monkeypatch):
    module = fuse(Constant().bfloat16())
    x = torch.randn(5, WIDTH, dtype=torch.bfloat16)
    seen = calls_of(monkeypatch)
    module(x)
    assert len(seen) == 1
    falls_back(monkeypatch, module, x, x)
    falls_back(monkeypatch, module, x, gate=x)
    falls_back(monkeypatch, module, x=x)
    falls_back(monkeypatch, module, x.double())
    falls_back(monkeypatch, module, x[0, 0])


def test_a_changed_eps_is_used(monkeypatch):
    module = fuse(Llamas().bfloat16())
    x = 1e-3 * torch.randn(5, WIDTH, dtype=torch.bfloat16)
    module.small = 1.0
    falls_back(monkeypatch, module, x)
    assert "- (not fused: its small has changed)" in fp8.summary(module)
    module.small = 1e-2
    fuse(module)  # found again, as it is now
    seen = calls_of(monkeypatch)
    assert_same_bits(module(x), fp8.ops.rms_norm(x, module.gamma, 1e-2, "round_then_scale"), "eps")
    assert len(seen) == 1


def test_another_weight_is_used(monkeypatch):
    module = fuse(Llamas())
    x = torch.randn(5, WIDTH)
    seen = calls_of(monkeypatch)
    module.gamma = nn.Parameter(torch.randn(WIDTH))
    assert_same_bits(module(x), fp8.ops.rms_norm(x, module.gamma, 1e-6), "new weight")
    assert len(seen) == 1
    module.gamma = nn.Parameter(torch.randn(1))  # broadcast
    falls_back(monkeypatch, module, x)


def test_a_forward_on_the_instance_rules(monkeypatch):
    module = Llamas()
    module.forward = lambda x: x + 1
    assert not is_fused(fuse(module))
    late = fuse(Llamas())
    late.forward = lambda x: x + 1
    assert torch.equal(late(torch.zeros(2, WIDTH)), torch.ones(2, WIDTH))


def test_a_forward_replaced_in_the_class_rules(monkeypatch):
    class Mine(Llamas):
        pass

    module = fuse(Mine())
    monkeypatch.setattr(Llamas, "forward", lambda self, x: x + 1)
    assert torch.equal(module(torch.zeros(2, WIDTH)), torch.ones(2, WIDTH))


def test_hooks_run(monkeypatch):
    module = fuse(Llamas())
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, y: y + 1)
    x = torch.randn(3, WIDTH)
    assert torch.equal(module(x), fp8.ops.rms_norm(2 * x, module.gamma, 1e-6) + 1)


def test_a_parametrized_weight_is_used():
    module = fuse(Llamas())
    x = torch.randn(3, WIDTH)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    expected = 2 * module(x)
    parametrize.register_parametrization(module, "gamma", Doubled())
    torch.testing.assert_close(module(x), expected)
    with pytest.warns(UserWarning, match="fp8.revert.*stays fused"):
        fp8.revert(module)


def test_a_tensor_subclass_runs_the_classs_own_forward(monkeypatch):
    class Mine(torch.Tensor):
        pass

    module = fuse(Llamas())
    falls_back(monkeypatch, module, torch.randn(3, WIDTH).as_subclass(Mine))


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
