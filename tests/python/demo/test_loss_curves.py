"""examples/loss_curves.py: FP8 against the noise between seeds."""

import math

import pytest

import loss_curves
from comparison import Variant


def variant(name: str, held_out: float, steps: int = 8) -> Variant:
    made = Variant(name, None, None)
    made.losses = [1.0] * steps
    made.milliseconds = [2.0] * steps
    made.held_out = held_out
    return made


def test_loss_curves_noise_is_the_range_of_the_seeds():
    seeds = [variant("a", 2.0), variant("b", 2.3), variant("c", 1.9)]
    assert loss_curves.noise_of(seeds) == pytest.approx(0.4)
    text = loss_curves.table(seeds, [variant("tensorwise", 2.1)])
    assert "tensorwise" in text.splitlines()[4]
    assert "+0.1000" in text.splitlines()[4]
    assert "25%" in text.splitlines()[4]


@pytest.mark.parametrize(("worse", "status"), [(0.0, 0), (5.0, 1)])
def test_loss_curves_status_says_whether_a_recipe_is_outside(
    tmp_path, monkeypatch, capsys, worse, status
):
    """A run of the tiny model; `worse` is added to what the recipe reaches."""
    real = loss_curves.evaluate
    judged = []

    def evaluate(model, batches, device):
        judged.append(model)
        return real(model, batches[:2], device) + (worse if len(judged) == 2 else 0.0)

    monkeypatch.setattr(loss_curves, "evaluate", evaluate)
    arguments = ["--size", "tiny", "--steps", "6", "--seeds", "2", "--recipes", "rowwise"]
    assert loss_curves.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == status
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(rows) == 7
    assert all(math.isfinite(float(cell)) for row in rows[1:] for cell in row.split(","))
    out = capsys.readouterr().out
    assert ("outside of the noise: rowwise" in out) == bool(status)


def test_loss_curves_needs_two_seeds():
    with pytest.raises(SystemExit):
        loss_curves.parse(["--seeds", "1"])
