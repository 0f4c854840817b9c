"""input_scale as a buffer among others: registered, deleted, cast behind the module's back, kept by
what offloads a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fp8

SCALE = torch.tensor(0.0123)


def layer_and_input(dtype=torch.float32):
    torch.manual_seed(0)
    return fp8.Linear(64, 48, dtype=dtype), torch.randn(5, 64, dtype=dtype)


def expected(layer, x, scale=SCALE):
    return fp8.ops.fused_linear(x, layer.weight, layer.bias, layer.recipe, input_scale=scale)


@pytest.mark.parametrize("persistent", [True, False])
def test_register_buffer_sets_the_scale(persistent):
    layer, x = layer_and_input()
    for _ in range(2):  # nn.Module lets a buffer be registered again
        layer.register_buffer("input_scale", SCALE.clone(), persistent=persistent)
        assert torch.equal(layer(x), expected(layer, x))
        assert ("input_scale" in layer.state_dict()) == persistent
        assert [name for name, _ in layer.named_buffers()] == ["input_scale"]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert ("input_scale" in twin.state_dict()) == persistent
    layer.input_scale = SCALE * 2  # as of any buffer: it stays as persistent as it was
    assert ("input_scale" in layer.state_dict()) == persistent
    del layer.input_scale
    assert layer.input_scale is None
    assert list(layer.buffers()) == []
    layer.input_scale = SCALE
    assert "input_scale" in layer.state_dict()


def test_calibrate_keeps_a_scale_out_of_the_state_dict():
    layer, x = layer_and_input()
    layer.register_buffer("input_scale", SCALE, persistent=False)
    calibrate(layer, x)
    assert not torch.equal(layer.input_scale, SCALE)
    assert list(layer.state_dict()) == ["weight", "bias"]
    fresh, _ = layer_and_input()
    layer.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"input_scale\""):
        layer.load_state_dict(fresh.state_dict() | {"input_scale": SCALE})


def test_register_buffer_none_and_other_names():
    layer, x = layer_and_input()
    layer.register_buffer("input_scale", None)
    assert layer.input_scale is None
    assert torch.equal(layer(x), expected(layer, x, None))
    layer.register_buffer("other", torch.ones(2))
    assert list(layer.state_dict()) == ["weight", "bias", "other"]
    with pytest.raises(KeyError, match="already exists"):
        layer.register_buffer("weight", torch.ones(2))


def test_register_buffer_errors():
    layer, _ = layer_and_input()
    with pytest.raises(TypeError, match=r"float32 tensor, got torch.bfloat16"):
        layer.register_buffer("input_scale", SCALE.bfloat16())
    with pytest.raises(ValueError, match=r"one element, got shape \[2\]"):
        layer.register_buffer("input_scale", torch.ones(2))
    with pytest.raises(ValueError, match=r"for tensorwise recipes, got 'rowwise'"):
        fp8.Linear(16, 16, recipe="rowwise").register_buffer("input_scale", SCALE)
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["data", "_buffers"])
def test_scale_cast_past_apply_still_works(dtype, how):
    """As FSDP does with MixedPrecision(buffer_dtype=...), and state_dicts still load."""
    layer, x = layer_and_input()
    layer.input_scale = SCALE.clone()
    if how == "data":
        layer.input_scale.data = layer.input_scale.data.to(dtype)
    else:
        layer._buffers["input_scale"] = layer.input_scale.to(dtype)
    assert layer.input_scale.dtype == dtype
    assert torch.equal(layer(x), expected(layer, x, SCALE.to(dtype).float()))
    layer.weight.main_grad = torch.zeros(48, 64)
    assert torch.equal(layer(x), expected(layer, x, SCALE.to(dtype).float()))
    for assign in (False, True):
        other = copy.deepcopy(layer)
        other.load_state_dict(layer.state_dict() | {"input_scale": SCALE}, assign=assign)
        assert torch.equal(other.input_scale, SCALE)
        fresh, _ = layer_and_input()
        fresh.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(fresh.input_scale, SCALE.to(dtype).float())
    layer.to(torch.bfloat16)
    assert layer.input_scale.dtype == torch.float32


def test_fsdp1_with_a_dtype_of_buffers(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(8, 32)
        model = calibrate(make(), x).bfloat16()
        precision = dist.fsdp.MixedPrecision(
            param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
        )
        wrapped = dist.fsdp.FullyShardedDataParallel(
            copy.deepcopy(model), mixed_precision=precision, device_id=torch.device("cpu")
        )
        y = wrapped(x)
        for layer in (model[0], model[2]):
            layer.input_scale = layer.input_scale.bfloat16().float()
        assert torch.equal(y, model(x.bfloat16()))
        wrapped.load_state_dict(wrapped.state_dict())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scale_is_loaded_as_float32_whatever_the_default_dtype(dtype):
    layer, x = layer_and_input()
    layer.input_scale = SCALE
    fresh, _ = layer_and_input()
    torch.set_default_dtype(dtype)
    try:
        fresh.load_state_dict(layer.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(fresh.input_scale, SCALE)
    assert torch.equal(fresh(x), layer(x))


class Prefixed(dict):
    """accelerate's PrefixedDataset: reads through to `dataset`."""

    def __init__(self, dataset, prefix):
        super().__init__()
        self.dataset, self.prefix = dataset, prefix

    def __getitem__(self, key):
        return self.dataset[f"{self.prefix}{key}"]


class Offload:
    """What accelerate's AlignDevicesHook does to a module."""

    offload = True

    def __init__(self, module, name, values, offload_buffers, execution_device="cpu"):
        self.execution_device, self.offload_buffers = execution_device, offload_buffers
        self.weights_map = Prefixed(values, f"{name}.")
        module._hf_hook = self
        original = module.forward
        self.move(module, lambda key: torch.empty_like(self.weights_map[key], device="meta"))

        def forward(*args):
            self.move(module, lambda key: self.weights_map[key])
            try:
                return original(*args)
            finally:
                self.move(
                    module, lambda key: torch.empty_like(self.weights_map[key], device="meta")
                )

        module.forward = forward

    def move(self, module, value_of):
        for name in list(module._parameters):
            module._parameters[name] = nn.Parameter(value_of(name))
        for name in list(module._buffers) if self.offload_buffers else ():
            module._buffers[name] = value_of(name)


def offload(model, offload_buffers):
    values = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, fp8.Linear):
            Offload(module, name, values, offload_buffers)
    return model


def make():
    torch.manual_seed(0)
    return fp8.convert(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), filter=lambda *_: True
    )


def calibrate(model, x):
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    return model


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_calibrate_an_offloaded_model(offload_buffers):
    """Weights on meta between calls; the scales are those of the model at home."""
    x = torch.randn(8, 32)
    at_home = calibrate(make(), x)
    offloaded = calibrate(offload(make(), offload_buffers), x)
    assert torch.equal(offloaded[0].input_scale, at_home[0].input_scale)
    for _ in range(2):
        assert torch.equal(offloaded(x), at_home(x))
    calibrate(offloaded, x * 3)  # again: what the hook had is replaced
    calibrate(at_home, x * 3)
    assert torch.equal(offloaded(x), at_home(x))
    fp8.uncalibrate(offloaded)
    assert torch.equal(offloaded(x), make()(x))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offload_a_calibrated_model(offload_buffers):
    x = torch.randn(8, 32)
    at_home = calibrate(make(), x)
    offloaded = offload(calibrate(make(), x), offload_buffers)
    assert torch.equal(offloaded(x), at_home(x))
    calibrate(offloaded, x * 3)
    calibrate(at_home, x * 3)
    assert torch.equal(offloaded(x), at_home(x))


def test_offloaded_weights_that_cannot_be_written():
    model = offload(make(), True)
    model[0]._hf_hook.weights_map = (1, 2)
    with pytest.raises(RuntimeError, match=r"got tuple, into which input_scale cannot be written"):
        model[0].input_scale = SCALE


def test_scale_of_an_offloaded_layer_lives_where_it_runs():
    """Not where the input was seen, which the hook moves afterwards."""
    layer, _ = layer_and_input()
    layer.to("meta")
    assert fp8.nn._offload.scale_device(layer, torch.device("cpu")).type == "cpu"
    layer._hf_hook = type("Sequence", (), {"hooks": [object(), Offload.__new__(Offload)]})()
    layer._hf_hook.hooks[1].execution_device = "cuda:1"
    assert fp8.nn._offload.scale_device(layer, torch.device("cpu")) == torch.device("cuda:1")


def test_calibrate_inputs_on_meta():
    model = make().to("meta")
    with (
        pytest.raises(ValueError, match=r"'0' \(on the meta device, without values\)"),
        fp8.calibrate(model),
    ):
        model(torch.empty(4, 32, device="meta"))
