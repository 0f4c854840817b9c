"""`save` of fp8.convert: what fused MLPs keep of gate and up for the backward."""

from __future__ import annotations

import copy
import pickle

import mlp_models as models
import pytest
import torch
from mlp_models import K, data, fuse, is_fused, nodes
from reference import assert_same_bits
from torch import nn

import fp8
from fp8.nn import _fused_mlps
from fp8.nn._mlp import SAVES

FORMS = {"gated": models.Gated, "merged": models.Merged, "plain": models.Plain}
LAYERS = {
    "gated": ("b", "a", "c"),
    "merged": ("both", None, "out"),
    "plain": ("one", None, "two"),
}  # gate, up and down


def convert(module: nn.Module, save: str) -> nn.Module:
    return fp8.convert(module, filter=lambda *_: True, fuse={"mlp"}, save=save)


def saved(module: nn.Module) -> str:
    notes: _fused_mlps.Notes = vars(module)[_fused_mlps.NOTES]
    return notes.save


def grads(module: nn.Module) -> dict[str, torch.Tensor]:
    assert nodes(module, data()) == 1
    return models.step(module, data())[1]


def by_operator(module: nn.Module, form: str, save: str) -> dict[str, torch.Tensor]:
    """The step of `grads`, of fp8.ops.mlp itself."""
    gate, up, down = (None if n is None else module.get_submodule(n) for n in LAYERS[form])

    class Explicit(nn.Module):
        def forward(self, x):
            return fp8.ops.mlp(
                x,
                gate.weight,
                None if up is None else up.weight,
                down.weight,
                activation="gelu" if form == "plain" else "silu",
                gate_bias=gate.bias,
                up_bias=None if up is None else up.bias,
                down_bias=down.bias,
                save=save,
            )

    explicit = Explicit()
    explicit.inner = module
    found = models.step(explicit, data())[1]
    return {name.removeprefix("inner."): grad for name, grad in found.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("save", SAVES)
def test_convert_saves(form, save):
    module = convert(FORMS[form]().bfloat16(), save)
    assert (f"save={save}" in fp8.summary(module)) == (save != "bf16")
    expected = by_operator(module, form, save)
    found = grads(module)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_same_bits(grad, expected[name], name)
    if save == "fp8":
        other = by_operator(module, form, "bf16")
        assert not all(torch.equal(found[name], other[name]) for name in found)


def test_convert_again_saves_otherwise():
    module = convert(models.Gated().bfloat16(), "fp8")
    first = grads(module)
    assert saved(convert(module, "recompute")) == "recompute"
    assert saved(fuse(module)) == "bf16"
    assert_same_bits(grads(convert(module, "fp8"))["c.weight"], first["c.weight"])
    assert not is_fused(fp8.revert(module))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_copies_save_the_same(how):
    module = convert(models.Gated().bfloat16(), "fp8")
    copies = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    }
    twin = copies[how](module)
    assert saved(twin) == "fp8"
    expected = grads(module)
    for name, grad in grads(twin).items():
        assert_same_bits(grad, expected[name], name)


def test_compiled_code_follows_save():
    module = convert(models.Gated().bfloat16(), "fp8")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for save in ("fp8", "bf16", "fp8"):
        convert(module, save)
        expected = models.step(module, data())[1]
        for name, grad in models.step(compiled, data())[1].items():
            assert_same_bits(grad, expected[name.removeprefix("_orig_mod.")], name)


def test_convert_leaves_save_of_own_blocks():
    model = nn.ModuleList([fp8.GatedMLP(K, 48, save="recompute"), models.Gated()])
    convert(model, "fp8")
    assert model[0].save == "recompute"
    assert saved(model[1]) == "fp8"


def test_convert_refuses_other_saves():
    module = models.Gated()
    with pytest.raises(ValueError, match=r"fp8.convert: expected save out of .*, got 'int8'"):
        convert(module, "int8")
    assert not is_fused(module)
    assert type(module.a) is nn.Linear
