"""Fused MLPs in what programs do: checkpoints, compilers, copies, caches, processes, going back."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import mlp_models as models
import pytest
import torch
from mlp_models import K, assert_same_step, data, fuse, is_fused, nodes, pair
from reference import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.nn import _fused_mlps

FORMS = {"gated": models.Gated, "merged": models.Merged, "plain": models.Plain}


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_mlp_checkpointed(reentrant, recipe):
    fused, plain = pair(models.Gated(), recipe)
    x = data()
    inside = Checkpointed(copy.deepcopy(fused), reentrant)  # asked in its first call: in there
    (y, grads), (expected, theirs) = models.step(inside, x), models.step(fused, x)
    assert_same_bits(y, expected)
    for name, grad in theirs.items():
        assert_same_bits(grads["x" if name == "x" else f"block.{name}"], grad, name)
    assert_same_bits(y, models.step(plain, x)[0])


def targets(compiled_module, *args):
    """The operators of the graphs that a compiler sees."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compiled_module, backend=backend, fullgraph=True)
    compiled(*args)
    return compiled, seen


@pytest.mark.parametrize("form", FORMS)
def test_mlp_compiled(form):
    fused, plain = pair(FORMS[form](nn.SiLU()))
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    (y, grads), (expected, theirs) = models.step(compiled, data()), models.step(plain, data())
    assert_same_bits(y, expected)
    for name in ("x",) if form != "gated" else ():
        assert_same_bits(grads[name], theirs[name])
    for copied in (fused, copy.deepcopy(fused)):
        compiled, seen = targets(copied, data())
        assert "fp8.mlp.default" in seen
        assert "fp8.fused_linear.default" not in seen
        copied.act = nn.GELU()
        assert_same_bits(compiled(data()), copied(data()))
        copied.act = nn.Tanh()
        assert_same_bits(compiled(data()), copied(data()))
        assert nodes(copied, data()) == 0
    assert "fp8.mlp.default" not in targets(fused, data())[1]


def test_mlp_compiled_depends_on_attributes():
    fused, _ = pair(models.Clamped())
    compiled, seen = targets(fused, 3 * data())
    assert "fp8.mlp.default" in seen
    fused.limit = 1.0
    assert_same_bits(compiled(3 * data()), fused(3 * data()))


def test_mlp_compiled_depends_on_the_classs_forward(monkeypatch):
    fused, _ = pair(models.Gated())
    compiled, seen = targets(fused, data())
    assert "fp8.mlp.default" in seen
    monkeypatch.setattr(models.Gated, "forward", lambda self, x: x + 1)
    assert_same_bits(compiled(data()), data() + 1)


@pytest.mark.parametrize("form", FORMS)
def test_mlp_pickles_and_copies(form):
    module = nn.Sequential(fuse(FORMS[form](nn.SiLU())))
    x = data(torch.float32)
    pickled = pickle.dumps(module, protocol=0)
    assert b"fp8.nn" in pickled
    assert b"fp8.nn._" not in pickled
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (loaded, copy.deepcopy(module), pickle.loads(pickled)):
        assert type(copied[0]) is type(module[0])
        assert "fused: mlp" in fp8.summary(copied)
        assert_same_bits(copied(x), module(x))
        assert nodes(copied, x) == 1
    shallow = copy.copy(module[0])
    assert nodes(shallow, x) == nodes(module, x) == 1
    fp8.revert(loaded)
    assert not is_fused(loaded[0])
    assert is_fused(module[0])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_mlp_cached_weights(recipe):
    fused, plain = pair(models.Gated(), recipe)
    with fp8.cached_weights(nn.ModuleList([fused, plain])):
        for _ in range(2):
            assert_same_step(fused, plain, data(), two=True)
        for module in (fused, plain):
            with torch.no_grad():
                module.b.weight.mul_(2)
        assert_same_step(fused, plain, data(), two=True)
        for module in (fused, plain):
            module.c.weight.data.mul_(3)
        assert_same_step(fused, plain, data(), two=True)


def test_mlp_frozen_parts():
    for names in (("a",), ("b", "c"), ("a", "b", "c")):
        fused, plain = pair(models.Gated(bias=True))
        for module in (fused, plain):
            for name in names:
                getattr(module, name).requires_grad_(False)
        assert_same_step(fused, plain, data(), two=True)


def test_mlp_revert_gives_everything_back():
    model = nn.Sequential(models.Gated(), models.Plain(), nn.LayerNorm(K))
    kinds = [type(m) for m in model.modules()]
    attributes = [vars(m).keys() for m in model.modules()]
    fuse(model, kinds={"mlp", "norms"})
    assert [is_fused(m) for m in model] == [True, True, False]
    model(data(torch.float32))
    fp8.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [vars(m).keys() for m in model.modules()] == attributes


def test_mlp_undone_by_another_convert():
    model = nn.Sequential(models.Gated())
    fuse(model)
    notes = vars(model[0])["fp8_mlp"]
    fuse(model)
    assert vars(model[0])["fp8_mlp"] is notes
    fuse(model, "rowwise")
    assert is_fused(model[0])
    assert nodes(model, data(torch.float32)) == 1
    fuse(model, kinds=False)
    assert not is_fused(model[0])
    assert "fp8_mlp" not in vars(model[0])


def test_mlp_convert_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(models.Gated(), models.Plain())
    kinds = [type(m) for m in model.modules()]
    attributes = [vars(m).keys() for m in model.modules()]

    def fail(base):
        if base is models.Plain:
            raise KeyboardInterrupt
        return _fused_mlps._make(base)

    monkeypatch.setattr("fp8.conversion._mlp_fusion.fused_class", fail)
    with pytest.raises(KeyboardInterrupt):
        fuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [vars(m).keys() for m in model.modules()] == attributes


def test_mlp_summary():
    model = nn.Sequential(models.Gated(), models.Merged(), models.Plain(), models.Gated())
    fuse(model)
    fp8.revert(model[3].a)
    model[2].one.register_forward_hook(lambda *_: None)
    model(data(torch.float32)).sum().backward()
    *rows, _, total = fp8.summary(model).splitlines()
    lines = {row.split()[0]: row for row in rows}
    assert lines["0"].split()[1:6] == ["32", "->", "48", "->", "32"]
    assert lines["0"].endswith("float32  fused: mlp, gated, silu")
    assert lines["1"].endswith("fused: mlp, merged, silu")
    assert lines["2"].endswith("- (not fused: one has hooks)")
    assert lines["3"].endswith("- (not fused: a is no fp8.Linear)")
    assert total == "2 mlp fused"


def test_mlp_layers_are_called():
    model = fuse(nn.Sequential(models.Gated(), models.Gated()))
    model[0](data(torch.float32)).sum().backward()
    with pytest.warns(UserWarning, match="never called"):
        lines = fp8.summary(model).splitlines()
    called = [line for line in lines if line.startswith("0.")]
    assert len(called) == 3
    assert not any("never called" in line for line in called)
    assert sum("never called" in line for line in lines) == 3


def test_mlp_calibrate_sees_every_layer():
    fused, plain = pair(models.Gated())
    for module in (fused, plain):
        with fp8.calibrate(module):
            module(data())
    assert [layer.input_scale for layer in (fused.a, fused.c)] == [
        layer.input_scale for layer in (plain.a, plain.c)
    ]
    assert_same_step(fused, plain, data(), node=False)
    fp8.uncalibrate(fused)
    fp8.uncalibrate(plain)
    assert_same_step(fused, plain, data(), two=True)


PROCESS = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path[:0] = {folders!r}
import mlp_models as models
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
torch.manual_seed(0)
x = models.data()
"""
DDP = """
fused, plain = models.pair(models.Plain())
wrapped = torch.nn.parallel.DistributedDataParallel(fused)
assert models.nodes(wrapped, x) == 1
(y, grads), (expected, theirs) = (models.step(m, x) for m in (wrapped, plain))
assert torch.equal(y, expected)
for name, grad in theirs.items():
    assert torch.equal(grads[name if name == "x" else "module." + name], grad), name
"""
FSDP2 = """
mesh = init_device_mesh("cpu", (1,))
for sharded, count in ((0, 1), (1, 1), (2, 0)):  # what is sharded by itself beside the model
    fused, plain = models.pair(models.Plain())
    model = nn.Sequential(fused)
    for module in ((), (fused,), (fused.one,))[sharded]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert models.nodes(model, x) == count, sharded
    asked = []
    probe = models._fused_mlps.probe
    models._fused_mlps.probe = lambda *args: asked.append(args) or probe(*args)
    for _ in range(3):
        (y, grads), (expected, theirs) = (models.step(m, x) for m in (model, plain))
        assert torch.equal(y, expected)
        for name, grad in theirs.items():
            found = grads["x"] if name == "x" else grads["0." + name].full_tensor()
            assert torch.equal(found, grad), name
    models._fused_mlps.probe = probe
    assert not asked, sharded
"""


@pytest.mark.parametrize("program", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_mlp_in_a_process_group(tmp_path, program):
    folder = os.path.dirname(__file__)
    folders = [folder, os.path.dirname(folder)]
    program = PROCESS.format(folders=folders, file=tmp_path / "store") + program
    program += "dist.destroy_process_group()\n"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
