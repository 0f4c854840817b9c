"""DDP and FSDP2: two processes, each with a row of the batch, beside one process that has both.

    python tests/sweep/processes.py WRAPPER FAMILY RANK STORE     # what run_processes starts twice

A CPU and gloo: what is asked is that wrappers and fused forwards go together. On each rank, loss is
that of its row, and every gradient the mean of those that a composed model has of the two rows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = {"DDP": "llama", "FSDP2": "qwen3"}
RANKS = 2
LIMIT_S = 300


def run_processes(wrapper: str, family: str) -> str:
    """What went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, wrapper, family]
        started = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/store"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        errors = []
        for process in started:
            try:
                _, text = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                text = f"no end after {LIMIT_S} s"
            if process.returncode != 0:
                process.kill()
                lines = [line for line in text.splitlines() if line.strip()]
                errors.append(lines[-1] if lines else f"status {process.returncode}")
    return "; ".join(errors)


def _rows(given: dict[str, Any], rank: int) -> dict[str, Any]:
    return {name: tensor[rank : rank + 1] for name, tensor in given.items()}


def _wrapped(model: Any, wrapper: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if wrapper == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _rank(wrapper: str, name: str, rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist
    from families import inputs, make, named
    from steps import convert, distance, run
    from variants import CLOSE

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    (family,) = named([name])
    plain = make(family, torch.float32)
    given = inputs(family, plain)
    fused, composed = (convert(plain, "rowwise:power_of_two", fuse) for fuse in (True, False))
    each = [run(composed, _rows(given, r)) for r in range(RANKS)]
    mean = {n: sum(s.grads[n] for s in each) / RANKS for n in each[0].grads}
    found = run(_wrapped(fused, wrapper), _rows(given, rank))
    grads = {n.removeprefix("module."): g for n, g in found.grads.items()}
    grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    apart = distance(found._replace(grads=grads), each[rank]._replace(grads=mean))
    if not (apart.loss < CLOSE and apart.whole < CLOSE):
        raise AssertionError(str(apart))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / folder) for folder in ("tests/sweep", "tests/compat", "benchmarks")]
    from runs import import_fp8

    import_fp8()
    _rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
