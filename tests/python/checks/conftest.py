"""Puts the folders of `make fuzz`, `soak`, `sweep` and their results on the path, as they do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("tests/fuzz", "tests/soak", "tests/sweep", "tests/compat", "benchmarks")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]


@pytest.fixture
def one_thread():
    """Small problems are faster so."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
