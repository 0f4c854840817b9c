"""What bench_model measures: transformers' models at a checkpoint's shapes, their steps, and the
variants that are made of them; tiny ones, on a CPU that passes for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fp8")
pytest.importorskip("transformers", minversion="5.0")
if not (Path(__file__).parents[3] / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)

import bench_model
import model_cases
import model_variants
import models
import peers
from model_cases import CASES
from small_models import TINY, tiny

import fp8


def test_cases_name_variants_that_exist():
    for case in CASES:
        assert set(case.variants) <= set(model_variants.VARIANTS)
        assert case.variants[0] == "bf16"
        assert case.sequences * case.context == 8192
    assert [str(case) for case in CASES][:3] == [
        "Llama-3-8B, 4 layers, 2 × 4096",
        "Llama-3-8B, 4 layers, 4 × 2048",
        "Llama-3-8B, one layer, 2 × 4096",
    ]
    (quick,) = model_cases.model_cases(quick=True)
    assert not any(name.endswith("compiled") for name in quick.variants)


@pytest.mark.parametrize("kind", TINY)
def test_models_are_those_of_transformers(cpu_as_gpu, cases, kind):
    """The configuration takes every size, the same weights come again, and convert takes layers
    and experts alike; of one layer too."""
    case = tiny(kind)
    model, again = models.build(case), models.build(case)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(models.decoder_layers(model)) == 2
    if case.mixture:
        assert model.get_experts_implementation()[""] == "grouped_mm"
    made = peers.ours("tensorwise").make(models.build(case._replace(part="layer")))
    assert len(models.decoder_layers(made)) == 1
    assert any(isinstance(child, fp8.Linear) for child in made.modules())
    calls = models.calls(made, case._replace(part="layer"))
    assert calls.step() is None
    assert calls.without_optimizer is None
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_shapes_are_those_of_the_checkpoints():
    """Parameters of a layer, in millions, as the checkpoints have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for architecture in (
        model_cases.LLAMA,
        model_cases.QWEN3,
        model_cases.QWEN3_MOE,
        model_cases.MIXTRAL,
    ):
        config = AutoConfig.for_model(
            architecture.model_type, **architecture.sizes, num_hidden_layers=1, vocab_size=8
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.model.layers.parameters())
        found[architecture.name] = round(count / 1e6)
    assert found == {
        "Llama-3-8B": 218,
        "Qwen3-8B": 193,
        "Qwen3-30B-A3B": 623,
        "Mixtral-8x7B": 1451,
    }


def test_training_step_trains(cpu_as_gpu, cases):
    case = tiny("llama")
    model = models.build(case)
    calls = models.calls(model, case)
    losses = [float(calls.step()) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    calls.without_optimizer()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_context_is_around_the_forward(cpu_as_gpu, cases):
    from contextlib import contextmanager

    entered = []

    @contextmanager
    def context():
        entered.append(torch.is_grad_enabled())
        yield

    for case in (tiny("llama"), tiny("llama", part="layer", layers=1)):
        models.calls(models.build(case), case, context).step()
    assert entered == [True, True]


def test_variants_can_be_made_or_say_why():
    found = peers.gather(*model_variants.VARIANTS.items())
    made = [peer.name for peer in found.found]
    assert len(set(made)) == len(made)
    assert len(made) + len(found.skipped) == len(model_variants.VARIANTS)
    for recipe in fp8.RECIPES:
        assert {f"fp8 {recipe}", f"fp8 {recipe} compiled"} <= set(made)
    assert {"bf16", "bf16 compiled"} <= set(made)
    assert not any(name.startswith("fp8") and "Liger" not in name for name in found.skipped)
    fatal = [name for name in model_variants.VARIANTS if model_variants.must_work(name)]
    assert len(fatal) == 1 + 5 * len(fp8.RECIPES)


def test_each_layer_is_compiled_alone(cpu_as_gpu, cases, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model = model_variants.VARIANTS["fp8 delayed compiled"]().make(models.build(tiny("llama")))
    assert [each.__name__ for each in compiled] == ["LlamaDecoderLayer"] * 2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model_variants.VARIANTS["fp8 delayed compiled"]().settle == peers.DELAYED_CALLS


def test_peers_leave_lm_head_alone(cpu_as_gpu, cases):
    class Other(torch.nn.Linear):
        pass

    def replace(module):
        for child in module.modules():
            if type(child) is torch.nn.Linear:
                child.__class__ = Other

    model = model_variants.in_layers(peers.Peer("other", replace))(models.build(tiny("llama")))
    assert sum(isinstance(child, Other) for child in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear


def test_loss_that_is_not_finite_is_refused(cpu_as_gpu, cases):
    def spoil(model):
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        return model

    with pytest.raises(ValueError, match="the loss is nan"):
        bench_model.settled(tiny("llama"), peers.Peer("spoilt", spoil))
