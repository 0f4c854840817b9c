"""The mixture-of-experts demo, tiny: both models, every variant, and what it leaves behind."""

import contextlib
import csv
import io

import pytest

import fp8
import train_moe

pytest.importorskip("transformers", reason="needs transformers (requirements.txt)")

NAMES = ["loss float32 grouped_mm", "loss fp8 rowwise", "loss fp8 rowwise_gw_hp"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run: (exit status, folder, standard output)."""
    out = tmp_path_factory.mktemp("demo") / "moe"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = train_moe.main(["--size", "tiny", "--device", "cpu", "--out", str(out)])
    return status, out, printed.getvalue()


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_demo_moe_trains_every_variant(finished, family):
    status, out, _ = finished
    assert status == 0
    with (out / f"{family}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [name for name in rows[0] if name.startswith("loss ")] == NAMES
    assert len(rows) == train_moe.JOBS["tiny"].steps
    baseline, *recipes = NAMES
    for name in NAMES:
        assert float(rows[-1][name]) < float(rows[0][name]) - 0.3, name
    for name in recipes:
        assert any(row[name] != row[baseline] for row in rows)
        # 0.1 nats: a router whose choice is close may choose otherwise.
        assert all(abs(float(row[name]) - float(row[baseline])) < 0.1 for row in rows)
    assert (out / f"{family}.png").stat().st_size > 20_000


def test_demo_moe_says_what_ran(finished):
    printed = finished[2]
    assert printed.count("1 experts modules: 1 in FP8, 0 left alone") == 2
    for family in ("Mixtral", "Qwen3Moe"):
        assert f"\n{family}: Result: " in printed


def test_demo_moe_recipes_are_converts():
    assert set(train_moe.parse([]).recipes) <= set(fp8.RECIPES)
