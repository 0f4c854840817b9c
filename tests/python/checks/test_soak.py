"""make soak: it passes, and notices what grows, what is not finite and what is not repeated."""

from __future__ import annotations

import mmap
import os

import pytest
import soak
import torch

STEPS = 64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def passed():
    torch.set_num_threads(1)
    run = soak.Soak(STEPS, 5, "cpu")
    run.run()
    return run


def test_soak_passes(passed):
    assert passed.failures == []
    assert passed.done == STEPS
    assert passed.losses.isfinite().all()


def test_soak_has_every_recipe(passed):
    import fp8

    names = {trainee.name for trainee in passed.trainees}
    assert names >= {*fp8.RECIPES, *(f"experts {r}" for r in fp8.GROUPED_RECIPES), "grouped"}


def resident(size):
    """Memory of its own: malloc would give some that an earlier test has freed, and still holds."""
    made = mmap.mmap(-1, size)
    made.write(os.urandom(size))
    return made


@pytest.mark.parametrize(
    ("leak", "what"),
    [
        (lambda kept: kept.append(torch.zeros(1)), "live tensors grew by"),
        (lambda kept: kept.append(os.dup(0)), "open files grew by"),
        (lambda kept: kept.append(resident(4 << 20)), "resident bytes grew by"),
    ],
    ids=["tensors", "files", "memory"],
)
def test_soak_notices_what_grows(leak, what):
    kept = []
    run = soak.Soak(STEPS, 5, "cpu")
    run.run(lambda step: leak(kept))
    for one in kept:
        if isinstance(one, int):
            os.close(one)
    (failure,) = run.failures
    assert what in failure["what"]
    assert failure["seed"] == 5
    assert 0 < failure["step"] < STEPS


def test_soak_names_the_step_of_a_loss_that_is_not_finite():
    run = soak.Soak(STEPS, 5, "cpu")

    def spoil(step):
        if step == 18:
            with torch.no_grad():
                run.trainees[4].model.weight.fill_(float("nan"))

    run.run(spoil)
    (failure,) = run.failures
    assert failure["step"] == 19
    assert failure["what"] == f"{run.trainees[4].name}: loss is not finite"


def test_soak_compares_with_bf16(passed):
    losses = passed.losses.clone()
    try:
        number = next(i for i, t in enumerate(passed.trainees) if t.name == "rowwise")
        passed.losses[number] *= 1.3
        passed.compare()
        assert len(passed.failures) == 1
        assert "rowwise: loss" in passed.failures[0]["what"]
    finally:
        passed.losses.copy_(losses)
        passed.failures.clear()


def test_soak_compares_a_second_run(passed):
    passed.same_bits_again(8)
    assert passed.failures == []
    try:
        passed.losses[3, 6] += 1e-3
        passed.same_bits_again(8)
        assert [f["step"] for f in passed.failures] == [6]
        assert passed.trainees[3].name in passed.failures[0]["what"]
    finally:
        passed.failures.clear()
        passed.losses[3, 6] -= 1e-3


def test_soak_ends_in_time():
    run = soak.Soak(10_000, 5, "cpu", seconds=0.1)
    run.run()
    assert run.done < 10_000
