"""Runs a program of this folder as two processes that train together, over gloo on the CPU.

program.py RANK FOLDER     the folder has a file for the process group, and takes the results
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORLD = 2


def run(program: str, folder: Path) -> list[Any]:
    """What each process gave to `answer`."""
    path = str(Path(__file__).with_name(program))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", path, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"answer-{rank}.pt") for rank in range(WORLD)]


def join() -> int:
    """Join the process group; the rank. Called by the program."""
    rank, folder = int(sys.argv[1]), sys.argv[2]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD
    )
    return rank


def answer(value: Any) -> None:
    """Hand over tensors, numbers, strings and containers of these."""
    torch.save(value, f"{sys.argv[2]}/answer-{sys.argv[1]}.pt")
