"""The weight of a frozen layer, read by code that takes it for numbers: as PEFT's, without PEFT.
tests/compat/test_lora_merging.py has the package itself."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import fp8

READERS = """
class Linear:
    def merge(self, layer):
        return layer.weight

    def device_of(self, layer):
        return layer.weight.device

def dequantize_module_weight(layer):
    return layer.weight

def get_base_weight(layer):
    return layer.weight
"""


def layer() -> fp8.FrozenLinear:
    return fp8.FrozenLinear.from_linear(nn.Linear(32, 16).bfloat16(), "rowwise")


def readers(module: str) -> dict:
    space = {"__name__": module}
    exec(READERS, space)
    return space


@pytest.fixture
def _with_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", ModuleType("peft"))


@pytest.mark.usefixtures("_with_peft")
def test_frozen_weight_tells_peft_that_it_holds_codes():
    lora, other = readers("peft.tuners.lora.layer"), readers("peft.tuners.oft.layer")
    adopt = r"^fp8.FrozenLinear: Linear.merge of peft.tuners.lora.layer .* FP8 codes. Call .*adopt"
    with pytest.raises(NotImplementedError, match=adopt):
        lora["Linear"]().merge(layer())
    for function in (
        other["Linear"]().merge,
        *(other[name] for name in ("dequantize_module_weight", "get_base_weight")),
    ):
        with pytest.raises(NotImplementedError, match=r"of peft.tuners.oft.layer .* plain LoRA"):
            function(layer())


@pytest.mark.usefixtures("_with_peft")
def test_frozen_weight_is_there_for_everyone_else():
    own = layer()
    assert readers("peft.tuners.lora.layer")["Linear"]().device_of(own) == torch.device("cpu")
    assert readers("somewhere.peft.tuners")["Linear"]().merge(own) is own._parameters["weight"]
    assert own.weight is own._parameters["weight"]
    x = torch.randn(4, 32, dtype=torch.bfloat16)

    def reading(x: torch.Tensor) -> torch.Tensor:
        return own(x) * own.weight.shape[0]

    compiled = torch.compile(reading, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), reading(x))


def test_frozen_weight_is_an_attribute_as_nn_module_has_it():
    own = layer()
    weight = own.weight
    del own.weight
    assert not hasattr(own, "weight")
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        own.weight  # noqa: B018
    own.weight = weight
    assert list(dict(own.named_parameters())) == ["weight_scale", "bias", "weight"]
    del own.weight
    own.weight = weight.detach()  # as FSDP1 does: a plain tensor
    assert own.weight.data_ptr() == weight.data_ptr()
    assert own(torch.randn(4, 32, dtype=torch.bfloat16)).shape == (4, 16)
