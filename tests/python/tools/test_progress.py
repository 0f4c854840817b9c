"""The progress bar: after a second, on a terminal, if nobody turned it off."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest
import torch

import fp8
from fp8._native import progress as module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """stderr, and a clock that moves 0.4 seconds an item."""
    stream = Terminal()
    monkeypatch.delenv("FP8_PROGRESS", raising=False)
    times = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.4 * next(times))
    return stream


def run(count: int, stream: io.StringIO) -> list[int]:
    with contextlib.redirect_stderr(stream):
        return list(module.progress(range(count), "fp8.title", "layer"))


def test_progress_appears_after_a_second(terminal):
    assert run(6, terminal) == list(range(6))
    assert "fp8.title" in terminal.getvalue()
    assert "/6 [" in terminal.getvalue()


def test_progress_of_a_short_loop_is_silent(terminal):
    assert run(2, terminal) == [0, 1]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("value", ["0"])
def test_progress_is_off_by_the_variable(terminal, monkeypatch, value):
    monkeypatch.setenv("FP8_PROGRESS", value)
    assert run(6, terminal) == list(range(6))
    assert terminal.getvalue() == ""


def test_progress_is_for_terminals_only(terminal):
    stream = io.StringIO()
    assert run(6, stream) == list(range(6))
    assert stream.getvalue() == ""


def test_progress_does_without_tqdm(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(6, terminal) == list(range(6))
    assert terminal.getvalue() == ""


def test_progress_ends_with_its_loop(terminal):
    items = module.progress(range(6), "fp8.title", "layer")
    with contextlib.redirect_stderr(terminal):
        assert [next(items) for _ in range(5)] == list(range(5))
        items.close()
    assert terminal.getvalue().endswith("\r")  # wiped


def test_progress_of_convert_and_calibrate(terminal, monkeypatch):
    """Whatever takes longer than a second has one: here all does."""
    monkeypatch.setattr(module, "DELAY", -1)
    model = torch.nn.Sequential(fp8.Linear(16, 16), torch.nn.LayerNorm(16))
    with contextlib.redirect_stderr(terminal):
        fp8.convert(model, filter=lambda module, name: True)
        with fp8.calibrate(model):
            model(torch.randn(4, 16))
    for title in ("fp8: MLPs", "fp8: norms", "fp8: rotations", "fp8.calibrate"):
        assert title in terminal.getvalue()
