"""A training step of Llama-3-8B's layers under FSDP2: fp32 parameters in shards, gathered in bf16.

bench_model.py's step with a batch for each GPU, every decoder layer and the model sharded over two
GPUs. bf16 in eager mode, compiled, fp8.convert, and torchao with each
layer compiled, one after the other, each on a model built anew with the same weights; bf16 last
again. Times are rank 0's, whose steps wait for the others in every collective.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
from pathlib import Path

import memory
import model_variants
import models
import peers
import tables
import timing
import torch
import torch.distributed as dist
from bench_model import WARMUP
from model_cases import LLAMA, ModelCase
from model_variants import LAST, VARIANTS
from runs import Row, main
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

NAMES = (
    *("bf16", "fp8 tensorwise", "fp8 delayed", "fp8 rowwise"),
    *("torchao tensorwise compiled", "bf16 compiled"),
)
CASE = ModelCase("llama", LLAMA, NAMES)
GPUS = 2


def sharded(model: nn.Module, world: int) -> nn.Module:
    mesh = init_device_mesh("cuda", (world,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for layer in models.decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def measure_variant(peer: peers.Peer, options: argparse.Namespace, world: int) -> Row:
    others = memory.resident()
    model = peer.make(models.build(CASE).float())
    calls = models.calls(sharded(model, world), CASE, peer.context)
    losses = [calls.step() for _ in range(max(WARMUP, peer.settle))]
    peak = memory.peak(calls.step) - others
    dist.barrier()
    step = timing.in_a_row(calls.step, options.repeats or (4 if options.quick else 8))
    return {
        **CASE.row(),
        "gpus": world,
        "variant": peer.name,
        "step_us": step.as_dict(),
        "peak_gib": peak / memory.GIB,
        "loss": float(losses[WARMUP - 1]),
    }


def rank(index: int, world: int, port: int, options: argparse.Namespace, path: str) -> None:
    """One process: all variants in turn. Rank 0 writes the rows after each."""
    torch.cuda.set_device(index)
    address = f"tcp://127.0.0.1:{port}"
    device = torch.device("cuda", index)
    dist.init_process_group("nccl", address, rank=index, world_size=world, device_id=device)
    found = peers.gather(*((name, VARIANTS[name]) for name in NAMES))
    found.found.append(peers.Peer(LAST, lambda model: model))
    rows: list[Row] = []
    for peer in found.found:
        try:
            row = measure_variant(peer, options, world)
        except Exception as error:  # a peer that fails is named; all ranks fail alike
            if model_variants.must_work(peer.name):
                raise
            found.skipped[peer.name] = peers.reason(error)
            continue
        finally:
            memory.free()
        model_variants.add_compared(rows, row)
        if index == 0:
            Path(path).write_text(json.dumps([rows, found.skipped]))
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path = Path(folder) / "rows.json"
        plain = argparse.Namespace(repeats=options.repeats, quick=options.quick)
        multiprocessing.spawn(rank, (GPUS, port, plain, str(path)), nprocs=GPUS)
        rows, skipped = json.loads(path.read_text())
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = ["variant", "step ms", "x bf16", "spread", "peak GiB", "x bf16", "loss"]
    lines = [
        [
            row["variant"],
            row["step_us"]["median"] / 1e3,
            tables.ratio(row["speedup"]),
            tables.spread(row["step_us"]),
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
            row["loss"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, help="timed steps per variant")


if __name__ == "__main__":
    if 0 < torch.cuda.device_count() < GPUS:  # no failure of `make bench`, which runs all
        print(f"fsdp: left out: needs {GPUS} GPUs, this machine has one")
        sys.exit(0)
    sys.exit(main("fsdp", __doc__.splitlines()[0], measure, table, arguments))
