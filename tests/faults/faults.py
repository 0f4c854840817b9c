"""Deliberate faults, and the test that must notice each: `make test-faults` runs them (run.py)."""

from __future__ import annotations

from fault import Fault
from faults_convert import CONVERT
from faults_cpu import CPU
from faults_cuda import CUDA
from faults_experts import FROZEN_EXPERTS
from faults_frozen import FROZEN
from faults_grouped import GROUPS
from faults_host import HOST
from faults_inference import INFERENCE
from faults_linear_frozen import LINEAR_FROZEN
from faults_merged import SIBLINGS
from faults_mlp import MLPS
from faults_norm import NORM
from faults_numerics import NUMERICS
from faults_python import PYTHON
from faults_residual import RESIDUALS
from faults_rope import ROPE
from faults_torch import TORCH

FAULTS: list[Fault] = [
    *(*PYTHON, *CONVERT, *TORCH, *HOST, *CPU),
    *(*NORM, *RESIDUALS, *ROPE, *MLPS, *SIBLINGS, *FROZEN, *LINEAR_FROZEN),
    *(*FROZEN_EXPERTS, *GROUPS, *NUMERICS, *CUDA, *INFERENCE),
]
