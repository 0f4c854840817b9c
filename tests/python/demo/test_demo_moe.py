"""make demo-moe, tiny: both families, every recipe, and what it leaves behind."""

import contextlib
import csv
import io
import math

import pytest
import torch

import fp8

pytest.importorskip("transformers", minversion="5.0")

import seed_report
import train_moe as demo
from comparison import Schedule, Variant


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run: (exit status, folder, standard output)."""
    out = tmp_path_factory.mktemp("demo") / "moe"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = demo.main(["--size", "tiny", "--device", "cpu", "--out", str(out)])
    return status, out, printed.getvalue()


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_demo_moe_trains_every_recipe(finished, family):
    status, out, _ = finished
    assert status == 0
    with (out / f"{family}.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name.removeprefix("loss ") for name in rows[0] if name.startswith("loss ")]
    assert names == ["float32 grouped_mm", *demo.RECIPES["cpu"]]
    assert len(rows) == demo.JOBS["tiny"].steps
    for name in names:
        losses = [float(row[f"loss {name}"]) for row in rows]
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0] - 0.3, name
        # 0.05 nats: e4m3 rounds to 2^-4, and the errors of a few hundred products average out;
        # tokens whose routing changes are few.
        gaps = [
            abs(a - float(row[f"loss {names[0]}"])) for a, row in zip(losses, rows, strict=True)
        ]
        assert max(gaps) < 0.05, name
        assert name == names[0] or max(gaps) > 0
    assert (out / f"{family}.png").read_bytes().startswith(b"\x89PNG")


def test_demo_moe_prints_tables_and_verdicts(finished):
    _, out, printed = finished
    assert printed.count("held-out gap") == printed.count("Result: ") == 2
    assert "1 experts: 1 in FP8 (1 rowwise_gw_hp), 0 left alone; 100.0%" in printed
    assert str(out / "qwen3_moe.csv") in printed


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_demo_moe_variants_start_from_the_same_weights(family):
    job, cpu = demo.JOBS["tiny"], torch.device("cpu")
    variants = demo.make_variants(family, job, demo.RECIPES["cuda"], Schedule(2, 1e-3), 0, cpu)
    states = [variant.model.state_dict() for variant in variants]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert not any(map(fp8.integrations.transformers.in_fp8, variants[0].model.modules()))
    for variant in variants[1:]:
        found = [m for m in variant.model.modules() if fp8.integrations.transformers.in_fp8(m)]
        assert [fp8.integrations.transformers.recipe_of(m) for m in found] == [variant.name]


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_demo_moe_on_a_gpu_passes_the_default_rules(family):
    """The sizes of the GPU job are converted without a filter: experts, and large linears."""
    with torch.device("meta"):
        model = demo.make_model(family, demo.JOBS["gpu"])
    fp8.convert(model)
    assert "2 experts: 2 in FP8 (2 rowwise), 0 left alone" in fp8.summary(model)
    assert sum(p.numel() for p in model.parameters()) > 500e6


def test_demo_moe_refuses_bad_arguments(capsys):
    for arguments in (["--recipes", "tensorwise"], ["--seeds", "0"], ["--steps", "1"]):
        with pytest.raises(SystemExit) as stop:
            demo.main(arguments)
        assert stop.value.code == 2
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err


def test_demo_moe_of_several_seeds(tmp_path, capsys):
    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path), "--seeds", "2"]
    arguments += ["--steps", "4", "--families", "mixtral", "--recipes", "blockwise"]
    assert demo.main(arguments) in (0, 1)
    printed = capsys.readouterr().out
    assert "noise: largest difference between two seeds" in printed
    assert printed.count("model   Mixtral") == 1
    with (tmp_path / "mixtral_2_seeds.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name.removeprefix("loss ") for name in rows[0] if name.startswith("loss ")]
    assert names == [
        f"{name}, seed {seed}" for name in ("float32 grouped_mm", "blockwise") for seed in (0, 1)
    ]
    first, second = (rows[0][f"loss {name}"] for name in names[:2])
    assert first != second  # other weights, other batches
    assert (tmp_path / "mixtral_2_seeds.png").read_bytes().startswith(b"\x89PNG")


def run_of(name, held_out):
    losses = [held_out] * 10
    return Variant(name, None, None, losses=losses, milliseconds=[1.0] * 10, held_out=held_out)


@pytest.mark.parametrize(("gap", "far"), [(0.02, []), (0.05, ["rowwise"])])
def test_seeds_are_judged_by_the_noise_between_them(gap, far):
    """The mean gap to the baseline of the same seed, against the spread of the baseline."""
    losses = (2.0, 2.03, 2.01)
    runs = seed_report.by_name(
        [[run_of("bf16", loss), run_of("rowwise", loss + gap)] for loss in losses]
    )
    assert seed_report.noise_of(runs) == pytest.approx(0.03)
    assert seed_report.mean_gap(runs, "rowwise") == pytest.approx(gap)
    assert seed_report.outside(runs) == far
    assert ("outside" in seed_report.verdict(runs)) == bool(far)
    assert f"{gap:+.4f}" in seed_report.table(runs)


@pytest.mark.gpu
def test_demo_moe_runs_on_a_gpu(tmp_path, capsys):
    assert demo.main(["--size", "tiny", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "peak GiB" in capsys.readouterr().out
