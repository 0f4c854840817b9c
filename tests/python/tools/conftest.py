"""Registers the operators before the tests of this folder run, which are small: on one thread."""

from __future__ import annotations

import pytest
import torch

import fp8  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
