"""fp8.calibrate: the scale of the largest input seen, fixed without a synchronization per batch."""

import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fp8


def model_of(device="cpu", recipe="tensorwise", dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return fp8.convert(layers.to(device, dtype), recipe, filter=lambda module, name: True)


def batches(device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(m, 64, device=device, dtype=dtype) * m for m in (1, 7, 3)]


def scale_of(amax, device, power_of_two=False):
    """What quantization computes from an amax, as a tensor."""
    x = torch.as_tensor(amax, dtype=torch.float32).reshape(1).to(device)
    return fp8.ops.quantize_tensorwise(x, power_of_two=power_of_two)[1]


@pytest.mark.parametrize("recipe", ["tensorwise", "tensorwise:power_of_two"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("training", [True, False], ids=["training", "no grad"])
def test_calibrate_fixes_the_scale_of_the_largest_input(device, recipe, dtype, training):
    model = model_of(device, recipe, dtype).train(training)
    data = batches(device, dtype)
    seen = {0: [], 2: []}
    with torch.set_grad_enabled(training), fp8.calibrate(model):
        for x in data:
            seen[0].append(x.abs().max().float())
            seen[2].append(torch.relu(model[0](x)).detach().abs().max().float())
            y = model(x)
            if training:
                y.sum().backward()
    option = recipe.endswith("power_of_two")
    for index, amaxes in seen.items():
        scale = model[index].input_scale
        assert torch.equal(scale, scale_of(max(amaxes), device, option))
        assert scale.dtype == torch.float32
        assert scale.device == model[index].weight.device
        assert not scale.requires_grad
    x = data[0]
    assert torch.equal(
        model[0](x),
        fp8.ops.fused_linear(
            x, model[0].weight, model[0].bias, recipe, input_scale=model[0].input_scale
        ),
    )
    assert [name for name, _ in model.named_buffers()] == ["0.input_scale", "2.input_scale"]


def test_calibrate_quantizes_dynamically_inside(device):
    model = model_of(device)
    x = batches(device)[1]
    dynamic = model(x)
    with fp8.calibrate(model):
        assert torch.equal(model(x), dynamic)
    calibrated = model(x)
    with fp8.calibrate(model):  # also where there are scales already
        assert torch.equal(model(x), dynamic)
        assert model[0].input_scale is None
    assert torch.equal(model(x), calibrated)


def test_calibrate_with_a_power_of_two_changes_nothing_for_the_same_data(device):
    """The static scale of a batch is its dynamic scale, and so are the multipliers."""
    model = model_of(device, "tensorwise:power_of_two")
    x = batches(device)[1]
    dynamic = model(x)
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    assert torch.equal(model(x), dynamic)


def test_calibrate_margin(device):
    model = model_of(device)
    x = batches(device)[0]
    with fp8.calibrate(model, margin=1.5):
        model(x)
    assert torch.equal(model[0].input_scale, scale_of(x.abs().max() * 1.5, device))
    for margin in (0, -1.0, float("inf"), float("nan"), "2"):
        expected = pytest.raises(ValueError, match=r"expected a positive, finite margin, got")
        with expected, fp8.calibrate(model, margin=margin):
            pass


def test_calibrate_zero_input_has_scale_one():
    model = model_of()
    with fp8.calibrate(model):
        model(torch.zeros(3, 64))
    assert model[0].input_scale.item() == 1.0


def test_calibrate_reports_modules_that_were_never_called():
    model = model_of()
    expected = pytest.warns(UserWarning, match=r"never called, left as they were: '2'$")
    with expected, fp8.calibrate(model):
        model[0](batches()[0])
    assert model[0].input_scale is not None
    assert model[2].input_scale is None
    kept = model[0].input_scale.clone()
    with pytest.warns(UserWarning, match=r"left as they were: '0'$"), fp8.calibrate(model):
        model[2](torch.randn(2, 96))
    assert torch.equal(model[0].input_scale, kept)


def test_calibrate_without_rows_sees_nothing():
    model = model_of()
    with pytest.warns(UserWarning, match="'0', '2'"), fp8.calibrate(model):
        model(torch.randn(0, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_calibrate_error_non_finite(device, bad):
    """NaN stays in the running maximum, whatever comes later."""
    model = model_of(device)
    model[0].input_scale = torch.tensor(0.25, device=device)
    data = batches(device)
    data[0][0, 3] = bad
    message = rf"expected finite inputs, got NaN or Inf in those of '0' \({abs(bad)}\)"
    expected = pytest.raises(ValueError, match=message)
    with expected, fp8.calibrate(model):
        for x in data:
            model(x)
    assert model[0].input_scale.item() == 0.25, "as it was before"
    assert model[2].input_scale is None
    assert not model[0]._forward_pre_hooks


def test_calibrate_leaves_the_model_as_it_was_after_an_exception():
    model = model_of()
    model[2].input_scale = torch.tensor(0.25)
    expected = pytest.raises(KeyError)
    with expected, fp8.calibrate(model):
        model(batches()[0])
        raise KeyError
    assert model[0].input_scale is None
    assert model[2].input_scale.item() == 0.25
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibrate_tied_modules_and_weights():
    """One module in two places has one scale; two modules with one weight have two."""
    torch.manual_seed(0)
    layer, other = fp8.Linear(32, 32), fp8.Linear(32, 32)
    other.weight = layer.weight
    model = nn.ModuleDict({"first": layer, "again": layer, "other": other})
    small, large = torch.randn(4, 32), torch.randn(4, 32) * 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fp8.calibrate(model):
            model["first"](large)
            model["again"](small)
            model["other"](small)
    assert torch.equal(layer.input_scale, scale_of(large.abs().max(), "cpu"))
    assert torch.equal(other.input_scale, scale_of(small.abs().max(), "cpu"))


def test_calibrate_mixes_inference_mode_and_others():
    model = model_of()
    data = batches()
    with torch.inference_mode(), fp8.calibrate(model):
        model(data[0])
        with torch.inference_mode(False):
            model(data[1])
        model(data[2])
    assert not model[0].input_scale.is_inference()
    amax = max(x.abs().max() for x in data)
    assert torch.equal(model[0].input_scale, scale_of(amax, "cpu"))
    model.load_state_dict(model.state_dict())


def test_calibrate_sees_keyword_inputs_and_autocast(device):
    model = model_of(device)
    x = batches(device)[1]
    with torch.autocast(device, torch.bfloat16), fp8.calibrate(model):
        model[2](model[1](model[0](input=x)))
    assert torch.equal(model[0].input_scale, scale_of(x.abs().max(), device))
    assert model[2].input_scale.dtype == torch.float32


def test_calibrate_largest_values():
    """fp32 values near the largest, and a margin beyond it: the scale stays finite."""
    model = nn.Sequential(fp8.Linear(16, 16, recipe="tensorwise:power_of_two"))
    x = torch.full((2, 16), torch.finfo(torch.float32).max)
    with fp8.calibrate(model, margin=2.0):
        model(x)
    assert model[0].input_scale.item() == 2.0**120


def test_calibrate_leaves_other_recipes_alone():
    model = model_of()
    fp8.convert(model, "rowwise", filter=lambda module, name: name == "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fp8.calibrate(model):
            model(batches()[0])
    assert model[0].input_scale is not None
    assert model[2].input_scale is None


def test_calibrate_errors():
    message = r"fp8.calibrate: expected a torch.nn.Module, got list"
    expected = pytest.raises(TypeError, match=message)
    with expected, fp8.calibrate([]):
        pass
    for model, got in (
        (nn.Sequential(nn.Linear(4, 4)), "got no fp8.Linear"),
        (model_of(recipe="rowwise"), "got recipes 'rowwise'"),
    ):
        expected = pytest.raises(ValueError, match="fp8.Linear of a tensorwise recipe, " + got)
        with expected, fp8.calibrate(model):
            pass


def test_uncalibrate_goes_back(device):
    model = model_of(device)
    x = batches(device)[1]
    dynamic, state = model(x), list(model.state_dict())
    with fp8.calibrate(model):
        model(x)
    assert list(model.state_dict()) != state
    assert fp8.uncalibrate(model) is model
    assert list(model.state_dict()) == state
    assert torch.equal(model(x), dynamic)
    with pytest.raises(TypeError, match=r"fp8.uncalibrate: expected a torch.nn.Module, got int"):
        fp8.uncalibrate(3)


def test_calibrated_model_is_loaded_into_a_fresh_one(device):
    model = model_of(device)
    x = batches(device)[1]
    with fp8.calibrate(model):
        model(x)
    fresh = model_of(device)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


class Synchronizing(TorchFunctionMode):
    """Records what reads a value back to the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("item", "tolist", "cpu", "__bool__", "__float__", "is_nonzero", "numpy"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_calibrate_reads_nothing_back_while_it_observes():
    model = model_of()
    with fp8.calibrate(model):
        with Synchronizing() as recorder:
            for x in batches():
                model(x)
        assert recorder.seen == []


@pytest.mark.gpu
def test_calibrate_does_not_synchronize_in_a_batch():
    model = model_of("cuda", dtype=torch.bfloat16)
    data = batches("cuda", torch.bfloat16)
    with torch.no_grad(), fp8.calibrate(model):
        model(data[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in data:
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    amax = max(x.float().abs().max().item() for x in data)
    assert torch.equal(model[0].input_scale, scale_of(amax, "cuda"))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_calibrate_observes_nested_inputs(layout):
    layer = fp8.Linear(16, 8)
    parts = [torch.randn(3, 16), 7 * torch.ones(5, 16)]
    with torch.no_grad(), fp8.calibrate(layer):
        layer(torch.nested.nested_tensor(parts, layout=layout))
    assert layer.input_scale.item() == pytest.approx(7 / 448)
