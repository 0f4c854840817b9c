"""What operator tests share: `device` ("cpu", and "cuda" where there is a GPU) and fixed seeds.

Skipping GPU tests, and counting those skipped, is in ../conftest.py.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20)  # every device


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What autotune measures here is nobody else's. Programs that tests start inherit it."""
    os.environ["FP8_CACHE_DIR"] = str(tmp_path_factory.mktemp("fp8-cache"))


@pytest.fixture
def poisoned_memory():
    """New tensors are born as NaN (fp8: code 0x7F), so an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
