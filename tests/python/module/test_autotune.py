"""fp8.autotune without a GPU: arguments, which layers count, the report. With one:
../matmul/test_autotune_gpu.py."""

import sys

import pytest
import torch
from torch import nn

import fp8
from fp8.tools._autotune import AutotuneReport, Tuned, _cases_of_model, _cases_of_shapes, _run

PROBLEM = (
    "matmul m=8 n=16 k=32 lda=32 ldb=32 ldo=16 a=float8_e4m3fn b=float8_e5m2 out=bfloat16 "
    "tensorwise fast_accum align=256,256,256,256"
)


def test_autotune_cpu_model_has_nothing_to_tune(model, tokens):
    fp8.convert(model, filter=lambda module, name: True)
    before = torch.get_rng_state()
    report = fp8.autotune(model, tokens=64)
    assert report.problems == ()
    assert "3 of 3 cases left out" in str(report)
    assert "0 problems" in str(report)
    assert torch.equal(torch.get_rng_state(), before)
    assert fp8.info()["autotune"]["mode"] == "off"
    model(tokens)


def test_autotune_model_without_fp8_layers():
    report = fp8.autotune(nn.Linear(16, 16))
    assert report.problems == ()
    assert "no fp8.Linear" in str(report)
    assert "no shapes" in str(fp8.autotune([]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_autotune_shapes_without_a_gpu():
    report = fp8.autotune([(32, 64, 48), (32, 64, 48), (16, 64, 48)], recipe="rowwise")
    assert report.problems == ()
    assert "2 of 2 cases left out" in str(report)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "8", [], [8, 0], [8, None]])
def test_autotune_tokens_error(tokens):
    with pytest.raises(ValueError, match="tokens, a positive integer or several, got"):
        fp8.autotune(fp8.Linear(16, 16), tokens=tokens)


@pytest.mark.parametrize(
    "shape", [(1, 2), (1, 2, 3, 4), (1, 2, 0), (1, 2, -3), (1.0, 2, 3), 7, "abc", (True, 1, 1)]
)
def test_autotune_shapes_error(shape):
    with pytest.raises(ValueError, match=r"shapes \(M, K, N\) of positive integers, got"):
        fp8.autotune([(16, 16, 16), shape])


def test_autotune_argument_errors():
    layer = fp8.Linear(16, 16)
    for name, value in (("recipe", "rowwise"), ("dtype", torch.float16), ("bias", False)):
        with pytest.raises(ValueError, match=f"{name} is for shapes"):
            fp8.autotune(layer, **{name: value})
    with pytest.raises(ValueError, match="tokens is for a model"):
        fp8.autotune([(16, 16, 16)], tokens=8)
    with pytest.raises(TypeError, match=r"expected an nn\.Module or shapes .*got int"):
        fp8.autotune(7)
    with pytest.raises(ValueError, match=r"expected a recipe out of .*got 'fast'"):
        fp8.autotune([(16, 16, 16)], recipe="fast")
    with pytest.raises(ValueError, match=r"expected dtype .*got torch\.float64"):
        fp8.autotune([(16, 16, 16)], dtype=torch.float64)


def test_autotune_takes_each_distinct_layer_once():
    model = nn.Sequential(
        fp8.Linear(32, 64),
        fp8.Linear(32, 64),  # the same problems
        fp8.Linear(32, 64, bias=False),
        fp8.Linear(32, 64, recipe="rowwise"),
        fp8.Linear(32, 64, dtype=torch.bfloat16),
        fp8.Linear(64, 32),
        nn.Linear(32, 64),
    )
    cases = _cases_of_model(model, [8])
    assert [(c.k, c.n, c.bias, c.recipe, c.dtype) for c in cases] == [
        (32, 64, True, "tensorwise", torch.float32),
        (32, 64, False, "tensorwise", torch.float32),
        (32, 64, True, "rowwise", torch.float32),
        (32, 64, True, "tensorwise", torch.bfloat16),
        (64, 32, True, "tensorwise", torch.float32),
    ]
    assert {case.m for case in cases} == {8}
    assert len(_cases_of_model(model, [8, 16, 8])) == 10


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("bias", [False, True])
def test_autotune_runs_a_layer_forward_and_backward(recipe, bias, monkeypatch):
    """Whatever the caller's mode, and without its random state."""
    (case,) = _cases_of_shapes([(8, 32, 16)], recipe, torch.bfloat16, bias)
    seen = []
    grad = torch.autograd.grad

    def spy(y, inputs, dy):
        seen.append((y.shape, [tuple(tensor.shape) for tensor in inputs], dy.dtype))
        return grad(y, inputs, dy)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    before = torch.get_rng_state()
    with torch.inference_mode():
        _run(case)
    with torch.no_grad():
        _run(case)
    assert seen == [((8, 16), [(8, 32), (16, 32), (16,)][: 2 + bias], torch.bfloat16)] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_autotune_shapes_are_M_K_N():
    cases = _cases_of_shapes(iter([(8, 32, 16)] * 2), "rowwise", torch.float16, True)
    assert [(c.m, c.k, c.n, c.bias, c.recipe, c.dtype) for c in cases] == [
        (8, 32, 16, True, "rowwise", torch.float16)
    ]


def test_autotune_mode_ends_when_a_layer_fails(monkeypatch):
    def fail(case):
        raise RuntimeError("no memory")

    module = sys.modules["fp8.tools._autotune"]  # fp8.autotune itself is the function
    monkeypatch.setattr(module, "_run", fail)
    monkeypatch.setattr(module, "progress", lambda cases, title, unit: [None])
    with pytest.raises(RuntimeError, match="no memory"):
        fp8.autotune([(8, 16, 16)])
    assert fp8.info()["autotune"]["mode"] == "off"


def test_autotune_report_is_a_table():
    report = AutotuneReport(
        (
            Tuned(PROBLEM, 812.25, 750.0, "measured"),
            Tuned("matmul m=1", 5.0, 5.0, "file"),
            Tuned("matmul m=2", 0.0, 0.0, "memory"),
        ),
        ("kept in /cache/file.txt",),
    )
    assert report.problems[0].gain == pytest.approx(1.083)
    short = "m=8 n=16 k=32 a=e4m3 b=e5m2 out=bfloat16 tensorwise fast_accum"
    assert str(report).splitlines() == [
        "problem".ljust(len(short)) + "  first us  chosen us   gain  source",
        short + "     812.2      750.0  1.08x  measured",
        "m=1".ljust(len(short)) + "       5.0        5.0  1.00x  file",
        "m=2".ljust(len(short)) + "         -          -  1.00x  memory",
        "3 problems: 1 measured, 1 from the file, 1 tuned before; "
        "1 with another algorithm than the first",
        "kept in /cache/file.txt",
    ]
