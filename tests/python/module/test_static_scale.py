"""fp8.Linear.input_scale: a buffer where it is set, and nothing where it is not."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fp8

SCALE = 0.0123


def static(recipe="tensorwise", dtype=torch.float32, device="cpu"):
    """A layer with a static scale, and an input."""
    torch.manual_seed(0)
    layer = fp8.Linear(64, 48, device=device, dtype=dtype, recipe=recipe)
    layer.input_scale = torch.tensor(SCALE, device=device)
    return layer, torch.randn(5, 64, device=device, dtype=dtype)


def expected(layer, x):
    scale = torch.tensor(SCALE, device=x.device)
    return fp8.ops.fused_linear(x, layer.weight, layer.bias, layer.recipe, input_scale=scale)


@pytest.mark.parametrize("recipe", ["tensorwise", "tensorwise:power_of_two"])
def test_static_scale_is_what_the_input_is_quantized_with(device, recipe):
    layer, x = static(recipe, torch.bfloat16, device)
    assert torch.equal(layer(x), expected(layer, x))
    layer.input_scale = None
    assert torch.equal(layer(x), fp8.ops.fused_linear(x, layer.weight, layer.bias, recipe))


def test_static_scale_is_a_buffer_only_where_it_is_set():
    layer, _ = static()
    assert list(layer.state_dict()) == ["weight", "bias", "input_scale"]
    assert [name for name, _ in layer.named_buffers()] == ["input_scale"]
    assert "input_scale=static" in repr(layer)
    layer.input_scale = torch.tensor([1.0])
    assert layer.input_scale.shape == ()
    for remove in (
        lambda: setattr(layer, "input_scale", None),
        lambda: delattr(layer, "input_scale"),
    ):
        layer.input_scale = torch.tensor(SCALE)
        remove()
        assert layer.input_scale is None
        assert layer._buffers == {}
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert "input_scale" not in repr(layer)


def test_static_scale_errors():
    layer, _ = static()
    for _ in range(2):  # where there is one already, and where there is none
        with pytest.raises(
            TypeError, match=r"expected input_scale as a float32 tensor, got float$"
        ):
            layer.input_scale = 0.1
        with pytest.raises(TypeError, match=r"float32 tensor, got torch.bfloat16"):
            layer.input_scale = torch.tensor(1.0, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"input_scale of one element, got shape \[2\]"):
            layer.input_scale = torch.ones(2)
        layer.input_scale = None
    rowwise = fp8.Linear(64, 48, recipe="rowwise")
    with pytest.raises(ValueError, match=r"for tensorwise recipes, got 'rowwise'"):
        rowwise.input_scale = torch.ones(())
    assert rowwise.input_scale is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_static_scale_survives_copies(copied):
    layer, x = static()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    twin.input_scale.fill_(1.0)
    assert layer.input_scale.item() == torch.tensor(SCALE).item()


def test_static_scale_is_saved_and_loaded():
    layer, x = static()
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(layer, whole)
    torch.save(layer.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(x), layer(x))
    loaded = torch.load(state, weights_only=True)
    for assign in (False, True):
        fresh = nn.Sequential(fp8.Linear(64, 48))
        fresh.load_state_dict({f"0.{key}": value for key, value in loaded.items()}, assign=assign)
        assert torch.equal(fresh(x), layer(x))
    converted = fp8.convert(nn.Linear(64, 48), filter=lambda module, name: True)
    converted.load_state_dict(loaded | {"input_scale": loaded["input_scale"].reshape(1)})
    assert torch.equal(converted(x), layer(x))
    converted.load_state_dict(loaded | {"input_scale": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert converted.input_scale.dtype == torch.float32
    assert converted.input_scale.item() == 0.5


def test_static_scale_and_other_state_dicts():
    """Missing where one is expected; unexpected where none can be."""
    layer, _ = static()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "input_scale"'):
        layer.load_state_dict(nn.Linear(64, 48).state_dict())
    rowwise = fp8.Linear(64, 48, recipe="rowwise")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "input_scale"'):
        rowwise.load_state_dict(layer.state_dict())
    rowwise.load_state_dict(layer.state_dict(), strict=False)
    assert rowwise.input_scale is None
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "input_scale"'):
        nn.Linear(64, 48).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_static_scale_stays_float32(dtype):
    layer, x = static()
    before = layer.input_scale.clone()
    for model in (layer, nn.Sequential(layer)):
        model.to(dtype)
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.input_scale, before)
    assert torch.equal(layer(x.to(dtype)), expected(layer, x.to(dtype)))
    layer.double().float()
    assert torch.equal(layer.input_scale, before)
    meta = copy.deepcopy(layer).to("meta")
    assert (meta.input_scale.device.type, meta.input_scale.dtype) == ("meta", torch.float32)
    assert meta.to_empty(device="cpu").input_scale.dtype == torch.float32


@pytest.mark.gpu
def test_static_scale_moves_with_the_module():
    layer, x = static()
    y = layer.to("cuda", torch.bfloat16)(x.to("cuda", torch.bfloat16))
    assert layer.input_scale.device.type == "cuda"
    assert layer.input_scale.dtype == torch.float32
    assert torch.equal(y, expected(layer, x.to("cuda", torch.bfloat16)))


def test_static_scale_in_the_summary():
    model = nn.Sequential(static()[0], fp8.Linear(48, 64))
    lines = fp8.summary(model).splitlines()
    assert lines[1].endswith("tensorwise, static input_scale")
    assert lines[2].endswith("tensorwise")
    assert "2 in FP8 (2 tensorwise)" in lines[3]


def test_static_scale_and_other_recipes():
    layer, x = static()
    model = nn.Sequential(layer)
    for recipe in ("rowwise", "rowwise_gw_hp:power_of_two"):
        message = rf"0 has a static input_scale.*got '{recipe}'; fp8.uncalibrate"
        with pytest.raises(ValueError, match="fp8.convert: " + message):
            fp8.convert(model, recipe, filter=lambda module, name: True)
        with pytest.raises(ValueError, match=r"from_linear: the module has a static input_scale"):
            fp8.Linear.from_linear(layer, recipe)
        assert layer.recipe == "tensorwise"
    fp8.convert(model, "tensorwise:power_of_two", filter=lambda module, name: True)
    assert layer.recipe == "tensorwise:power_of_two"
    assert torch.equal(layer(x), expected(layer, x))
    shared = fp8.Linear.from_linear(layer)
    assert shared.input_scale is layer.input_scale
    fp8.revert(model)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert shared.input_scale is not None


def test_static_scale_works_with_functional_call_and_compile():
    layer, x = static()
    scale = torch.tensor(0.5)
    y = torch.func.functional_call(layer, {"input_scale": scale}, x)
    assert torch.equal(y, fp8.ops.fused_linear(x, layer.weight, layer.bias, input_scale=scale))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    grad = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, grad)
    layer.input_scale = None
    assert torch.equal(compiled(x), layer(x)), "compiled code notices that the scale is gone"


def test_static_scale_under_checkpointing_and_inference_mode():
    layer, x = static()
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    first = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).sum().backward()
    assert torch.equal(first, layer.weight.grad)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
        with fp8.cached_weights(layer):
            assert torch.equal(layer(x), y)
