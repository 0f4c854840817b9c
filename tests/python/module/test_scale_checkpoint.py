"""Static scales through torch.distributed.checkpoint: they arrive where the weights do."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import fp8
from fp8.nn import _distributed_checkpoint

X = torch.linspace(-2, 3, 4 * 32).reshape(4, 32)


def model(seed: int, recipe: str = "tensorwise") -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    return fp8.convert(layers, recipe, filter=lambda module, name: True)


def calibrated(seed: int = 0) -> nn.Sequential:
    layers = model(seed)
    with torch.no_grad(), fp8.calibrate(layers):
        layers(X)
    return layers


def assert_same(fresh: nn.Module, saved: nn.Module) -> None:
    for ours, theirs in zip(fresh.modules(), saved.modules(), strict=True):
        if isinstance(theirs, fp8.Linear):
            assert torch.equal(ours.input_scale, theirs.input_scale)
            assert ours.input_scale.dtype == torch.float32
    assert torch.equal(fresh(X), saved(X))


@pytest.fixture
def saved(tmp_path):
    source = calibrated()
    dcp.save(source.state_dict(), checkpoint_id=tmp_path / "plain")
    dcp.save({"model": source.state_dict()}, checkpoint_id=tmp_path / "nested")
    return source


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_checkpoint_into_a_fresh_model(saved, tmp_path):
    """Keys stay those of nn.Linear; in place, the weights arrive by reading alone, and so do the
    scales."""
    fresh = model(1)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    assert list(state) == list(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).state_dict()
    )
    assert_same(fresh, saved)
    fresh.load_state_dict(state)
    assert_same(fresh, saved)


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoint_through_copies(saved, tmp_path, assign):
    state = {key: torch.empty_like(value) for key, value in model(1).state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=tmp_path / "nested")
    for seed in (1, 2):
        fresh = model(seed)
        fresh.load_state_dict(state, assign=assign)
        assert_same(fresh, saved)
    source_keys = [key for key in saved.state_dict() if "scale" not in key]
    assert list(state) == source_keys


def test_checkpoint_into_modules_as_stateful(saved, tmp_path):
    fresh = model(1)
    dcp.load({"model": fresh}, checkpoint_id=tmp_path / "nested")
    assert_same(fresh, saved)


OPTIONS = [
    StateDictOptions(),
    StateDictOptions(cpu_offload=True),
    StateDictOptions(full_state_dict=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
]


class App:
    """A Stateful, as PyTorch's tutorial has it."""

    def __init__(self, model, options):
        self.model, self.options = model, options

    def state_dict(self):
        return {"model": get_model_state_dict(self.model, options=self.options)}

    def load_state_dict(self, state):
        set_model_state_dict(self.model, state["model"], options=self.options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoint_of_state_dict_functions(process_group, tmp_path, sharded, options):
    source, fresh = calibrated(), model(1)
    if sharded:
        dist.fsdp.fully_shard(source)
        dist.fsdp.fully_shard(fresh)
    dcp.save({"app": App(source, options)}, checkpoint_id=tmp_path / "app")
    dcp.load({"app": App(fresh, options)}, checkpoint_id=tmp_path / "app")
    assert_same(fresh, source)


def test_checkpoint_with_an_optimizer(tmp_path):
    source, fresh = calibrated(), model(1)
    states = []
    for layers in (source, fresh):
        optimizer = torch.optim.AdamW(layers.parameters())
        layers(X).sum().backward()
        optimizer.step()
        states.append((optimizer, *get_state_dict(layers, optimizer)))
    dcp.save({"m": states[0][1], "o": states[0][2]}, checkpoint_id=tmp_path / "both")
    optimizer, weights, moments = states[1]
    dcp.load({"m": weights, "o": moments}, checkpoint_id=tmp_path / "both")
    set_state_dict(fresh, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert_same(fresh, source)


def test_checkpoint_into_a_model_on_meta(saved, tmp_path, process_group):
    with torch.device("meta"):
        fresh = model(1)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    fresh.load_state_dict(state, assign=True)
    assert_same(fresh, saved)


def test_checkpoint_with_a_planner_of_ones_own(saved, tmp_path):
    class Planner(dcp.DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            super().set_up_planner(state_dict, metadata, is_coordinator)

        def commit_tensor(self, read_item, tensor):
            committed.append(read_item.dest_index.fqn)

    committed, planner = [], Planner()
    for seed in (1, 2):  # used twice
        fresh = model(seed)
        state = fresh.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "plain", planner=planner)
        fresh.load_state_dict(state)
        assert_same(fresh, saved)
    assert committed.count("0.weight") == 2


def test_checkpoint_and_models_that_take_no_scale(saved, tmp_path):
    """nn.Linear, other recipes, checkpoints without scales: as if scales did not exist."""
    plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    for other in (plain, model(1, "rowwise"), model(1, "blockwise")):
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "plain")
        other.load_state_dict(state)
        assert list(other.buffers()) == []
        assert torch.equal(other[0].weight, saved[0].weight)
    dcp.save(model(3).state_dict(), checkpoint_id=tmp_path / "dynamic")
    fresh = model(1)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dynamic")
    fresh.load_state_dict(state)
    assert list(fresh.buffers()) == []


def test_checkpoint_into_a_calibrated_model(saved, tmp_path):
    fresh = calibrated(1)
    for layer in (fresh[0], fresh[2]):
        layer.input_scale.fill_(7.0)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    assert_same(fresh, saved)
    fresh.load_state_dict(state)
    assert_same(fresh, saved)


def test_checkpoint_read_later_without_scales_forgets_them(saved, tmp_path):
    dcp.save(model(3).state_dict(), checkpoint_id=tmp_path / "dynamic")
    state = {key: value.clone() for key, value in model(1).state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    dcp.load(state, checkpoint_id=tmp_path / "dynamic")
    fresh = model(1)
    fresh.load_state_dict(state)
    assert list(fresh.buffers()) == []


def test_checkpoint_that_fails_changes_no_scale(saved, tmp_path):
    fresh = model(1)
    state = fresh.state_dict() | {"missing": torch.zeros(2)}
    with pytest.raises(BaseException, match="missing"):  # an exception that is no Exception
        dcp.load(state, checkpoint_id=tmp_path / "plain")
    assert list(fresh.buffers()) == []


def test_checkpoint_keeps_nothing_alive(saved, tmp_path):
    fresh = model(1)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    del fresh, state
    gc.collect()
    assert len(_distributed_checkpoint._scales) == 0


def test_checkpoint_module_may_be_imported_after_the_state_dict(saved, tmp_path):
    """`import fp8` does not import it; a state_dict that a scale may be missing from does."""
    program = f"""
        import sys, torch, fp8
        assert "torch.distributed.checkpoint" not in sys.modules
        layer = fp8.convert(torch.nn.Sequential(torch.nn.Linear(32, 32)), filter=lambda *_: True)
        state = layer.state_dict()
        import torch.distributed.checkpoint as dcp
        dcp.load(state, checkpoint_id={str(tmp_path / "plain")!r})
        print(layer[0].input_scale.item())
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert float(result.stdout) == saved[0].input_scale.item()


def test_state_dict_that_is_not_strict_takes_scales():
    source, fresh = calibrated(), model(1)
    fresh.load_state_dict(source.state_dict(), strict=False)
    assert_same(fresh, source)


def test_safetensors_take_scales(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, fresh = calibrated(), model(1)
    safetensors.save_model(source, str(tmp_path / "model.safetensors"))
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    assert_same(fresh, source)
