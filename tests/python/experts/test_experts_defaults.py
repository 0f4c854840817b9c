"""Mixtures under any default dtype, device, grad and inference mode; conversions that fail; layers
that were never called; and GPT-2, whose layers are no nn.Linear."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from tiny_models import experts_of, make, relative, summary_row, tokens, transformers
from torch import nn

import fp8
from fp8.integrations.transformers import _experts as experts

MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


def every(module, name):
    return True


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def originals():
    return {family: experts_of(make(family)) for family in ("mixtral", "gpt_oss")}


def call(module):
    hidden = torch.randn(8, 64, dtype=torch.float32, device="cpu")
    index = torch.arange(16, device="cpu").view(8, 2) % module.num_experts
    return hidden, index, torch.full((8, 2), 0.5, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_convert_and_run_under_any_defaults(originals, default_dtype, family, mode, device):
    model = nn.ModuleDict({"experts": copy.deepcopy(next(iter(originals[family].values())))})
    module, given = model["experts"], call(model["experts"])
    expected = module(*given)
    with torch.device(device), mode():
        fp8.convert(model, filter=every)
        assert experts.gate_of(module) is not None
        y = module(*given)
        assert "not fused" not in fp8.summary(model)
    assert y.device.type == "cpu"
    assert 0 < relative(y, expected) < 0.1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_chosen_by_transformers_run_under_any_defaults(originals, default_dtype, device):
    fp8.integrations.transformers.register()
    module = copy.deepcopy(next(iter(originals["mixtral"].values())))
    given = call(module)
    expected = module(*given)
    module.config._experts_implementation = "fp8"
    with torch.device(device), torch.inference_mode():
        assert 0 < relative(module(*given), expected) < 0.1


def test_a_model_on_meta_is_converted(default_dtype):
    config = make("mixtral").config
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
        fp8.convert(model, filter=every)
    assert summary_row(model, "model.layers.0.mlp.experts")[-1] == "rowwise"
    assert all(parameter.is_meta for parameter in model.parameters())


class Interrupted(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def state(model):
    return [(m, m.__class__, dict(vars(m)), dict(m._buffers)) for m in model.modules()]


def test_a_conversion_that_fails_leaves_the_model_as_it_was():
    """In the second of two experts modules, with the linears converted already."""
    model = make("mixtral")
    experts_of(model)["model.layers.1.mlp.experts"].act_fn = Interrupted()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        fp8.convert(model, filter=every)
    assert state(model) == before
    model = fp8.convert(make("mixtral"), "rowwise", filter=every)
    experts_of(model)["model.layers.1.mlp.experts"].act_fn = Interrupted()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        fp8.convert(model, "tensorwise", filter=every)
    assert state(model) == before


def test_a_conversion_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch):
    """In the middle of its changes: linears and one of two experts modules are converted."""
    set_fp8, done = experts.set_fp8, []

    def once(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        set_fp8(*args)

    for model in (make("mixtral"), fp8.convert(make("mixtral"), "rowwise", filter=every)):
        before = state(model)
        done.clear()
        monkeypatch.setattr(experts, "set_fp8", once)
        with pytest.raises(KeyboardInterrupt):
            fp8.convert(model, "tensorwise", filter=every)
        monkeypatch.undo()
        assert done
        assert state(model) == before


def test_a_config_that_cannot_be_copied_leaves_the_model_as_it_was():
    class Config(transformers.MixtralConfig):
        def __copy__(self):
            raise RuntimeError("no copies")

    model = make("mixtral")
    for module in experts_of(model).values():
        module.config.__class__ = Config
    before = state(model)
    with pytest.raises(RuntimeError, match="no copies"):
        fp8.convert(model, filter=every)
    assert state(model) == before


# --- never called ---


def never(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = fp8.summary(model).splitlines()
    named = [line.split()[0] for line in lines if line.endswith(", never called")]
    assert all(repr(name) in str(caught[0].message) for name in named)
    assert len(caught) == bool(named)
    return named


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_mixture_that_ran_is_silent(family):
    model = fp8.convert(make(family), filter=every)
    assert never(model) == []
    model(tokens())
    assert never(model) == []
    assert never(copy.deepcopy(model)) == []


def test_experts_that_were_never_called_are_named():
    model = fp8.convert(make("mixtral"), filter=every)
    layer = model.model.layers[1]
    layer.mlp.forward = lambda hidden_states, *args, **kwargs: hidden_states
    model(tokens())
    assert never(model) == ["model.layers.1.mlp.experts"]


def test_compiled_experts_are_silent():
    torch._dynamo.reset()
    layers = nn.ModuleList(experts_of(fp8.convert(make("mixtral"), filter=every)).values())
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
        layer(*call(layer))
    torch._dynamo.reset()
    assert never(layers) == []


# --- GPT-2 ---


def gpt2():
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def test_conv1d_is_named_by_summary_and_warning():
    model = gpt2()
    with pytest.warns(
        UserWarning, match=r"converted nothing: all 1 nn.Linear .* 4 Conv1D layers of transformers"
    ):
        fp8.convert(model)
    row = summary_row(model, "transformer.h.0.attn.c_attn")
    assert row == ["32 -> 96", "float32", "- (Conv1D: not supported)"]
    last = fp8.summary(model).splitlines()[-1]
    assert last == "4 Conv1D of transformers, none in FP8: not supported"


def test_conv1d_alone_is_named():
    with pytest.warns(UserWarning, match=r"has no nn.Linear; 4 Conv1D layers of transformers"):
        fp8.convert(gpt2().transformer)
