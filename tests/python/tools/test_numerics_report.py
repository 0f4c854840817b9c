"""What fp8.numerics prints and draws."""

from __future__ import annotations

import json
import math
import random
import struct
import sys

import pytest
from watched_models import batch, blocks, watched_step

from fp8.tools import Numerics, NumericsRow, Spread


def spread(value: float, width: float = 0.0) -> Spread:
    return Spread(value, value - width, value + width)


def row(layer: str, operand: str = "x", sqnr: float = 31.0, **fields) -> NumericsRow:
    values = {
        "product": "dgrad" if operand == "dy" else "fprop",
        "recipe": "tensorwise",
        "dtype": "e5m2" if operand == "dy" else "e4m3",
        "scaling": "dynamic",
        "calls": 4,
        "amax": spread(3.5),
        "saturated": spread(0.0),
        "flushed": spread(0.0),
        "nonfinite": 0,
    }
    return NumericsRow(layer, operand, sqnr_db=spread(sqnr, 0.5), **(values | fields))


def report(rows: list[NumericsRow]) -> Numerics:
    found = Numerics()
    found._fill(rows, {})
    return found


def many(count: int) -> list[NumericsRow]:
    """Layers of a transformer, some of them bad."""
    draw = random.Random(1)
    rows = []
    for i in range(count):
        layer = f"model.layers.{i // 7}.{'self_attn' if i % 7 < 4 else 'mlp'}.proj_{i % 7}"
        for operand, base in (("x", 31), ("weight", 31.7), ("dy", 25)):
            sqnr = base + draw.gauss(0, 0.5) - (12 * (draw.random() < 0.03))
            flushed = spread(10 ** draw.uniform(-6, -2))
            rows.append(row(layer, operand, sqnr, flushed=flushed))
    return rows


def test_numerics_table_has_the_worst_first():
    found = report([row("good"), row("bad", sqnr=12), row("middle", "dy", 25)])
    head, *lines = found.table().splitlines()
    assert [line.split()[0] for line in lines] == ["bad", "middle", "good"]
    assert head.split()[:3] == ["layer", "recipe", "calls"]
    assert str(found) == found.table()


def test_numerics_table_by_another_figure():
    rows = [
        row("a", sqnr=12),
        row("b", flushed=spread(0.4)),
        row("c", "dy", 25, saturated=spread(0.1)),
        row("d", nonfinite=1),
    ]
    first = [report(rows).table(1, by).splitlines()[1][0] for by in ("flushed", "saturated")]
    assert first == ["d", "d"]
    firsts = [report(rows[:3]).table(1, by).splitlines()[1][0] for by in ("flushed", "saturated")]
    assert firsts == ["b", "c"]
    with pytest.raises(ValueError, match=r"expected by out of .*'flushed'.*, got 'amax'"):
        report(rows).table(by="amax")


def test_numerics_table_takes_the_worst_product():
    rows = [row("a", "x", 31), row("a", "x", 18, product="wgrad", amax=spread(7.0))]
    cells = report(rows).table().splitlines()[1].split()
    assert cells[3:7] == ["18.0", "-", "-", "7"]


def test_numerics_table_is_one_screen():
    lines = report(many(300)).table().splitlines()
    assert len(lines) == 26
    assert lines[-1].startswith("and 276 layers more, the worst with ")
    assert max(map(len, lines)) <= 140
    assert len(report(many(300)).table(limit=5).splitlines()) == 7


def test_numerics_table_shows_shares_and_their_operand():
    rows = [
        row("a", flushed=spread(0.25)),
        row("a", "weight", flushed=spread(0.5), saturated=spread(2e-6)),
        row("a", "dy", 25, nonfinite=2),
    ]
    assert report(rows).table().splitlines()[1].split()[-5:] == ["W", "2e-04", "W", "50.00", "2"]


def test_numerics_table_shortens_names_in_the_middle():
    name = "model.language_model.layers.31.self_attn.q_proj"
    cell = report([row(name)]).table().splitlines()[1].split()[0]
    assert len(cell) == 34
    assert cell.startswith("model.language")
    assert cell.endswith("self_attn.q_proj")


def test_numerics_rows_are_plain_data():
    found = report([row("a", sqnr=math.inf), row("a", "dy", math.nan)])
    first, second = json.loads(json.dumps(found.as_dicts(), allow_nan=False))
    assert first["layer"] == "a"
    assert first["amax"] == {"mean": 3.5, "min": 3.5, "max": 3.5}
    assert first["sqnr_db"]["mean"] is None
    assert second["sqnr_db"] == {"mean": None, "min": None, "max": None}


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize("count", [0, 1, 12, 300])
def test_numerics_plot_is_a_png(count, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "numerics.png"
    report(many(count)).plot(path)
    width, height = png_size(path)
    assert 900 < width <= 2600
    assert height > 900


def test_numerics_plot_of_a_real_step(tmp_path):
    pytest.importorskip("matplotlib")
    watched_step(blocks("rowwise"), batch()).plot(str(tmp_path / "real.png"))
    assert png_size(tmp_path / "real.png")


def test_numerics_plot_survives_figures_that_are_no_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("a", sqnr=math.inf), row("b", "dy", math.nan, flushed=Spread())]
    report(rows).plot(tmp_path / "odd.png")
    assert png_size(tmp_path / "odd.png")


def test_numerics_needs_matplotlib_for_the_plot_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fp8.tools._numerics_plot", raising=False)
    found = watched_step(blocks(), batch())
    assert found.table()
    with pytest.raises(ImportError):
        found.plot(tmp_path / "none.png")
