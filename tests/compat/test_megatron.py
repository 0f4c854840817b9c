"""Megatron-Core's parallel linears in FP8: a GPT on one process, and tensor parallel on two."""

from __future__ import annotations

import warnings

import megatron_program
import pytest
import torch
import two_processes
from converted import CLOSE, relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Apex and Transformer Engine, which are not there
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from fp8.integrations import megatron


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes.run("megatron_program.py", tmp_path_factory.mktemp("megatron"))


CASES = [("tensorwise", 1), *((recipe, 2) for recipe in megatron_program.RECIPES)]


@pytest.mark.parametrize(("recipe", "size"), CASES)
def test_megatron_model_trains_up_to_fp8(results, recipe, size):
    for result in results:
        exact_loss, exact = result[f"exact {size}"]
        loss, grads = result[f"{recipe} {size}"]
        assert loss != exact_loss
        assert loss == pytest.approx(exact_loss, rel=0.03)
        assert grads.keys() == exact.keys()
        ours, theirs = (
            torch.cat([g.double().flatten() for g in each.values()]) for each in (grads, exact)
        )
        assert relative(ours, theirs) < CLOSE


def test_megatron_ranks_agree(results):
    """The input's gradient of a column parallel layer is summed over the ranks: else what lies
    before it, and is on every rank, would train apart."""
    for key in ("exact 2", *(f"{recipe} 2" for recipe in megatron_program.RECIPES)):
        (loss, grads), (other_loss, others) = (result[key] for result in results)
        assert loss == other_loss
        for name in grads:
            if "norm" in name or "position" in name:
                assert torch.equal(grads[name], others[name]), (key, name)


@pytest.mark.parametrize("size", [1, 2])
def test_megatron_main_grad_takes_the_gradients(results, size):
    """Of both micro-batches; the backward adds in fp32 what .grad is the sum of."""
    for result in results:
        _, grads = result[f"main_grad {size}"]
        _, expected = result[f"{megatron_program.RECIPES[0]} {size}"]
        linears = [name for name in grads if ".linear_" in name and name.endswith(".weight")]
        assert len(linears) == 8
        for name in linears:
            assert relative(grads[name], expected[name]) < 1e-5, name


def test_megatron_spec_is_copied():
    plain = megatron_program.spec()
    before = repr(plain)
    ours = megatron.in_fp8(plain, "rowwise:power_of_two")
    assert repr(plain) == before
    replaced = ours.submodules.self_attention.submodules.linear_qkv
    assert replaced.module is megatron.ColumnParallelLinear
    assert replaced.params == {"recipe": "rowwise:power_of_two"}
    assert ours.submodules.self_attention.submodules.core_attention is megatron_program.Attention
    again = megatron.in_fp8([plain, None], "rowwise")
    assert again[1] is None


def test_megatron_in_fp8_refuses():
    with pytest.raises(ValueError, match="e4m3"):
        megatron.in_fp8(megatron_program.spec(), "e4m3")
    with pytest.raises(ValueError, match="expected a recipe of dynamic scaling, got 'delayed'"):
        megatron.in_fp8(megatron_program.spec(), "delayed")
    other = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=torch.nn.Linear))
    with pytest.raises(ValueError, match=r"expected a spec with ColumnParallelLinear or Row.*MLP"):
        megatron.in_fp8(other)
