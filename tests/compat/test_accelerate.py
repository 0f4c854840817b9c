"""accelerate: weights that wait elsewhere and come for the call, and mixed precision."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from converted import (
    assert_close,
    convert,
    converted_layers,
    every,
    noticed,
    randomize,
    relative,
    step,
    summary_line,
    twins,
)
from tiny_transformers import inputs, make
from torch import Tensor, nn

import fp8


class Net(nn.Module):
    """Two linears and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.norm(self.up(x))))


def net() -> nn.Module:
    return randomize(Net()).eval()


def data() -> Tensor:
    return torch.randn(16, 64)


OFFLOADS = ("cpu", "cpu with buffers", "disk", "disk with buffers", "dispatch cpu", "dispatch disk")


def offload(model: nn.Module, how: str, folder: Any) -> nn.Module:
    buffers = {"offload_buffers": "buffers" in how}
    if how.startswith("cpu"):
        return accelerate.cpu_offload(model, execution_device="cpu", **buffers)
    if how.startswith("disk"):
        return accelerate.disk_offload(model, str(folder), execution_device="cpu", **buffers)
    where = how.split()[1]
    device_map = {"up": "cpu", "norm": "cpu", "down": where}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_convert_then_offload(how, recipe, tmp_path):
    model, x = convert(net(), recipe), data()
    expected = output(copy.deepcopy(model), x)
    offload(model, how, tmp_path)
    for _ in range(3):
        assert torch.equal(output(model, x), expected)
    assert recipe in summary_line(model, "up")


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_then_convert(how, tmp_path):
    """accelerate replaces forward on the instance: the class behind it changes all the same, or the
    layer is left alone and says so."""
    model, x = net(), data()
    exact = output(copy.deepcopy(model), x)
    in_fp8 = output(convert(copy.deepcopy(model)), x)
    offload(model, how, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fp8.convert(model, filter=every)
    y = output(model, x)
    layers = [m for m in model.modules() if isinstance(m, fp8.Linear)]
    if layers:
        assert torch.equal(y, in_fp8)
    else:
        assert torch.equal(y, exact)
        assert "forward was replaced" in summary_line(model, "up")


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_then_calibrate(how, tmp_path):
    """The scale is that of the model that was not offloaded, in the call and in the state_dict."""
    model, x = convert(net()), data()
    plain = copy.deepcopy(model)
    before = output(plain, x)
    offload(model, how, tmp_path)

    def fix(m: nn.Module) -> None:
        with torch.no_grad(), fp8.calibrate(m):
            m(x)

    if not noticed(partial(fix, model), "fp8.calibrate", (RuntimeError, ValueError)):
        assert "buffers" in how  # accelerate's list of buffers is older than the scale
        assert torch.equal(output(model, x), before)
        return
    fix(plain)
    for (name, ours), theirs in zip(
        converted_layers(model).items(), converted_layers(plain).values(), strict=True
    ):
        scale = ours.input_scale
        assert scale is not None, name
        if scale.device.type != "meta":
            assert torch.equal(scale, theirs.input_scale)
    assert torch.equal(output(model, x), output(plain, x))
    assert torch.equal(output(model, 0.5 * x), output(plain, 0.5 * x))
    remove_hook_from_submodules(model)
    for name, ours in converted_layers(model).items():
        if ours.weight.device.type != "meta":
            assert torch.equal(ours.input_scale, converted_layers(plain)[name].input_scale)


@pytest.mark.parametrize("how", OFFLOADS)
def test_calibrate_then_offload(how, tmp_path):
    model, x = convert(net()), data()
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    expected = output(copy.deepcopy(model), x)
    offload(model, how, tmp_path)
    for _ in range(2):
        assert torch.equal(output(model, x), expected)
    fp8.uncalibrate(model)
    plain = convert(net())
    assert torch.equal(output(model, 0.5 * x), output(plain, 0.5 * x))
    again = copy.deepcopy(x)
    with torch.no_grad(), fp8.calibrate(model):
        model(again)
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_then_revert(how, tmp_path):
    model, x = net(), data()
    exact = output(copy.deepcopy(model), x)
    offload(convert(model), how, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp8.revert(model)
    if isinstance(model.up, fp8.Linear):
        assert any("stays in FP8" in str(w.message) for w in caught)
        remove_hook_from_submodules(model)
        fp8.revert(model)
        assert not isinstance(model.up, fp8.Linear)
    else:
        assert torch.equal(output(model, x), exact)


@pytest.mark.parametrize("how", OFFLOADS)
def test_convert_after_hooks_are_gone(how, tmp_path):
    """Removed hooks leave the module's own forward on the instance, which is no replacement."""
    model, x = net(), data()
    expected = output(convert(copy.deepcopy(model)), x)
    offload(model, how, tmp_path)
    remove_hook_from_submodules(model)
    if any(t.is_meta for t in model.state_dict().values()):  # what was on disk stays there
        for name, value in net().state_dict().items():
            set_module_tensor_to_device(model, name, "cpu", value)
    convert(model)
    assert set(converted_layers(model)) == {"up", "down"}
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_inside_cached_weights(how, tmp_path):
    """The weight of each call is a new tensor, in new memory or in old."""
    model, x = convert(net()), data()
    expected = output(copy.deepcopy(model), x)
    offload(model, how, tmp_path)
    with fp8.cached_weights(model):
        for _ in range(3):
            assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_model_trains_its_inputs(buffers):
    """Backward through offloaded weights: the forward's values count."""
    model, x = net(), data()
    for p in model.parameters():
        p.requires_grad_(False)
    grads = []
    for m in (model, convert(copy.deepcopy(model))):
        accelerate.cpu_offload(m, execution_device="cpu", offload_buffers=buffers)
        leaf = x.clone().requires_grad_()
        m(leaf).square().mean().backward()
        grads.append(leaf.grad)
    assert relative(grads[1], grads[0]) < 0.2


def test_load_checkpoint_and_dispatch(tmp_path):
    """The way of large models: empty weights, converted or not, then the checkpoint."""
    model, x = convert(net()), data()
    expected = output(model, x)
    accelerate.Accelerator().save_model(net(), str(tmp_path))
    for first in ("convert", "load"):
        with accelerate.init_empty_weights():
            empty = Net().eval()
        if first == "convert":
            convert(empty)
        device_map = {"up": "cpu", "norm": "cpu", "down": "disk"}
        loaded = accelerate.load_checkpoint_and_dispatch(
            empty, str(tmp_path), device_map, offload_folder=str(tmp_path / first), force_hooks=True
        )
        if first == "load":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert(loaded)
        if any(isinstance(m, fp8.Linear) for m in loaded.modules()):
            assert torch.equal(output(loaded, x), expected), first


def test_load_checkpoint_of_a_calibrated_model(tmp_path, caplog):
    """The scales arrive in a converted model, or an error or warning says that they do not."""
    model, x = convert(net()), data()
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    expected = output(model, 0.5 * x)
    accelerate.Accelerator().save_model(model, str(tmp_path))
    with accelerate.init_empty_weights():
        empty = convert(Net().eval())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load = partial(accelerate.load_checkpoint_and_dispatch, empty, str(tmp_path), {"": "cpu"})
        if not noticed(load, "input_scale", (RuntimeError, ValueError, KeyError)):
            return
    if not torch.equal(output(empty, 0.5 * x), expected):
        said = [*(str(w.message) for w in caught), *caplog.messages]
        assert any("input_scale" in message for message in said)


@pytest.mark.parametrize("include_buffers", [False, True])
def test_init_empty_weights_then_convert(include_buffers):
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = convert(Net().eval())
    assert model.up.weight.device.type == "meta"
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        layer = fp8.Linear(64, 64, recipe="rowwise")
        assert layer.weight.device.type == "meta"
    source = net()
    for name, value in source.state_dict().items():
        set_module_tensor_to_device(model, name, "cpu", value)
    x = data()
    assert torch.equal(output(model, x), output(convert(source), x))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_init_empty_weights_of_a_mixture(family):
    with accelerate.init_empty_weights(include_buffers=True):
        model = make(family)
        convert(model)
    assert "rowwise" in fp8.summary(model)
    loaded = make(family)
    model.to_empty(device="cpu")
    model.load_state_dict(loaded.state_dict())
    for name, buffer in loaded.named_buffers():
        model.get_buffer(name).copy_(buffer)
    given = inputs(family)
    with torch.no_grad():
        ours, theirs = (m(**given).logits for m in (model, convert(loaded)))
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerator_trains_as_with_linear(precision, when):
    """prepare() wraps forward in autocast; accumulation; clipping; unwrapping; saving."""
    results, warned = [], []
    for in_fp8 in (False, True):
        torch.manual_seed(3)
        model = randomize(Net())
        accelerator = Accelerator(
            mixed_precision=precision, cpu=True, gradient_accumulation_steps=2
        )
        if in_fp8 and when == "before":
            convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        batches = torch.utils.data.DataLoader(torch.randn(32, 64), batch_size=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
            if in_fp8 and when == "after":
                convert(model)
            losses = []
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = model(batch).float().square().mean()
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(float(loss.detach()))
        results.append(losses)
        warned.append({str(w.message) for w in caught})
        unwrapped = accelerator.unwrap_model(model)
        assert isinstance(unwrapped.up, fp8.Linear) == in_fp8
        accelerator.free_memory()
    assert results[1] == pytest.approx(results[0], rel=0.05)
    assert warned[1] <= warned[0], warned[1] - warned[0]


@pytest.mark.parametrize("keep", [False, True])
def test_revert_after_unwrapping(keep):
    """A model that is one linear layer: unwrapped, its own forward stays on the instance."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    layer = convert(randomize(nn.Linear(64, 64)))
    x = data()
    exact = output(fp8.revert(copy.deepcopy(layer)), x)
    wrapped = accelerator.prepare(layer)
    assert relative(output(wrapped, x), exact) < 0.08
    layer = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=keep)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp8.revert(layer)
    if keep:  # still wrapped in autocast: that is said
        assert type(layer) is nn.Linear or caught
    else:
        assert type(layer) is nn.Linear
        assert torch.equal(output(layer, x), exact)
    accelerator.free_memory()


def test_accelerator_saves_and_loads_its_state(tmp_path):
    """A calibrated model, too: the scales come back."""
    accelerator = Accelerator(cpu=True)
    model = convert(net())
    x = data()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    with torch.no_grad(), fp8.calibrate(model):
        model(x)
    expected = output(model, 0.5 * x)
    accelerator.save_state(str(tmp_path))
    fp8.uncalibrate(model)
    with torch.no_grad():
        model.up.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(output(model, 0.5 * x), expected)
    accelerator.free_memory()


def test_a_hook_on_one_layer_only():
    model, copied = twins(net())
    add_hook_to_module(copied.up, AlignDevicesHook(execution_device="cpu", offload=True))
    x = data()
    run = lambda m: m(x).square().mean()  # noqa: E731
    exact = step(model, run)
    fp8_loss = run(convert(copy.deepcopy(model))).detach()
    assert torch.equal(run(copied).detach(), fp8_loss)
    assert_close(step(convert(copy.deepcopy(model)), run), exact)
