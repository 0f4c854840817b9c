"""fp8.numerics of transformers' experts: as one operator, and composed."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def mixtral():
    config = transformers.AutoConfig.for_model("mixtral", **SETTINGS)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return fp8.convert(model, "rowwise", filter=lambda module, name: "experts" in name)


def loss_and_gradients(model, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *grads]


def test_numerics_of_experts_as_one_operator(mixtral):
    model = copy.deepcopy(mixtral)
    tokens = torch.randint(96, (2, 24))
    expected = loss_and_gradients(model, tokens)
    with fp8.numerics(model) as found:
        got = loss_and_gradients(model, tokens)
    for a, b in zip(expected, got, strict=True):
        assert_same_bits(a, b)
    assert {(row.layer, row.operand) for row in found.rows} == {
        (f"{EXPERTS}.gate_up_proj", "x"),
        (f"{EXPERTS}.gate_up_proj", "weight"),
        (f"{EXPERTS}.down_proj", "weight"),
        (f"{EXPERTS}.down_proj", "dy"),
    }
    assert found.notes == [
        "of experts as one operator: not the second product's x, nor the first one's dy"
    ]


def test_numerics_of_experts_are_those_of_their_tensors(mixtral):
    """x and the weights against a quantization of their own."""
    model = copy.deepcopy(mixtral)
    experts = model.get_submodule(EXPERTS)
    seen = []
    before = experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with fp8.numerics(model) as found, torch.no_grad():
        model(torch.randint(96, (2, 24)))
    before.remove()
    rows = {(row.layer.rpartition(".")[2], row.operand): row for row in found.rows}
    tensors = {
        ("gate_up_proj", "x"): seen[0].reshape(-1, 64),
        ("gate_up_proj", "weight"): experts.gate_up_proj.detach(),
        ("down_proj", "weight"): experts.down_proj.detach(),
    }
    assert rows.keys() == tensors.keys()
    for key, tensor in tensors.items():
        decoded = fp8.ops.dequantize(*fp8.ops.quantize_rowwise(tensor), torch.float32)
        noise = (tensor.double() - decoded.double()).square().sum()
        expected = 10 * torch.log10(tensor.double().square().sum() / noise)
        assert rows[key].sqnr_db.mean == pytest.approx(expected.item(), rel=1e-6), key


def test_numerics_of_composed_experts_sees_every_operand(mixtral):
    """A gate that the operator does not know: two grouped products."""
    model = copy.deepcopy(mixtral)
    experts = model.get_submodule(EXPERTS)
    kind = type(experts)
    experts.__class__ = type(
        "Own", (kind,), {"_apply_gate": lambda self, x: x.chunk(2, -1)[0].cos()}
    )
    with fp8.numerics(model) as found:
        loss_and_gradients(model, torch.randint(96, (2, 24)))
    assert {(row.layer.rpartition(".")[2], row.operand) for row in found.rows} == {
        (name, operand)
        for name in ("gate_up_proj", "down_proj")
        for operand in ("x", "weight", "dy")
    }
