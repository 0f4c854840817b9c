"""The demo end to end, tiny: one start, one row of batches, and everything it leaves behind."""

import contextlib
import csv
import io
import math

import pytest
import torch
from torch import nn

import comparison
import fp8
import train as demo
from comparison import Schedule, make_variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run of the whole demo: (exit status, folder, standard output)."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = demo.main(["--size", "tiny", "--device", "cpu", "--out", str(out)])
    return status, out, printed.getvalue()


@pytest.fixture(scope="module")
def rows(finished):
    with (finished[1] / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def test_demo_succeeds_with_every_recipe(finished, rows):
    assert finished[0] == 0
    losses = [name for name in rows[0] if name.startswith("loss ")]
    assert losses == [
        "loss float32 nn.Linear",
        *(f"loss {recipe}" for recipe in demo.RECIPES["cpu"]),
    ]


def test_demo_writes_one_row_per_step(rows):
    assert [int(row["step"]) for row in rows] == list(range(1, demo.JOBS["tiny"].steps + 1))
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert all(float(value) > 0 for name, value in row.items() if name.startswith("ms "))


def test_demo_loss_decreases(rows):
    for name in (name for name in rows[0] if name.startswith("loss ")):
        assert float(rows[-1][name]) < float(rows[0][name]) - 0.3, name


def test_demo_recipes_start_together_and_stay_close(rows):
    for row in rows:
        for recipe in demo.RECIPES["cpu"]:
            # 0.05 nats: e4m3 rounds to 2^-4, and the errors of a few hundred products average out.
            gap = float(row[f"loss {recipe}"]) - float(row["loss float32 nn.Linear"])
            assert abs(gap) < 0.05, (row["step"], recipe)


def test_demo_recipes_do_compute_in_fp8(rows):
    for recipe in demo.RECIPES["cpu"]:
        assert any(row[f"loss {recipe}"] != row["loss float32 nn.Linear"] for row in rows)


def test_demo_writes_a_plot(finished):
    png = (finished[1] / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000


def test_demo_prints_table_paths_and_verdict(finished):
    _, out, printed = finished
    for word in ("held-out gap", "ms/step", "speed", str(out / "loss.png"), str(out / "loss.csv")):
        assert word in printed
    for recipe in demo.RECIPES["cpu"]:
        assert f"\n{recipe} " in printed
    assert "7 in FP8 (7 tensorwise), 1 left alone" in printed
    assert printed.splitlines()[-1].startswith("Result: ")


def test_demo_is_deterministic(rows, tmp_path):
    arguments = ["--size", "tiny", "--device", "cpu", "--steps", "12", "--out", str(tmp_path)]
    assert demo.main([*arguments, "--recipes", "rowwise"]) == 0
    with (tmp_path / "loss.csv").open() as file:
        again = list(csv.DictReader(file))
    for name in ("loss float32 nn.Linear", "loss rowwise"):
        assert [row[name] for row in again] == [row[name] for row in rows]


def test_demo_variants_start_from_the_same_weights():
    job = demo.JOBS["tiny"]
    variants = demo.make_variants(job, list(demo.RECIPES["cpu"]), Schedule(2, 1e-3), 0, CPU)
    baseline = variants[0].model.state_dict()
    for variant in variants[1:]:
        state = variant.model.state_dict()
        assert list(state) == list(baseline)
        assert all(torch.equal(state[name], baseline[name]) for name in baseline)
        ours, theirs = (next(v.model.parameters()) for v in (variant, variants[0]))
        assert ours.data_ptr() != theirs.data_ptr()


def test_demo_converts_the_blocks_only():
    job = demo.JOBS["tiny"]
    variant = demo.make_variants(job, ["rowwise"], Schedule(2, 1e-3), 0, CPU)[1]
    for name, module in variant.model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, fp8.Linear) == (name != "lm_head"), name


class Recorder(nn.Module):
    """Predicts uniformly and remembers what it was shown."""

    def __init__(self, first_logit: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(256))
        self.logits.data[0] = first_logit
        self.shown: list[torch.Tensor] = []

    def forward(self, tokens):
        self.shown.append(tokens.clone())
        return self.logits.expand(*tokens.shape, 256)


def random_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (2, 2, 8), generator=generator).unbind()


def test_training_shows_every_variant_the_same_batches():
    schedule = Schedule(5, 1e-3)
    variants = [make_variant(name, Recorder(), schedule) for name in "abc"]
    order = []
    comparison.train(variants, random_batch, schedule, CPU, lambda v: order.append(v.name))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca"
    for variant in variants:
        assert len(variant.losses) == len(variant.milliseconds) == 5
        assert torch.equal(torch.stack(variant.model.shown), torch.stack(variants[0].model.shown))


def test_training_stops_at_a_loss_that_is_not_finite():
    schedule = Schedule(3, 1e-3)
    broken = make_variant("broken", Recorder(math.nan), schedule)
    with pytest.raises(FloatingPointError, match="broken: loss of step 1 is nan"):
        comparison.train([broken], random_batch, schedule, CPU, lambda variant: None)


def test_demo_exits_nonzero_at_a_loss_that_is_not_finite(monkeypatch, tmp_path, capsys):
    def diverge(variants, *others):
        raise FloatingPointError(f"{variants[1].name}: loss of step 9 is nan")

    monkeypatch.setattr(demo, "train", diverge)
    assert demo.main(["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "demo: tensorwise: loss of step 9 is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "nonsense"], "unknown recipe 'nonsense', known are tensorwise, rowwise"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_schedule_warms_up_and_decays_to_a_tenth():
    schedule = Schedule(100, 1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_verdict_names_what_is_far_from_the_baseline():
    schedule = Schedule(2, 1e-3)
    variants = [make_variant(name, Recorder(), schedule) for name in ("base", "near", "far")]
    for variant, held_out in zip(variants, (2.0, 2.01, 2.0 + 2 * demo.CLOSE), strict=True):
        variant.held_out = held_out
    assert demo.verdict(variants[:2]).startswith("Result: each FP8 recipe stayed within")
    assert "far (0.1000)" in demo.verdict(variants)
    assert "near" not in demo.verdict(variants)


def test_memory_of_a_variant_leaves_out_the_others(monkeypatch):
    allocated, peak = iter([900, 1300]), 2000
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    variant = make_variant("one", Recorder(), Schedule(2, 1e-3))
    variant.resident_bytes = 300  # of the 900 that lie there before its first step
    comparison._MemoryWatch(variant, torch.device("cuda")).finish()
    assert variant.resident_bytes == 700  # its optimizer state came with the step
    assert variant.peak_bytes == 1400


@pytest.mark.gpu
def test_demo_runs_on_a_gpu(tmp_path, capsys):
    assert demo.main(["--size", "tiny", "--device", "cuda", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "peak GiB" in printed
    assert torch.cuda.get_device_name() in printed
