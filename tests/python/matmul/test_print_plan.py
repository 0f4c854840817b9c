"""FP8_PRINT_PLAN=1: one line on stderr for each distinct problem; without it, none."""

import os
import re
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
fp8.ops.quantize_tensorwise(x, scale=torch.ones((), device={device!r}))
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


def test_print_plan_has_one_line_per_matmul(device):
    first, second = [line for line in lines(device, "1") if " matmul " in line]
    place = "cuda:0" if device == "cuda" else "cpu"
    for line in (first, second):
        assert line.startswith(f"fp8 plan: {place} matmul m=8 n=32 k=64 ")
        assert " workspace=" in line
        assert " launches=" in line
    assert " tensorwise " in first
    assert " rowwise " in second


def test_print_plan_has_one_line_per_quantization(device):
    """Each operand of the two products, and one with a static scale."""
    found = [line for line in lines(device, "1") if " quantize " in line]
    place = "cuda:0" if device == "cuda" else "cpu"
    assert all(line.startswith(f"fp8 plan: {place} quantize rows=") for line in found)
    problems = [re.search(r"rows=(\d+) .* (\w+) scale=(\w+) makes=data", line) for line in found]
    assert [problem and problem.groups() for problem in problems] == [
        *[
            (rows, recipe, "dynamic")
            for recipe in ("tensorwise", "rowwise")
            for rows in ("8", "32")
        ],
        ("8", "tensorwise", "static"),
    ]
    how = [line.partition(" | ")[2].rpartition(" workspace=")[0] for line in found]
    if device == "cuda":  # the launches, in order
        names = [re.findall(r"(?:^|\+ )(\w+)", text) for text in how]
        assert names == [["statistics", "cast"]] * 2 + [["rowwise"]] * 2 + [["cast"]]
    else:
        assert how == ["reference"] * 5


@pytest.mark.parametrize("value", [None, "0", ""])
def test_print_plan_is_off_without_the_variable(value):
    assert lines("cpu", value) == []
