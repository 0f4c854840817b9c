"""make fuzz: it finds planted faults in every family, makes them small, and can repeat them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import case_fields
import case_tensors
import fuzz
import fuzz_grouped
import fuzz_linear
import fuzz_matmul
import fuzz_moe
import fuzz_quantize
import pytest
import torch
from case_fields import Choice, Extent, Family, Listed, Seed

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in fuzz.FAMILIES if name != "delayed"])
def test_fuzz_finds_nothing_in_the_first_cases(name):
    family = fuzz.FAMILIES[name]
    for index in range(60):
        case = family.draw(random.Random(f"17/{index}"))
        error = case_fields.failure_of(lambda c: family.check(c, "cpu"), case)
        assert error is None, f"{error}\n{fuzz.program(name, case, 'cpu')}"


def test_fuzz_finds_nothing_in_delayed_without_jumps():
    """With them it is a matter of the library."""
    family = fuzz.FAMILIES["delayed"]
    for index in range(20):
        case = family.draw(random.Random(f"17/{index}")) | {"jumps": [[0, 0, 0]] * 4}
        family.check(case, "cpu")


class Faulty:
    """torch.ops.fp8 with one operator that is wrong."""

    def __init__(self, name, wrong):
        self.name, self.wrong = name, wrong

    def __getattr__(self, name):
        op = getattr(torch.ops.fp8, name)
        return op if name != self.name else lambda *a, **k: self.wrong(op, *a, **k)


def _last_column(op, *args, **kwargs):
    """Of a wide result the last column is lost."""
    y = op(*args, **kwargs)
    if y.shape[-1] <= 16:
        return y
    return torch.cat([y[..., :-1], torch.zeros_like(y[..., -1:])], -1)


def _one_code(op, x, *args, **kwargs):
    """Of many rows one code is the next one."""
    data, *rest = op(x, *args, **kwargs)
    codes = data.view(torch.uint8)
    if codes.numel() > 40 and codes.dim() == 2:
        codes[-1, 0] ^= 1
    return data, *rest


def _other_order(op, x, index, weights, *args, **kwargs):
    """Weights go to the wrong experts."""
    return op(x, index, weights.flip(-1), *args, **kwargs)


def _stale_bias(op, x, weight, bias=None, *args, **kwargs):
    return op(x, weight, None if x.shape[-1] > 64 else bias, *args, **kwargs)


def _no_gradient_of_last_row(op, x, weight, *args, **kwargs):
    keep = torch.ones(x.shape[0], 1, dtype=x.dtype)
    keep[-1:] = 0
    return op(x * keep + (x * (1 - keep)).detach(), weight, *args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name", "wrong", "small"),
    [
        (fuzz_quantize, "quantize_rowwise", _one_code, {"dtype": "bfloat16", "data": 0}),
        (fuzz_matmul, "scaled_mm", _last_column, {"k": 1, "n": 17, "m": 1}),
        (fuzz_linear, "fused_linear", _last_column, {"lead": [], "n": 17, "wants": ""}),
        (fuzz_linear, "fused_linear", _stale_bias, {"k": 65, "n": 1, "bias": True}),
        (fuzz_grouped, "grouped_linear", _last_column, {"k": 1, "n": 17, "bias": False}),
        (fuzz_grouped, "grouped_linear", _no_gradient_of_last_row, {"k": 1, "n": 1}),
        (fuzz_moe, "moe_experts", _other_order, {"tokens": 1, "top_k": 2}),
    ],
    ids=["a code", "a column of scaled_mm", "a column", "a bias", "of groups", "dx", "routing"],
)
def test_fuzz_finds_and_shrinks_a_planted_fault(monkeypatch, tmp_path, module, name, wrong, small):
    monkeypatch.setattr(module, "OPS", Faulty(name, wrong))
    monkeypatch.setattr(fuzz, "LAST_CASE", tmp_path / "case.txt")
    (family,) = [
        f
        for f in fuzz.FAMILIES.values()
        if vars(module).get(f.name.upper()) is f and f.name != "dequantize"
    ]
    run = fuzz.Run(3, [family], ["cpu"])
    for index in range(400):
        run.case(index)
        if run.failures:
            break
    (failure,) = run.failures.values()
    found = {}
    program = failure["program"].replace("import fuzz\n", "").replace("fuzz.replay", "found")
    exec(program, {"found": lambda family, case, device: found.update(case)})
    assert {key: found[key] for key in small} == small
    assert failure["seed"] == 3
    again = fuzz.Run(3, [family], ["cpu"])  # the seed and the number name it
    again.case(failure["case"])
    assert [f["error"] for f in again.failures.values()] == [failure["error"]]


def test_shrink_keeps_the_kind_of_failure():
    fields = {"rows": Listed(Extent(0, 100), 0, 9), "kind": Choice("a", "b", "c"), "data": Seed()}

    def check(case):
        if sum(case["rows"]) > 50 and case["kind"] != "a":
            raise AssertionError(f"sum: {case}")
        if case["rows"]:
            raise AssertionError(f"another: {case}")

    family = Family("any", fields, lambda case, device: check(case))
    case = {"rows": [3, 40, 0, 77, 12], "kind": "c", "data": 812}
    small = case_fields.shrink(case, family, check, 10)
    assert small == {"rows": [51], "kind": "b", "data": 0}


@pytest.mark.parametrize("layout", case_tensors.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,), (0, 4), (1, 1), ()])
def test_layouts_hold_the_values(layout, shape):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    made = case_tensors.laid_out(x, layout)
    assert made.shape == x.shape
    if layout in case_tensors.DENSE or not x.numel():
        assert torch.equal(made, x)
    if layout == "transposed" and shape == (3, 5):
        assert made.stride() == (1, 3)
    if layout == "overlapping" and shape == (3, 5):
        assert made.stride() == (1, 1)


def test_fuzz_program_prints_the_seed_and_fails_with_a_runnable_case(tmp_path):
    """The whole program, with a fault planted in what it imports."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'python')!r}]\n"
        "if os.environ.get('PLANT'):\n"
        "    import fp8, torch\n"
        "    real = torch.ops.fp8.dequantize\n"
        "    torch.ops.fp8.dequantize = lambda d, s, t: real(d, s, t) * 2\n"
    )
    command = [sys.executable, str(ROOT / "tests/fuzz/fuzz.py"), "--seconds", "3", "--seed", "5"]
    command += ["--ops", "dequantize", "--output", str(tmp_path)]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    good, bad = (
        subprocess.run(
            command, env=environment | plant, capture_output=True, text=True, check=False
        )
        for plant in ({}, {"PLANT": "1"})
    )
    assert good.returncode == 0, good.stdout + good.stderr
    assert "seed 5" in good.stdout.splitlines()[0]
    assert bad.returncode == 1
    assert "FAILED seed 5, case " in bad.stdout
    status = json.loads((tmp_path / "status_fuzz_cpu.json").read_text())
    assert not status["passed"]
    assert status["header"]["seed"] == 5
    failure = status["failures"][0]
    assert failure["program"] in bad.stdout
    for plant, code in (({}, 0), ({"PLANT": "1"}, 1)):  # run from the root, as it says
        ran = subprocess.run(
            [sys.executable, "-c", failure["program"]],
            env=environment | plant,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
        assert not code or failure["error"].splitlines()[0] in ran.stderr
