"""A gating that was recognized is looked at again when anything changes that it was found from, in
compiled code too; and what is kept of it."""

from __future__ import annotations

import copy
import functools
import pickle
import time
import types
from types import SimpleNamespace

import pytest
import torch
from converted_experts import Swish, call, converted, error
from torch import nn

from fp8.integrations.transformers import _experts as experts
from fp8.integrations.transformers._probe import State

LIMIT = [1e9]


def clamped_by_a_global(x):
    return nn.functional.silu(x.clamp(max=LIMIT[0]))


def a_closure():
    limit = 1e9

    def activation(x):
        return nn.functional.silu(x.clamp(max=limit))

    def lower():
        nonlocal limit
        limit = 0.5

    return activation, lower


def test_another_activation_runs():
    """The complaint: experts.act_fn = nn.ReLU() after fp8.convert, and SiLU was computed."""
    module = converted()
    module.act_fn = nn.ReLU()
    assert experts.gate_of(module) is None
    assert error(module) < 0.1
    module.act_fn = nn.GELU()
    assert experts.gate_of(module).activation == "gelu"
    assert error(module) < 0.1
    module.act_fn.approximate = "tanh"
    assert experts.gate_of(module).activation == "gelu_tanh"


def change_beta(module):
    module.act_fn = Swish()
    assert experts.gate_of(module).activation == "silu"
    module.act_fn.beta = 3.0


def change_within(module):
    module.act_fn = nn.Sequential(nn.Identity(), nn.SiLU())
    assert experts.gate_of(module).activation == "silu"
    module.act_fn[1] = nn.ReLU()


def change_partial(module):
    del module._modules["act_fn"]
    module.act_fn = functools.partial(nn.functional.gelu, approximate="none")
    assert experts.gate_of(module).activation == "gelu"
    module.act_fn = functools.partial(nn.functional.leaky_relu, negative_slope=0.2)


def replace_forward(module):
    module.act_fn.forward = nn.functional.relu


def replace_gate(module):
    module._apply_gate = lambda x: x.chunk(2, dim=-1)[0].tanh()


def replace_method(module):
    def gate(self, x):
        return x.chunk(2, dim=-1)[1].relu()

    module._apply_gate = types.MethodType(gate, module)


def change_settings(module):
    """A gate that looks into the config, whose numbers change."""

    def gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=self.config.cut)) * up

    module.config.cut = 1e9
    module._apply_gate = types.MethodType(gate, module)
    assert experts.gate_of(module).activation == "silu"
    module.config.cut = 0.5


def change_in_an_object(module):
    module.cut = SimpleNamespace(limits=[1e9])

    def gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=self.cut.limits[0])) * up

    module._apply_gate = types.MethodType(gate, module)
    assert experts.gate_of(module).activation == "silu"
    module.cut.limits[0] = 0.5


def change_a_closure(module):
    activation, lower = a_closure()
    module._apply_gate = lambda x: activation(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
    assert experts.gate_of(module).activation == "silu"
    lower()


def change_a_global(module):
    gate = clamped_by_a_global
    module._apply_gate = lambda x: gate(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
    assert experts.gate_of(module).activation == "silu"
    LIMIT[0] = 0.5


CHANGES = [
    change_beta,
    change_within,
    change_partial,
    replace_forward,
    replace_gate,
    replace_method,
    change_settings,
    change_in_an_object,
    change_a_closure,
    change_a_global,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change, monkeypatch):
    monkeypatch.setitem(globals(), "LIMIT", [1e9])
    module = converted()
    change(module)
    assert experts.gate_of(module) is None
    assert error(module) < 0.15


def test_a_change_of_the_class_is_noticed(monkeypatch):
    module = converted()
    monkeypatch.setattr(type(module.act_fn), "forward", lambda self, x: x.relu())
    assert experts.gate_of(module) is None
    monkeypatch.undo()
    assert experts.gate_of(module).activation == "silu"
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, x: x.chunk(2, dim=-1)[0].tanh())
    assert experts.gate_of(module) is None


def test_the_numbers_of_gpt_oss_are_followed():
    module = converted("gpt_oss")
    module.limit = 0.5
    assert experts.gate_of(module).limit == 0.5
    assert error(module) < 0.1
    module.alpha = 3.0
    assert experts.gate_of(module).alpha == 3.0
    assert error(module) < 0.1


def test_a_limit_beyond_the_numbers_in_use_is_seen():
    module = converted()
    for limit in (20.0, 1e3, 3e4):
        module._apply_gate = lambda x, limit=limit: (
            nn.functional.silu(x.chunk(2, dim=-1)[0].clamp(max=limit)) * x.chunk(2, dim=-1)[1]
        )
        assert experts.gate_of(module) is None, limit


def test_equal_values_do_not_ask_again():
    """A number set anew, a tensor of statistics in an attribute: nothing that counts changed."""
    module = converted("gpt_oss")
    module.seen = torch.zeros(3)
    known = experts.gate_of(module)
    found = vars(module)["fp8_gate"]._found
    module.limit = float(str(module.limit))
    module.seen = torch.ones(3)
    assert experts.gate_of(module) is known
    assert vars(module)["fp8_gate"]._found is found


# --- what is kept ---


def test_copies_keep_nothing_of_the_original():
    module = converted()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert vars(other)["fp8_gate"]._found is None
        assert torch.equal(other(*call(module)), module(*call(module)))
        other.act_fn = nn.ReLU()
        assert error(other) < 0.1
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules, act_fn=nn.ReLU())
    assert error(shallow) < 0.1
    assert experts.gate_of(module).activation == "silu"


def test_a_known_gating_holds_no_module_in_memory():
    import gc
    import weakref

    module = converted()
    gone = weakref.ref(module)
    gc.collect()
    gc.disable()
    try:
        del module
        assert gone() is None, "a cycle keeps the weights until the collector runs"
    finally:
        gc.enable()


def test_a_state_is_compared_fast():
    """A few microseconds; the bound leaves room for a busy machine."""
    module = converted()
    state = State(module, "_apply_gate", own=("fp8_gate", "fp8_settings"))
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            assert state.same(module)
        rounds.append((time.perf_counter() - began) / 200)
    assert min(rounds) < 30e-6


# --- torch.compile ---


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_notices_another_activation():
    module = converted()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)

    def compare():
        torch.testing.assert_close(compiled(*call(module)), module(*call(module)))
        assert error(module) < 0.1

    compare()
    for activation in (nn.ReLU(), nn.SiLU(), Swish(3.0), Swish(1.0)):
        module.act_fn = activation
        compare()
    module.act_fn.beta = 5.0
    compare()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_notices_another_limit():
    module = converted("gpt_oss")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for limit in (7.0, 0.5, 3.0):
        module.limit = limit
        experts.gate_of(module)  # known before it compiles: the fused passes
        torch.testing.assert_close(compiled(*call(module)), module(*call(module)))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_layers_share_their_code():
    """What the gating is found from is not compared by identity in compiled code."""
    layers = [converted() for _ in range(4)]
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for layer in layers * 2:
        layer(*call(layer))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
