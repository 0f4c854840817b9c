"""The kernel for few rows (decode_cases.py), in a process that has FP8_DECODE=1; and that without
the variable a frozen layer's product is the one of other layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from frozen_reference import problem
from reference import assert_same_bits

import fp8

CASES = Path(__file__).with_name("decode_cases.py")
SECONDS = 400


@pytest.mark.gpu
def test_decode_cases():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for compute capability 9.0")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=5"]
    found = subprocess.run(
        [*command, str(CASES)],
        env=dict(os.environ, FP8_DECODE="1"),
        cwd=CASES.parents[3],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("FP8_DECODE") == "1", reason="the kernel was asked for")
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_without_the_variable_few_rows_have_the_bits_of_fused_linear(recipe):
    p = problem(((4,), 1024, 1152), recipe, device="cuda", bias=True)
    y = fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias)
    assert_same_bits(y, fp8.ops.fused_linear(p.x, p.weight, p.bias, recipe))
