"""docs/numerics.md: its programs run, and its figures are theirs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from fp8.tools._quantization import SUMS, Format, measure, quantize

PAGE = (Path(__file__).resolve().parents[3] / "docs/numerics.md").read_text()


def test_page_of_numerics_runs_and_prints_its_table(capsys):
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (table,) = re.findall(r"```\n(layer .*?)```", PAGE, re.DOTALL)
    assert len(programs) == 3
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(programs[0], names)
        printed = capsys.readouterr().out.splitlines()
        for program in programs[1:]:
            exec(program, names)
    lines = table.splitlines()
    assert len(printed) == len(lines)
    for mine, theirs in zip(printed, lines, strict=True):
        assert len(mine.split()) == len(theirs.split())
        for a, b in zip(mine.split(), theirs.split(), strict=True):
            if re.fullmatch(r"[\d.e+-]+", b):  # sums of other machines may round otherwise
                assert float(a) == pytest.approx(float(b), rel=0.02)
            else:
                assert a == b
    assert not hasattr(names["model"][2], "recipe")  # type: ignore[index]


def test_page_of_numerics_has_the_figures_of_the_formats():
    torch.manual_seed(0)
    normal = torch.randn(2048, 2048)
    large = normal.clone()
    large[::128] *= 1e5
    values = {
        "normal": normal,
        "uniform in [-1, 1]": torch.rand(2048, 2048) * 2 - 1,
        "normal, negative ones 0 (ReLU)": normal.relu(),
        "normal, one row of 128 times 100,000": large,
    }
    for name, x in values.items():
        cells = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", PAGE, re.MULTILINE)
        assert cells is not None, name
        written = [float(cell.strip(" %")) for cell in cells[1].split("|")]
        for i, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2)):
            sums = measure(x, *quantize(x, Format(dtype, "tensorwise")))[0].tolist()
            got = dict(zip(SUMS, sums, strict=True))
            sqnr = 10 * torch.log10(torch.tensor(got["signal"] / got["noise"])).item()
            assert sqnr == pytest.approx(written[2 * i], abs=0.1), (name, dtype)
            flushed = 100 * got["flushed"] / got["nonzero"]
            assert flushed == pytest.approx(written[2 * i + 1], abs=1 if flushed > 1 else 0.1)
