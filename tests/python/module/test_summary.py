"""fp8.summary: the table that says what runs in FP8 and why the rest does not."""

import pytest
import torch
from torch import nn

import fp8


def table(model):
    """(header, rows by name, totals) of the summary, the columns cut where the header says."""
    header, *rows, totals = fp8.summary(model).splitlines()
    starts = [header.index(word) for word in ("name", "in ->", "dtype", "recipe")]
    cuts = list(zip(starts, [*starts[1:], None], strict=True))
    cells = [[row[a:b].strip() for a, b in cuts] for row in rows]
    return header, {name: rest for name, *rest in cells}, totals


def large_model():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "up": nn.Linear(4096, 14336, dtype=torch.bfloat16),
                "router": nn.Linear(4096, 8),
                "lm_head": nn.Linear(4096, 4096),
            }
        )
    return model


def test_summary_is_an_aligned_table():
    expected = """\
name     in -> out      dtype     recipe
up       4096 -> 14336  bfloat16  rowwise
router   4096 -> 8      float32   - (small: K*N/(K+N) = 7, FP8 gains from 900)
lm_head  4096 -> 4096   float32   - (output head, kept in high precision by default)
3 linear: 1 in FP8 (1 rowwise), 2 left alone; 77.7% of their weight elements in FP8"""
    assert fp8.summary(fp8.convert(large_model(), "rowwise")) == expected


def test_summary_names_every_linear_on_one_line():
    model = fp8.convert(large_model())
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert list(table(model)[1]) == names


def test_summary_before_conversion():
    _, rows, totals = table(large_model())
    assert rows["up"] == ["4096 -> 14336", "bfloat16", "- (not converted)"]
    assert totals.startswith("3 linear: 0 in FP8 (none), 3 left alone; 0.0%")


def test_summary_counts_each_recipe():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    fp8.convert(model, "rowwise", filter=lambda module, name: name in "12")
    fp8.convert(model, "tensorwise", filter=lambda module, name: name == "3")
    _, rows, totals = table(model)
    assert [row[2].split(" ")[0] for row in rows.values()] == [
        "-",
        "rowwise",
        "rowwise",
        "tensorwise",
    ]
    assert totals == (
        "4 linear: 3 in FP8 (2 rowwise, 1 tensorwise), 1 left alone; "
        "75.0% of their weight elements in FP8"
    )


def test_summary_of_a_root_linear():
    assert table(nn.Linear(16, 16))[1]["(model)"][:2] == ["16 -> 16", "float32"]


def test_summary_shows_further_names_of_a_shared_module():
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model["b"] = model["c"] = model["a"]
    _, rows, totals = table(model)
    assert list(rows) == ["a [b, c]"]
    assert totals.startswith("1 linear: 0 in FP8")


def test_summary_of_a_lazy_linear():
    row = table(nn.Sequential(nn.LazyLinear(16)))[1]["0"]
    assert row == ["0 -> 16", "float32", "- (a subclass of nn.Linear: LazyLinear)"]


def test_summary_points_out_a_dtype_that_fp8_cannot_compute():
    model = fp8.convert(nn.Sequential(nn.Linear(16, 16)), filter=lambda module, name: True).double()
    assert table(model)[1]["0"] == [
        "16 -> 16",
        "float64",
        "tensorwise (float64 weight; FP8 takes bfloat16, float16, float32)",
    ]


def test_summary_without_any_linear():
    header, rows, totals = table(nn.ReLU())
    assert (header, rows, totals) == ("name  in -> out  dtype  recipe", {}, "no nn.Linear")


def test_summary_finds_its_reasons_again():
    model = large_model()
    fp8.convert(model)
    model.head = model.pop("lm_head")
    assert "head" in table(model)[1]
    assert table(model)[1]["head"][2] == "- (not converted)"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_summary_of_zero_sized_linears(shape):
    assert "0.0% of their weight elements" in fp8.summary(nn.Linear(*shape))
