"""Frozen layers in DistributedDataParallel and FSDP2, of two processes on the CPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fp8

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo"
)


def model(recipe: str) -> nn.Sequential:
    """A frozen layer between two that train."""
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(64, 160), nn.Linear(160, 144), nn.Linear(144, 32))
    return fp8.freeze(layers, recipe, filter=lambda module, name: name == "1")


def join(rank: int, work, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work()
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort the process now and then


def shard() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for recipe in ("tensorwise", "rowwise", "blockwise"):
        alone, sharded = model(recipe), model(recipe)
        for layer in sharded:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        x = torch.randn(5, 64)
        expected = alone(x)
        y = sharded(x)
        assert_same_bits(y, expected)
        assert sharded[1].weight.dtype == torch.float8_e4m3fn
        y.sum().backward()
        expected.sum().backward()
        grad = sharded[0].weight.grad.full_tensor()
        torch.testing.assert_close(grad, alone[0].weight.grad, rtol=1e-5, atol=1e-5)


def replicate() -> None:
    frozen = model("rowwise")
    codes = [f"1.{name}" for name, _ in frozen[1].named_parameters() if name != "bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(frozen, codes)
    parallel = DistributedDataParallel(frozen)
    parallel(torch.randn(5, 64)).sum().backward()
    assert frozen[0].weight.grad is not None


@pytest.mark.parametrize("work", [shard, replicate])
def test_frozen_layers_of_two_processes(work, tmp_path):
    mp.spawn(join, (work, str(tmp_path / "store")), nprocs=2)
