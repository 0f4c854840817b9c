"""Data parallelism: DistributedDataParallel and FSDP2 (`fully_shard`), of two processes, against
copies of the model in one process that take the two halves of the batch. With a single GPU there is
one process on it: its collectives move nothing, but weights are gathered and freed all the same."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fp8

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo"
)
SHAPE = (48, 128)  # of a process's part of the batch
STEPS = 20  # past the window of the recipe `delayed`


def size(device: str) -> int:
    return 2 if device.startswith("cpu") else min(2, torch.cuda.device_count())


def in_processes(work, device: str, folder: Path) -> None:
    """work(rank, device) in each. What one raises fails the test."""
    mp.spawn(_join, (work, device, str(folder / "store")), nprocs=size(device))


def _join(rank: int, work, device: str, store: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size(device),
    )
    work(rank, f"cuda:{rank}" if device == "cuda" else "cpu")
    dist.barrier()
    # At an orderly end gloo's threads abort the process now and then, also without this library.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def model(recipe: str, dtype: torch.dtype, device: str) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 64, bias=False))
    return fp8.convert(layers.to(device, dtype), recipe, filter=lambda *_: True)


def parts(step: int, device: str) -> list[torch.Tensor]:
    """Each process knows all, of different magnitudes, so of different scales."""
    torch.manual_seed(step)
    return [
        (torch.randn(SHAPE) * 2.0 ** (step % 3 + 4 * part)).to(device, torch.bfloat16)
        for part in range(size(device))
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(rank: int, device: str, recipe: str, parallel: nn.Module, masters: torch.dtype) -> None:
    """Steps of `parallel`, whose parameters are of the dtype `masters`, beside those of a copy for
    each part, in bfloat16, whose mean gradient updates the parameters that they share."""
    shared = list(model(recipe, masters, device).parameters())
    copies = [model(recipe, torch.bfloat16, device) for _ in range(size(device))]
    optimizer = torch.optim.SGD(parallel.parameters(), lr=2.0**-10)
    for step in range(STEPS if recipe == "delayed" else 3):
        inputs = parts(step, device)
        outputs = []
        if isinstance(parallel, DistributedDataParallel):  # it broadcasts buffers: the histories
            for copied in copies[1:]:
                for buffer, first in zip(copied.buffers(), copies[0].buffers(), strict=True):
                    buffer.copy_(first)
        for copied, x in zip(copies, inputs, strict=True):
            with torch.no_grad():
                for p, of_copy in zip(shared, copied.parameters(), strict=True):
                    of_copy.copy_(p)
            copied.zero_grad()
            outputs.append(copied(x))
            outputs[-1].float().square().mean().backward()
        y = parallel(inputs[rank])
        assert_same_bits(y.detach(), outputs[rank].detach(), f"y of step {step}")
        y.float().square().mean().backward()
        of_copies = zip(*(copied.parameters() for copied in copies), strict=True)
        for p, actual, of_each in zip(shared, parallel.parameters(), of_copies, strict=True):
            mean = sum(one.grad.to(masters) for one in of_each) / size(device)
            assert_same_bits(whole(actual.grad), mean, f"a gradient of step {step}")
            with torch.no_grad():
                p.sub_(mean, alpha=2.0**-10)
        optimizer.step()
        optimizer.zero_grad()


def _replicated(rank: int, device: str) -> None:
    for recipe in fp8.RECIPES:
        ids = [rank] if device != "cpu" else None
        parallel = DistributedDataParallel(model(recipe, torch.bfloat16, device), device_ids=ids)
        train(rank, device, recipe, parallel, torch.bfloat16)


def mesh_of(device: str) -> DeviceMesh:
    return init_device_mesh(device.partition(":")[0], (size(device),))


def _shard(layers: nn.Sequential, **options) -> nn.Module:
    """Each layer by itself: its weight is gone between forward and backward."""
    mesh = mesh_of(next(layers.parameters()).device.type)
    for layer in (layers[0], layers[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(layers, mesh=mesh, **options)


def _sharded(rank: int, device: str) -> None:
    for recipe in fp8.RECIPES:
        parallel = _shard(model(recipe, torch.bfloat16, device))
        train(rank, device, recipe, parallel, torch.bfloat16)
    assert "tensorwise (a subclass of fp8.Linear: FSDPLinear)" in fp8.summary(
        _shard(model("tensorwise", torch.bfloat16, device))
    )


def _sharded_masters(rank: int, device: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for recipe in fp8.RECIPES:
        parallel = _shard(model(recipe, torch.float32, device), mp_policy=policy)
        train(rank, device, recipe, parallel, torch.float32)


@pytest.mark.parametrize("work", [_replicated, _sharded, _sharded_masters])
def test_processes_train_as_one_would(work, device, tmp_path):
    in_processes(work, device, tmp_path)


def _around(rank: int, device: str) -> None:
    """What else works on a model that is sharded already."""
    layers = _shard(model("tensorwise", torch.bfloat16, device))
    x = parts(0, device)[rank]
    with torch.no_grad():
        expected = model("tensorwise", torch.bfloat16, device)(x)
    with fp8.cached_weights(layers):  # no gain: what a layer multiplies with is another tensor
        for _ in range(2):
            y = layers(x)
            assert_same_bits(y.detach(), expected, "y in cached_weights")
            y.sum().backward()
    with fp8.calibrate(layers):
        layers(x)
    assert layers[0].input_scale is not None
    fp8.uncalibrate(layers)
    with torch.no_grad():
        assert_same_bits(torch.compile(layers, backend="aot_eager")(x), expected, "compiled")

    late = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 64)).to(device)
    reason = "a subclass of nn.Linear: FSDPLinear; convert before fully_shard"
    with pytest.warns(UserWarning, match="converted nothing"):
        fp8.convert(_shard(late), filter=lambda *_: True)
    assert fp8.summary(late).count(reason) == 2
    # Where the root alone is sharded its linears are what they were, and are converted.
    root = model("rowwise", torch.bfloat16, device)
    plain = fp8.revert(copy.deepcopy(root))
    fully_shard(plain, mesh=mesh_of(device))
    fp8.convert(plain, "rowwise", filter=lambda *_: True)
    assert_same_bits(plain(x).detach(), root(x).detach(), "converted late")


def test_what_goes_with_a_sharded_model(device, tmp_path):
    in_processes(_around, device, tmp_path)
