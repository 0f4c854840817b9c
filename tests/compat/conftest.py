"""Tests against the packages of requirements-compat.txt: `make test-compat` installs and runs them.

Nothing is downloaded while they run: all models are small ones with random weights.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # for models this small, more threads are slower


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    """A fixed seed, and torch's defaults again after a test that changes them."""
    torch.manual_seed(20)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.__future__.set_swap_module_params_on_conversion(False)
    state = sys.modules.get("accelerate.state")
    if state is not None:  # Trainer makes one, too
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
