"""FP8_PRINT_PLAN=1: one line on stderr per distinct matmul problem; without it, none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fp8

PROGRAM = """
import torch, fp8
x, w = torch.randn(8, 64, device={device!r}), torch.randn(32, 64, device={device!r})
for _ in range(3):
    fp8.ops.fused_linear(x, w)
fp8.ops.fused_linear(x, w, recipe="rowwise")
"""


def lines(device: str, value: str | None) -> list[str]:
    environment = {key: text for key, text in os.environ.items() if key != "FP8_PRINT_PLAN"}
    environment["PYTHONPATH"] = str(Path(fp8.__file__).parents[1])
    if value is not None:
        environment["FP8_PRINT_PLAN"] = value
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(device=device)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return [line for line in result.stderr.splitlines() if line.startswith("fp8 plan:")]


def test_print_plan_has_one_line_per_problem(device):
    first, second = lines(device, "1")
    place = "cuda:0" if device == "cuda" else "cpu"
    for line in (first, second):
        assert line.startswith(f"fp8 plan: {place} matmul m=8 n=32 k=64 ")
        assert " workspace=" in line
        assert " launches=" in line
    assert " tensorwise " in first
    assert " rowwise " in second


@pytest.mark.parametrize("value", [None, "0", ""])
def test_print_plan_is_off_without_the_variable(value):
    assert lines("cpu", value) == []
