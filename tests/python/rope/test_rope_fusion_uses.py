"""Models whose rotations fp8.convert fused, as programs use them: compiled, checkpointed, hooked,
saved, generating."""

from __future__ import annotations

import copy
import inspect
import io
import sys
import warnings

import pytest
import rope_modules as modules
import torch
from reference import assert_same_bits
from rope_modules import calls_of, fuse, inputs, is_fused, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")


def tiny(**more):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
    config = transformers.LlamaConfig(**(sizes | more))
    return transformers.LlamaForCausalLM(config).bfloat16()


def pair(**more):
    """A model in FP8 whose rotations are fused, and one whose are not."""
    fused = tiny(**more)
    plain = copy.deepcopy(fused)
    every = {"filter": lambda *_: True}
    return fp8.convert(fused, **every, fuse={"rope"}), fp8.convert(plain, **every, fuse=False)


def tokens(length=12):
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_model_has_the_same_bits(dynamic):
    """One operator each way in the graph, and no break."""
    fused, plain = pair()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (12, 13) if dynamic else (12,):
        ours = compiled(input_ids=tokens(length), use_cache=False).logits
        theirs = plain(input_ids=tokens(length), use_cache=False).logits
        assert_same_bits(ours, theirs, "logits")
    assert len(graphs) == 1
    assert sum("rope" in str(node.target) for node in graphs[0].graph.nodes) == 2


def test_compiled_training_has_the_same_bits():
    module = modules.Llamas()
    plain, given = copy.deepcopy(module), inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fuse(module), backend="aot_eager", fullgraph=True)
    for a, b in zip(step(compiled, given), step(plain, given), strict=True):
        assert_same_bits(a, b, "compiled")


def test_compiled_model_sees_a_patch(monkeypatch):
    module = fuse(modules.Llamas())
    torch._dynamo.reset()
    compiled, given = torch.compile(module, backend="eager"), inputs(torch.float32)
    first = compiled(*given)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "llamas", modules.backwards)
        patch.setattr(modules, "backwards", None)  # which would call itself
        patch.setattr(modules, "llamas", lambda q, k, cos, sin: (k, q))
        patched = compiled(*given)
        assert_same_bits(patched, module(*given), "patched")
    assert not torch.equal(first, patched)
    assert_same_bits(compiled(*given), first, "again")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    fused, plain = pair()
    for model in (fused, plain):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad, "gradient")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_one_module(reentrant):
    module = modules.Llamas()
    plain, given = copy.deepcopy(module), inputs(torch.float32)
    fuse(module)

    def again(x, *angles):
        return checkpoint(module, x, *angles, use_reentrant=reentrant)

    x, other = (given[0].clone().requires_grad_() for _ in range(2))
    again(x, *given[1:]).square().sum().backward()
    plain(other, *given[1:]).square().sum().backward()
    assert_same_bits(x.grad, other.grad, "x")
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad, "parameter")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(monkeypatch, cache):
    fused, plain = pair()
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    seen = calls_of(monkeypatch)
    ours = fused.eval().generate(tokens(), **options)
    assert len(seen) == 2 * 8
    assert torch.equal(ours, plain.eval().generate(tokens(), **options))


def test_hooks_run(monkeypatch):
    fused, _ = pair()
    attention, heard = fused.model.layers[0].self_attn, []
    attention.register_forward_pre_hook(lambda *_: heard.append("before"))
    attention.register_forward_hook(lambda *_: heard.append("after"))
    attention.register_full_backward_hook(lambda *_: heard.append("backward"))
    seen = calls_of(monkeypatch)
    fused(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert heard == ["before", "after", "backward"]
    assert len(seen) == 2


def test_whole_model_is_saved_and_loaded(monkeypatch):
    fused, _ = pair()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded, seen = torch.load(file, weights_only=False), calls_of(monkeypatch)
    ours, theirs = (m(input_ids=tokens(), use_cache=False).logits for m in (loaded, fused))
    assert_same_bits(ours, theirs, "logits")
    assert len(seen) == 4


def test_state_dict_is_as_before():
    fused, plain = pair()
    assert fused.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(fused.state_dict())


def test_functions_of_torch_func(monkeypatch):
    """Its transformations have no rules for the operator: the function runs."""
    module = fuse(modules.Llamas())
    plain = fp8.revert(copy.deepcopy(module))
    x, *angles = inputs(torch.float32)
    parameters = dict(module.named_parameters())
    ours, theirs = (
        torch.func.functional_call(m, parameters, (x, *angles)) for m in (module, plain)
    )
    assert_same_bits(ours, theirs, "call")
    seen, q = calls_of(monkeypatch), torch.randn(2, 4, 6, 16)

    def tangent(rotate):
        return torch.func.jvp(lambda q: rotate(q, q, *angles)[0], (q,), (q + 1,))[1]

    def mapped(rotate):
        one = [t[:1] for t in angles]
        return torch.vmap(lambda q: rotate(q[None], q[None], *one)[1])(q)

    for transformed in (tangent, mapped):
        made = transformed(vars(modules)["_fp8_rope_llamas"])
        assert_same_bits(made, transformed(modules.llamas), transformed.__name__)
    assert not seen


def test_symbolic_trace_takes_the_function():
    class Rotates(nn.Module):
        def forward(self, q, k, cos, sin):
            return modules_llamas(q, k, cos, sin)  # noqa: F821

    code = Rotates.forward.__code__
    names = tuple("llamas" if n == "modules_llamas" else n for n in code.co_names)
    Rotates.forward = type(Rotates.forward)(code.replace(co_names=names), vars(modules))
    module = fuse(Rotates())
    assert is_fused(module)
    traced = torch.fx.symbolic_trace(module)
    q, angles = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    for a, b in zip(traced(q, q, *angles), modules.llamas(q, q, *angles), strict=True):
        assert_same_bits(a, b, "traced")


def test_module_on_meta():
    with torch.device("meta"):
        module = fuse(modules.Llamas())
    assert is_fused(module)
    assert module(*inputs(torch.float32, "meta")).is_meta


def test_peeking_at_the_signature_sees_the_classs_own():
    fused, plain = pair()
    ours, theirs = (inspect.signature(m.model.layers[0].self_attn.forward) for m in (fused, plain))
    assert ours == theirs


def test_every_fusion_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny()
        kind = type(model.model.layers[0].self_attn)
        fp8.convert(model, filter=lambda *_: True)
    lines = fp8.summary(model).splitlines()
    assert {"5 norms fused", "2 rope fused"} <= set(lines)
    fp8.revert(model)
    assert type(model.model.layers[0].self_attn) is kind
    assert "fused" not in fp8.summary(model)
    assert kind.__module__ in sys.modules
