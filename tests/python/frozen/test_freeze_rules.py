"""Which layers fp8.freeze takes, why not the others, and what fp8.summary says of both."""

from __future__ import annotations

import warnings

import pytest
import torch
from frozen_models import convert, every, frozen_layers, language_model
from torch import nn

import fp8


def row(model: nn.Module, name: str) -> str:
    lines = [line for line in fp8.summary(model).splitlines() if line.split("  ")[0] == name]
    assert len(lines) == 1, lines
    return lines[0]


def test_freeze_leaves_the_head_by_default():
    model = fp8.freeze(language_model())
    assert type(model.lm_head) is nn.Linear
    assert len(frozen_layers(model)) == 14
    assert row(model, "lm_head").endswith("- (output head, kept in high precision by default)")
    fp8.freeze(model, filter=every)
    assert type(model.lm_head) is fp8.FrozenLinear


@pytest.mark.parametrize("filter", [None, every])
def test_freeze_leaves_tied_weights(filter):
    model = fp8.freeze(language_model(tied=True), filter=filter)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    assert "- (its weight is shared with embed)" in row(model, "lm_head")


def test_freeze_leaves_two_layers_of_one_weight():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    fp8.freeze(model)
    assert frozen_layers(model) == ["2"]
    assert "its weight is shared with 1" in row(model, "0")


def test_freeze_leaves_what_convert_left_in_high_precision():
    """So that the logits stay, whatever convert's filter was."""
    model = language_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fp8.convert(model, "rowwise", filter=lambda module, name: "mlp" in name)
    fp8.freeze(model)
    assert all("mlp" in name for name in frozen_layers(model))
    assert len(frozen_layers(model)) == 6
    expected = "- (in high precision beside layers that were converted)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fp8.convert(model, "rowwise", filter=lambda module, name: name == "lm_head")
    assert row(model, "blocks.0.q_proj").endswith(expected)
    assert row(model, "lm_head").endswith("rowwise (not frozen)")


def test_freeze_leaves_subclasses_and_other_dtypes():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(16, 16), nn.Linear(16, 16).double(), nn.Linear(16, 16))
    fp8.freeze(model, filter=every)
    assert frozen_layers(model) == ["2"]
    assert "- (a subclass of nn.Linear: Own)" in row(model, "0")
    assert "float64 weight; FP8 takes" in row(model, "1")


def test_freeze_leaves_weights_that_are_read_past_the_forward():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.warns(UserWarning, match="froze nothing: of 1 nn.Linear"):
        fp8.freeze(attention, filter=every)


@pytest.mark.parametrize("kind", ["GatedMLP", "MLP", "MergedLinear"])
def test_freeze_leaves_blocks_and_says_so(kind):
    options = {"out_features": {"q": 16, "k": 16}} if kind == "MergedLinear" else {}
    block = getattr(fp8, kind)(*([16] if options else [16, 32]), **options)
    model = nn.Sequential(block, nn.Linear(16, 16))
    fp8.freeze(model, filter=every)
    assert frozen_layers(model) == ["1"]
    name, child = next(iter(block.named_children()))
    assert type(child) is fp8.Linear
    assert f"tensorwise (not frozen: a layer of an fp8.{kind})" in row(model, f"0.{name}")


def test_freeze_leaves_layers_whose_forward_was_replaced():
    """As accelerate's hooks do, whose offloaded weights would be cast into codes."""
    model = convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "rowwise")
    own = model[0].forward
    model[0].forward = lambda x: own(x)
    fp8.freeze(model)
    assert frozen_layers(model) == ["1"]
    assert "(not frozen: its forward was replaced on the instance; freeze" in row(model, "0")
    model(torch.randn(2, 16))


def test_freeze_leaves_parametrized_layers():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    with pytest.warns(UserWarning, match="froze nothing"):
        fp8.freeze(nn.Sequential(linear), filter=every)


def test_freeze_refuses_before_it_changes_anything():
    with pytest.raises(TypeError, match=r"fp8.freeze: expected a torch.nn.Module, got dict"):
        fp8.freeze({})
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="expected a recipe out of"):
        fp8.freeze(model, "rowwize")
    with pytest.raises(TypeError, match="filter must be a function"):
        fp8.freeze(model, filter="mlp")
    convert(model, "tensorwise")
    model[1].input_scale = torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"static input_scale, .* got 'rowwise'; .*\(1\)"):
        fp8.freeze(model, "rowwise")
    assert not frozen_layers(model)


def test_summary_counts_frozen_layers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    fp8.freeze(model, "blockwise", filter=lambda module, name: name == "0")
    fp8.freeze(model, "rowwise", filter=lambda module, name: name == "1")
    assert (
        fp8.summary(model)
        == """\
name  in -> out  dtype          recipe
0     16 -> 16   float8_e4m3fn  frozen blockwise
1     16 -> 16   float8_e4m3fn  frozen rowwise
2     16 -> 16   float32        - (not frozen)
3 linear: 2 in FP8 (1 frozen blockwise, 1 frozen rowwise), 1 left alone; 66.7% of their weight \
elements in FP8"""
    )


def test_summary_notices_frozen_layers_that_are_never_called():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fp8.freeze(model)
    model[0](torch.randn(2, 16))
    with pytest.warns(UserWarning, match="never called.*'1'"):
        assert "frozen rowwise, never called" in row(model, "1")


def test_convert_and_revert_leave_frozen_layers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fp8.freeze(model, filter=lambda module, name: name == "0")
    convert(model, "tensorwise")
    assert [type(m) for m in model] == [fp8.FrozenLinear, fp8.Linear]
    fp8.revert(model)
    assert [type(m) for m in model] == [fp8.FrozenLinear, nn.Linear]


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.wi(x)
        if x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_freeze_leaves_layers_whose_dtype_is_cast_to():
    """The dtype of codes is no dtype to cast an input to."""
    model = fp8.freeze(nn.Sequential(Casting()), filter=every)
    assert frozen_layers(model) == ["0.wi"]
    assert "- (Casting.forward casts to the dtype of its weight)" in row(model, "0.wo")
    assert model(torch.randn(2, 16)).dtype == torch.float32
