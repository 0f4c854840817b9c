"""What programs do to modules with torch's own tools: copies, ties, parametrizations, pruning,
fusing, swapping, quantizing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from converted import (
    assert_same_keys,
    assert_trains_alike,
    convert,
    converted_layers,
    every,
    fp8_output,
    randomize,
    relative,
    step,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fp8

RECIPES = tuple(fp8.RECIPES)


def net() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))


def data(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (16, 64)), generator=generator)


def loss(model: nn.Module) -> Tensor:
    return model(data()).float().square().mean()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("when", ["before", "after a step"])
def test_swap_module_params_on_conversion(recipe, when):
    """Each of .to, .half, load_state_dict swaps the tensor's insides then."""
    model, x = convert(net(), recipe), data()
    if when == "after a step":
        for _ in range(2):
            loss(model).backward()
        model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
        with torch.no_grad():
            assert model(x.bfloat16()).dtype == torch.bfloat16
        model.to(torch.float32)
        model.load_state_dict(net().state_dict())
        model.to_empty(device="meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    ours, theirs = step(model, loss), step(convert(net(), "tensorwise"), loss)
    assert relative(ours.loss, theirs.loss) < 0.05


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("trained", [0, 3, 20])
def test_copies_and_pickles(recipe, trained):
    """At any point of the training: what `delayed` knows is not part of a copy, the values are."""
    model = convert(net(), recipe)
    for _ in range(trained):
        loss(model).backward()
    model.zero_grad()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = convert(net(), recipe)
    for clone in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_keys(clone, model)
        assert relative(step(clone, loss).loss, step(fresh, loss).loss) < 0.02
        assert type(clone[0]) is fp8.Linear
        assert clone[0].weight is not model[0].weight
    assert copy.copy(model)[0].weight is model[0].weight


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(48, 64)
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 48, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.embed(ids))))

    ids = torch.arange(32) % 48

    def run(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(ids), (ids + 1) % 48)

    for recipe in ("tensorwise", "delayed", "rowwise"):
        copied = assert_trains_alike(randomize(Tied()), run, recipe)
        assert copied.head.weight is copied.embed.weight


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_layers_with_one_weight(recipe):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    assert_trains_alike(randomize(Twice()), loss, recipe)


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()) and m,
}


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("order", ["convert first", "wrap first"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise"])
def test_parametrizations(wrap, order, recipe):
    def make_layer() -> nn.Module:
        return randomize(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))

    torch.manual_seed(4)
    plain = make_layer()
    WRAPS[wrap](plain[0])
    torch.manual_seed(4)
    model = make_layer()
    if order == "convert first":
        convert(model, recipe)
    WRAPS[wrap](model[0])
    if order == "wrap first":
        convert(model, recipe)
        assert "subclass" in fp8.summary(model)
    plain.load_state_dict(model.state_dict())
    ours, theirs = step(model, loss), step(plain, loss)
    assert relative(ours.loss, theirs.loss) < 0.06
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        assert relative(ours.grads[name], grad) < 0.35, name
    parametrize.remove_parametrizations(model[0], "weight")
    assert isinstance(model[0], fp8.Linear) == (order == "convert first")
    fp8.revert(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("old", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("order", ["convert first", "wrap first"])
def test_old_norms_that_hang_on_a_hook(old, order):
    """They put a plain tensor in the place of the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        plain = old(randomize(nn.Linear(64, 64)))
        torch.manual_seed(4)
        model = randomize(nn.Linear(64, 64))
        if order == "convert first":
            convert(model)
        old(model)
        if order == "wrap first":
            convert(model)
    assert type(model) is fp8.Linear
    ours, theirs = step(model, loss), step(plain, loss)
    assert relative(ours.loss, theirs.loss) < 0.06
    for name, grad in theirs.grads.items():
        assert relative(ours.grads[name], grad) < 0.35, name


PRUNES = {
    "l1": lambda m: prune.l1_unstructured(m, "weight", amount=0.4),
    "structured": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
    "bias": lambda m: prune.random_unstructured(m, "bias", amount=0.3),
}


@pytest.mark.parametrize("how", PRUNES)
@pytest.mark.parametrize("order", ["convert first", "prune first"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise"])
def test_pruning(how, order, recipe):
    torch.manual_seed(4)
    plain = net()
    PRUNES[how](plain[0])
    torch.manual_seed(4)
    model = net()
    if order == "convert first":
        convert(model, recipe)
    PRUNES[how](model[0])
    if order == "prune first":
        convert(model, recipe)
    assert type(model[0]) is fp8.Linear
    for _ in range(3):
        ours, theirs = step(model, loss), step(plain, loss)
        assert relative(ours.loss, theirs.loss) < 0.06
        for name, grad in theirs.grads.items():
            assert relative(ours.grads[name], grad) < 0.35, name
        for one in (model, plain):
            with torch.no_grad():
                for p in one.parameters():
                    p.mul_(0.9)
    part = "bias" if how == "bias" else "weight"
    mask = model[0].get_buffer(f"{part}_mask")
    prune.remove(model[0], part)
    assert torch.count_nonzero(getattr(model[0], part)[mask == 0]) == 0
    with torch.no_grad():
        exact = model[0].weight.detach()
        y = nn.functional.linear(data(), exact, model[0].bias)
        assert relative(model[0](data()), y) < 0.08


def test_pruning_inside_cached_weights():
    layer = convert(randomize(nn.Linear(64, 64)))
    x = data()
    with torch.no_grad(), fp8.cached_weights(layer):
        layer(x)
        prune.l1_unstructured(layer, "weight", amount=0.6)
        for _ in range(2):
            assert relative(layer(x), fp8_output(layer, x)) < 1e-3
        prune.remove(layer, "weight")
        assert relative(layer(x), fp8_output(layer, x)) < 1e-3


def test_fused_with_batch_norm():
    plain = randomize(nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96))).eval()
    with torch.no_grad():
        plain[1].running_mean.normal_()
        plain[1].running_var.uniform_(0.5, 2)
        expected = plain(data())
        layer = convert(copy.deepcopy(plain))[0]
        fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer, plain[1])
        assert type(fused) is fp8.Linear
        assert relative(fused(data()), expected) < 0.08
        weight, bias = torch.nn.utils.fusion.fuse_linear_bn_weights(
            layer.weight, layer.bias, plain[1].running_mean, plain[1].running_var,
            plain[1].eps, plain[1].weight, plain[1].bias,
        )  # fmt: skip
        assert torch.equal(fused.weight, weight)
        assert torch.equal(fused.bias, bias)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_grad(set_to_none, recipe):
    model, copied = twins(net(), recipe)
    for one in (model, copied):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(one).backward()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 0.35


def test_buffers_registered_by_name():
    layer = convert(nn.Linear(64, 64))
    layer.register_buffer("input_scale", torch.tensor(0.02))
    assert float(layer.input_scale) == pytest.approx(0.02)
    assert "input_scale" in layer.state_dict()
    layer.register_buffer("input_scale", None)
    assert layer.input_scale is None
    layer(data())


def test_buffers_cast_past_the_module():
    """As FSDP1's MixedPrecision(buffer_dtype=...) does it: through named_buffers and .data."""
    model = convert(net())
    with torch.no_grad(), fp8.calibrate(model):
        model(data())
    expected = model(data()).detach()
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(torch.bfloat16)
    y = model(data()).detach()
    assert relative(y, expected) < 0.05
    model.state_dict()


def quantized_call(model: nn.Module, config: Int8WeightOnlyConfig) -> Tensor:
    quantize_(model, config)
    return model(data())


@pytest.mark.parametrize("version", [1, 2])
def test_quantize_of_torchao_says_to_revert(version):
    model, plain = convert(net()), fp8.revert(convert(net()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Int8WeightOnlyConfig(version=version)
        quantize_(plain, config)
        assert relative(plain(data()), net()(data())) < 0.05
        with pytest.raises(Exception, match=r"fp8\.revert"):  # of torchao, or in the first call
            quantized_call(model, config)
        fp8.convert(plain, filter=every)
    assert not any(isinstance(m, fp8.Linear) for m in plain.modules())


def test_module_surgery_by_class():
    """Programs look for nn.Linear by isinstance, wrap it, and put it back."""
    model = convert(net())
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            setattr(model, name, nn.Sequential(module, nn.Dropout(0.0)))
    assert len(converted_layers(model)) == 2
    assert relative(loss(model).detach(), loss(net()).detach()) < 0.06


def test_ordinary_module_methods():
    """repr, children, train and eval, requires_grad_, share_memory, apply, type, compile."""
    model = convert(net())
    assert "recipe=tensorwise" in repr(model)
    model.eval().train().requires_grad_(False).requires_grad_(True)
    model.share_memory()
    model.apply(lambda m: nn.init.zeros_(m.bias) if isinstance(m, nn.Linear) else None)
    assert not model[0].bias.any()
    model.type(torch.bfloat16)
    assert model(data().bfloat16()).dtype == torch.bfloat16
    model.float()
    model.compile(backend="eager")
    assert relative(loss(model), loss(convert(net()))) < 0.3
