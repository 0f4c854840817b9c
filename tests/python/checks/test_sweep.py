"""make sweep: a sample of its families, each with another of its variants; and what it notices."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import cases
import steps
import sweep
import variants
from families import MOST_PARAMETERS, Unfit, families, inputs, make, named

import fp8

SAMPLE = {
    "llama": "hook",
    "qwen3_moe": "checkpointing",
    "gemma3_text": "generate",
    "phi3": "reentrant checkpointing",
    "gpt_neox": "instance forward",
    "glm": "autocast",
    "t5": "frozen",
    "bert": "adapters",
    "vit": "adapters",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def examine(name: str, variant: str, device: str = "cpu") -> cases.Outcome:
    (family,) = named([name])
    return cases.examine(family, families().index(family), device, variant)


@pytest.mark.parametrize(("name", "variant"), SAMPLE.items())
def test_sweep_of_a_family(name, variant):
    outcome = examine(name, variant)
    assert outcome.failures == []
    assert outcome.status == "passed"
    assert {"near bf16", "fused", "bf16", "revert", variant} <= set(outcome.checks)
    assert not outcome.reason
    assert outcome.kinds


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "variant"), SAMPLE.items())
def test_sweep_of_a_family_on_a_gpu(name, variant):
    assert examine(name, variant, "cuda").failures == []


def test_sweep_sample_has_every_variant():
    assert set(SAMPLE.values()) == variants.VARIANTS.keys() - {"compile"}
    turns = {variants.turn(family.name, number) for number, family in enumerate(families())}
    assert turns == variants.VARIANTS.keys()
    assert set(variants.COMPILED) <= {family.name for family in families()}


def different(monkeypatch, change):
    """A fused model that `change` has made another one."""

    def convert(model, recipe, fuse):
        made = steps.convert(model, recipe, fuse)
        if fuse is not False:
            with torch.no_grad():
                change(made)
        return made

    monkeypatch.setattr(cases, "convert", convert)


def test_sweep_notices_another_value(monkeypatch):
    different(monkeypatch, lambda model: model.model.norm.weight.mul_(1.05))
    outcome = examine("llama", "frozen")
    failed = {failure.split(":")[0] for failure in outcome.failures}
    assert {"fused", "rope", "mlp"} <= failed
    assert outcome.status == "failed"


def test_sweep_notices_a_gradient_that_is_missing(monkeypatch):
    different(monkeypatch, lambda model: model.model.norm.weight.requires_grad_(False))
    failures = examine("llama", "frozen").failures
    assert any("gradients of one alone: model.norm.weight" in failure for failure in failures)


def test_sweep_notices_what_stays_after_revert(monkeypatch):
    monkeypatch.setattr(fp8, "revert", lambda model: model)
    (failure,) = examine("llama", "frozen").failures
    assert "revert: Mismatch: classes that stay: " in failure


def subject(name: str) -> variants.Subject:
    (family,) = named([name])
    plain = make(family, torch.float32)
    given = inputs(family, plain)
    return variants.Subject(family, plain, given, cases.TIGHT, 0, False, 0.02, 0.3)


def test_sweep_notices_a_hook_that_is_not_called():
    models = []

    def on_every_second_model(module, calls):
        models.append(module)
        if len(models) % 2 == 0:
            module.register_forward_hook(lambda *_: calls.append("called"))

    with pytest.raises(steps.Mismatch, match="called 0 times, not"):
        variants.changed(subject("llama"), on_every_second_model)


def test_sweep_notices_other_tokens(monkeypatch):
    convert = steps.convert

    def other(model, recipe, fuse):
        made = convert(model, recipe, fuse)
        if fuse == {"rope", "mlp"}:
            torch.nn.init.normal_(made.lm_head.weight)
        return made

    monkeypatch.setattr(variants, "convert", other)
    with pytest.raises(steps.Mismatch, match="tokens"):
        variants.generate(subject("llama"))


def test_sweep_asks_again_where_a_code_was_at_a_tie():
    """One weight that is in the middle of two codes, and a bit to either side of it."""
    (family,) = named(["llama"])
    plain = make(family, torch.float32)
    given = inputs(family, plain)
    fused, composed = (steps.convert(plain, cases.TIGHT, fuse) for fuse in (True, False))
    with torch.no_grad():
        for model, side in ((fused, 1 + 2**-20), (composed, 1 - 2**-20)):
            model.model.layers[0].mlp.up_proj.weight[0, 0] = 0.5 * (1 + 2**-4) * side
    first = steps.distance(steps.run(fused, given), steps.run(composed, given))
    assert first.whole > 1e-3
    result = steps.beside(fused, composed, given, 1e-3)
    assert result.good
    with torch.no_grad():
        fused.model.norm.weight.mul_(1.05)
    result = steps.beside(fused, composed, given, 0.02)
    assert not result.good
    assert 0.02 < result.found.whole < 0.3


def test_sweep_says_why_a_family_is_left_out():
    with pytest.raises(ValueError, match="no such families: nobody"):
        named(["nobody"])
    (broken,) = named(["dinat"])
    with pytest.raises(Unfit, match="no small model: ImportError"):
        make(broken, torch.float32)
    outcome = cases.examine(broken, 0)
    assert outcome.status == "unfit"
    assert outcome.reason.startswith("no small model: ImportError: ")


def test_sweep_leaves_out_what_has_nothing_to_convert(monkeypatch):
    monkeypatch.setattr(cases, "convert", lambda model, recipe, fuse: model)
    outcome = examine("llama", "frozen")
    assert (outcome.status, outcome.reason) == ("unfit", "nothing to convert")


def test_sweep_models_are_small_and_repeated():
    (family,) = named(["mistral"])
    one, other = (make(family, torch.float32) for _ in range(2))
    assert sum(p.numel() for p in one.parameters()) < MOST_PARAMETERS / 10
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_sweep_command(tmp_path, capsys):
    arguments = ["--families", "llama", "dinat", "--variant", "frozen", "--device", "cpu"]
    assert sweep.main([*arguments, "--output", str(tmp_path)]) == 0
    torch.use_deterministic_algorithms(False)
    (path,) = tmp_path.glob("status_sweep_*.json")
    run = json.loads(path.read_text())
    assert run["passed"]
    assert run["counts"] | {"checks": 0} == {
        **{"passed": 1, "failed": 0, "skipped": 1, "decoders": 1, "others": 0},
        "checks": 0,
    }
    assert run["header"]["left_out"].keys() == {"dinat"}
    text = capsys.readouterr().out
    assert "sweep: 1 decoders and 0 others ran, 1 left out; 0 failures" in text


def test_sweep_that_met_too_little_fails():
    run = sweep.Sweep([], "cpu")
    run.missing()
    what = [failure["what"] for failure in run.failures]
    kinds = ["norms", "mlp", "rope", "residual", "siblings"]
    assert what == ["decoder families", "other families", *kinds]
