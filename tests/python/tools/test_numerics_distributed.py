"""fp8.numerics of a model that FSDP2 or DistributedDataParallel has wrapped."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from watched_models import batch, blocks, by_operand, step, watched_step

import fp8

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo"
)


def _sharded(model):
    """fp32 shards, gathered in bf16: in a forward each weight is another parameter."""
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in (model.first, model.second):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _work(rank: int, wrapper: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = blocks("rowwise", dtype=torch.float32 if wrapper == "fsdp" else torch.bfloat16)
    plain = copy.deepcopy(model).to(torch.bfloat16)
    expected = by_operand(watched_step(plain, batch()))
    wrapped = _sharded(model) if wrapper == "fsdp" else DistributedDataParallel(model)
    with fp8.numerics(model) as found:
        step(wrapped, batch())
    got = by_operand(found)
    assert got.keys() == expected.keys()
    assert all(got[key] == expected[key] for key in got if key[1] != "dy")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_numerics_of_a_wrapped_model(wrapper, tmp_path: Path):
    mp.spawn(_work, (wrapper, str(tmp_path / "store")), nprocs=2)
