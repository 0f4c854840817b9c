"""Autotune on a GPU: the same values within the same bounds, what is remembered, what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import bounds
import operands
import pytest
import torch
from operands import GRANULARITIES, OPS
from reference import assert_same_bits

import fp8
from fp8._native import loader as _loader
from fp8.tools._autotune import AutotuneReport, _measuring

pytestmark = pytest.mark.gpu
RECIPES = tuple(fp8.RECIPES)
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def file() -> Path:
    return Path(_loader.native().autotune_file(torch.cuda.get_device_name()))


def tuned() -> int:
    return fp8.plan_cache_info()["tuned"]


def sources(report: AutotuneReport) -> dict[str, int]:
    return dict(Counter(problem.source for problem in report.problems))


def problems_of(recipe: str) -> int:
    return 3 if fp8.RECIPES[recipe].wgrad == "fp8" else 2


def step(layer: fp8.Linear, m: int) -> None:
    x = torch.randn(m, layer.in_features, requires_grad=True, **BF16)
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))


def forget() -> None:
    fp8.plan_cache_clear()
    file().unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _nothing_known_before_nor_after():
    forget()
    yield
    forget()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("k", [64, 1024, 8192])
@pytest.mark.parametrize("fast_accum", [True, False])
def test_autotune_values(k, granularity, fast_accum):
    """The call that measures, and those after it."""
    data = operands.make(144, 208, k, granularity, "cuda")
    with _measuring() as problems:
        for _ in range(2):
            operands.check(data, fast_accum=fast_accum)
    operands.check(data, fast_accum=fast_accum)
    assert [problem.source for problem in problems] == ["measured"]
    assert problems[0].first_us >= problems[0].chosen_us > 0
    assert f" k={k} " in problems[0].problem
    assert tuned() == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("m", "n", "k"), [(7, 9, 40), (17, 33, 65), (300, 100, 72)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autotune_values_of_odd_shapes_with_bias(m, n, k, granularity, out_dtype):
    data = operands.make(m, n, k, granularity, "cuda")
    bias = torch.randn(n, device="cuda", dtype=out_dtype)
    with _measuring():
        operands.check(data, bias, out_dtype)
    operands.check(data, bias, out_dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_autotune_leaves_an_accumulated_sum_alone(granularity, out_dtype):
    """Measured in other memory: each call adds its product once."""
    data = operands.make(80, 96, 1024, granularity, "cuda")
    out = (torch.randn(80, 96, device="cuda") * 3).to(out_dtype)
    with _measuring() as problems:
        for _ in range(2):
            expected = bounds.product(*data, None, out.clone())
            OPS.scaled_mm_accumulate_(out, *data)
            bounds.assert_within(out, expected, "split")
    assert [problem.source for problem in problems] == ["measured"]
    assert "accumulate" in problems[0].problem


def test_autotune_on_another_stream():
    data = operands.make(144, 208, 1024, "tensorwise", "cuda")
    late = torch.zeros_like(data.a.view(torch.uint8))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), _measuring() as problems:
        torch.cuda._sleep(50_000_000)
        late.copy_(data.a.view(torch.uint8))
        operands.check(data._replace(a=late.view(data.a.dtype)))
    assert len(problems) == 1


def test_autotune_tunes_a_plan_that_is_known_untuned():
    data = operands.make(144, 208, 64, "tensorwise", "cuda")
    operands.check(data)
    assert (fp8.plan_cache_info()["size"], tuned()) == (1, 0)
    with _measuring():
        operands.check(data)
    assert (fp8.plan_cache_info()["size"], tuned()) == (1, 1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("m", "k", "n"), [(256, 192, 320), (33, 100, 72)])
@pytest.mark.parametrize("bias", [True, False])
def test_autotune_tunes_exactly_the_problems_of_real_calls(recipe, m, k, n, bias):
    report = fp8.autotune([(m, k, n)], recipe=recipe, bias=bias)
    count = problems_of(recipe)
    assert sources(report) == {"measured": count}, report
    before = fp8.plan_cache_info()
    assert (before["size"], before["tuned"]) == (count, count)
    step(fp8.Linear(k, n, bias, recipe=recipe, **BF16), m)
    after = fp8.plan_cache_info()
    assert (after["misses"], after["size"]) == (before["misses"], count)
    assert fp8.info()["autotune"]["mode"] == "off"
    assert str(file()) in str(report)


def test_autotune_of_a_model():
    model = torch.nn.Sequential(fp8.Linear(64, 128, **BF16), fp8.Linear(128, 64, **BF16))
    report = fp8.autotune(model, tokens=[32, 48])
    # Two layers' shapes, mirrored: forward with bias, dx and dW, for 2 numbers of tokens.
    assert sources(report) == {"measured": 12}
    step(model[0], 32)
    step(model[1], 48)
    assert fp8.plan_cache_info()["size"] == 12


def test_autotune_under_autocast():
    layer = fp8.Linear(64, 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        report = fp8.autotune(layer, tokens=32)
        misses = fp8.plan_cache_info()["misses"]
        y = layer(torch.randn(32, 64, device="cuda", requires_grad=True))
    y.sum().backward()
    assert all("out=bfloat16" in problem.problem for problem in report.problems)
    assert fp8.plan_cache_info()["misses"] == misses


def test_autotune_does_not_touch_random_numbers():
    before = torch.cuda.get_rng_state()
    fp8.autotune([(32, 64, 48)])
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_autotune_results_are_kept():
    shapes = [(256, 192, 320)]
    first = fp8.autotune(shapes)
    times = {problem.problem: problem.chosen_us for problem in first.problems}

    def again() -> AutotuneReport:
        report = fp8.autotune(shapes)
        assert {p.problem: pytest.approx(p.chosen_us, abs=0.01) for p in report.problems} == times
        return report

    assert sources(again()) == {"memory": 3}
    fp8.plan_cache_clear()
    assert tuned() == 0
    step(fp8.Linear(192, 320, **BF16), 256)
    assert tuned() == 0  # not asked for, so the file is not read
    assert sources(again()) == {"file": 3}
    assert tuned() == 3


def test_autotune_measures_again_what_the_file_lost():
    shapes = [(256, 192, 320)]
    fp8.autotune(shapes)
    head, one, two, three = file().read_text().splitlines()
    algorithm = two.split("algo=")[1].split()[0]
    impossible = two.replace(algorithm, "f" * len(algorithm))
    file().write_text("\n".join([head, one, impossible, three[:-40]]))
    fp8.plan_cache_clear()
    assert sources(fp8.autotune(shapes)) == {"file": 1, "measured": 2}
    lines = file().read_text().splitlines()
    assert lines[:2] == [head, one]
    assert len(lines) == 4
    assert "f" * len(algorithm) not in lines[2]


def test_autotune_leaves_a_capture_alone():
    layer = fp8.Linear(192, 320, **BF16)
    x = torch.randn(64, 192, **BF16)
    with torch.no_grad():
        layer(x)  # plans, untuned
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _measuring() as problems, torch.cuda.graph(graph):
            y = layer(x)
            with pytest.raises(RuntimeError, match="before the CUDA graph capture"):
                fp8.autotune([(64, 192, 320)])
        assert problems == []
        assert tuned() == 0
        graph.replay()
        assert_same_bits(y, layer(x))


def test_autotuned_plans_in_a_cuda_graph():
    layer = fp8.Linear(192, 320, **BF16)
    fp8.autotune(layer, tokens=64)
    x = torch.randn(64, 192, **BF16)
    with torch.no_grad():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the tuning was the warm-up
            y = layer(x)
        graph.replay()
        assert_same_bits(y, layer(x))


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


STEP = """
    import json, torch, fp8
    layer = fp8.Linear(192, 320, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(256, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    print(json.dumps(fp8.plan_cache_info() | {"mode": fp8.info()["autotune"]["mode"]}))
"""


def test_autotune_environment_variable(tmp_path):
    def facts(value: str) -> dict[str, object]:
        done = run(STEP, FP8_AUTOTUNE=value, FP8_CACHE_DIR=str(tmp_path / "new"))
        return json.loads(done.stdout)

    off = facts("0")
    assert (off["mode"], off["size"], off["tuned"]) == ("off", 3, 0)
    assert not (tmp_path / "new").exists()
    on = facts("1")
    assert (on["mode"], on["size"], on["tuned"]) == ("on", 3, 3)
    (kept,) = (tmp_path / "new").iterdir()
    assert len(kept.read_text().splitlines()) == 1 + 3
    written = kept.stat().st_mtime_ns
    assert facts("1")["tuned"] == 3
    assert kept.stat().st_mtime_ns == written  # read, so nothing was measured


def test_autotune_without_a_place_for_its_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(STEP, FP8_AUTOTUNE="1", FP8_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert json.loads(done.stdout)["tuned"] == 3
    assert done.stderr.count("could not be written") == 1


def test_autotune_environment_variable_and_a_capture_without_warm_up():
    """As without it: the error asks for one run before the capture."""
    program = """
        import torch, fp8
        layer = fp8.Linear(192, 320, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)
        except RuntimeError as error:
            while error is not None:
                print(error)
                error = error.__context__
    """
    done = run(program, FP8_AUTOTUNE="1")
    assert "warm-up iteration with the same shapes before the capture" in done.stdout
