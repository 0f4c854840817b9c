"""What is compared, for one family.

Every check names what may differ, and by how much; what is not mentioned has the same bits.

`near bf16`  FP8 beside the model as it was: the noise of FP8, `converted.CLOSE` says of what size.
             Where tokens are routed, some take other experts; and where a model magnifies the
             roundings of bf16, beside float32, it magnifies those of FP8: AMPLIFIED. Such models
             widen the other bounds too, to what bf16 itself is off.
`rope`       that fusion alone: bits.
`residual`   that fusion, beside its norms alone: bits.
`mlp`        that fusion alone: the loss has the same bits; dx through two weights is rounded once
             less, which moves scales, so that codes of e5m2 are rounded anew (test_fused_mlps.py).
`norms`      norms and rotations alone, of a model in float32 where nothing is in FP8: the order of
             fp32 sums, 2^-24 each, magnified by what follows.
`fused`      everything together, in float32 with scales that are powers of two: such a difference
             moves a code here and there, and no scale; layers that are quantized as one operand
             share a scale, which counts for what is near zero. And in another recipe.
`bf16`       everything together, in bf16 with scales that follow every bit of an amax: an element
             of a norm that is one step off moves a scale, and with it every code: as `near bf16`.
`revert`     the model as it was: classes, parameters, a step, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from families import Family, Unfit, inputs, make
from steps import LOSS, Distance, Mismatch, beside, convert, distance, run, same_bits
from torch import Tensor, nn
from variants import CLOSE, NOISE, ROUTED, VARIANTS, NotHere, Subject, turn

import fp8
from fp8.conversion import _fusions
from fp8.integrations.transformers import _experts

TIGHT = "tensorwise:power_of_two"
OTHERS = ("rowwise:power_of_two", "blockwise:power_of_two", "rowwise_gw_hp:power_of_two")
COSINE = 0.9  # of FP8 beside bf16
ROUTED_COSINE = 0.75
AMPLIFIED = 24
"""An e4m3 code is off by 2^-5.4 on average, a number in bf16 by 2^-10.4: 32 times, of which the
backward's e5m2 has two, and there are fewer roundings to FP8 than to bf16."""
FLOAT32 = 1e-4
MLP = 0.25


def fused_kinds(model: nn.Module) -> set[str]:
    """Of the fusions that run somewhere in it."""
    return {fusion.name for fusion, m in _fusions.fused(model) if fusion.stale(m) is None}


def is_routed(model: nn.Module) -> bool:
    return any(_experts.in_fp8(m) for m in model.modules()) or any(
        "router" in name or name.endswith(".gate") for name, _ in model.named_modules()
    )


class Outcome:
    """What came of one family: facts for the table and the JSON."""

    def __init__(self, family: Family, variant: str) -> None:
        self.family, self.variant = family, variant
        self.status = "passed"  # or "failed", "unfit"
        self.reason = ""
        self.failures: list[str] = []
        self.checks: list[str] = []
        self.kinds: set[str] = set()
        self.distances: dict[str, Distance] = {}
        self.own = 0.0  # how far bf16 itself is from float32
        self.seconds = 0.0

    def check(self, name: str, good: Callable[[Distance], bool], found: Distance) -> None:
        self.checks.append(name)
        self.distances[name] = found
        if not good(found):
            self.failures.append(f"{name}: {found}")

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """A check that raises has failed; the others go on."""
        try:
            work()
        except NotHere as reason:
            self.reason = f"{name}: {reason}"
        except Exception as error:
            self.checks.append(name)
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            self.failures.append(f"{name}: {type(error).__name__}: {text[:300]}")


def examine(
    family: Family, number: int, device: str = "cpu", variant: str | None = None
) -> Outcome:
    """All checks, and the variant, or the one whose turn it is."""
    variant = variant or turn(family.name, number)
    outcome = Outcome(family, variant)
    try:
        plain = make(family, torch.bfloat16).to(device)
        given = inputs(family, plain)
        expected = _step_of_the_model_itself(plain, given)
    except Unfit as reason:
        outcome.status, outcome.reason = "unfit", str(reason)
        return outcome
    composed = convert(plain, "tensorwise", False)
    layers = sum(isinstance(m, fp8.Linear) for m in composed.modules())
    if not layers and not any(_experts.in_fp8(m) for m in composed.modules()):
        outcome.status, outcome.reason = "unfit", "nothing to convert"
        return outcome
    other = OTHERS[number % len(OTHERS)]
    exact = make(family, torch.float32).to(device)
    given32 = inputs(family, exact)
    outcome.own = distance(expected, run(exact, given32)).whole
    close, noise = max(CLOSE, outcome.own), max(NOISE, AMPLIFIED * outcome.own)
    subject = Subject(family, exact, given32, TIGHT, number, is_routed(exact), close, noise)
    for name, work in (
        ("near bf16", lambda: _near(outcome, composed, given, expected)),
        ("fusions", lambda: _each_fusion(outcome, plain, composed, given)),
        ("norms", lambda: _norms(outcome, exact, given32)),
        ("fused", lambda: _fused(outcome, "fused", exact, given32, TIGHT, close)),
        (other, lambda: _fused(outcome, other, exact, given32, other, close)),
        ("bf16", lambda: _fused(outcome, "bf16", plain, given, "tensorwise", noise)),
        ("revert", lambda: _reverted(outcome, plain, given)),
        (variant, lambda: _variant(outcome, subject)),
    ):
        outcome.attempt(name, work)
    if outcome.failures:
        outcome.status = "failed"
    return outcome


def _step_of_the_model_itself(plain: nn.Module, given: dict[str, Tensor]) -> Any:
    try:
        found = run(plain, given)
        again = run(copy.deepcopy(plain), given)
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")[:120]
        raise Unfit(f"the model itself fails: {type(error).__name__}: {text}") from error
    if not bool(found.loss.isfinite()) or not found.grads:
        raise Unfit("the model itself has no finite loss, or no gradient")
    if not same_bits(found, again):
        raise Unfit("the model itself does not repeat its bits")
    return found


def _near(outcome: Outcome, composed: nn.Module, given: dict[str, Tensor], expected: Any) -> None:
    least = ROUTED_COSINE if is_routed(composed) else COSINE
    found = distance(run(composed, given), expected)
    noise = AMPLIFIED * outcome.own
    outcome.check(
        "near bf16",
        lambda d: (d.loss < LOSS and d.cosine > least) or max(d.loss, d.whole) < noise,
        found,
    )


def _each_fusion(
    outcome: Outcome, plain: nn.Module, composed: nn.Module, given: dict[str, Tensor]
) -> None:
    theirs = run(composed, given)
    outcome.kinds = fused_kinds(convert(plain, "tensorwise", True))
    if "rope" in outcome.kinds:
        ours = run(convert(plain, "tensorwise", {"rope"}), given)
        outcome.check("rope", lambda _: same_bits(ours, theirs), distance(ours, theirs))
    if "residual" in outcome.kinds:
        ours, norms = (run(_only(plain, k), given) for k in ({"norms", "residual"}, {"norms"}))
        outcome.check("residual", lambda _: same_bits(ours, norms), distance(ours, norms))
    if "mlp" in outcome.kinds:
        ours = run(convert(plain, "tensorwise", {"mlp"}), given)
        found = distance(ours, theirs)
        limit = ROUTED if is_routed(composed) else MLP
        outcome.check("mlp", lambda d: d.loss == 0 and d.worst < limit, found)


def _norms(outcome: Outcome, plain: nn.Module, given: dict[str, Tensor]) -> None:
    if not outcome.kinds & {"norms", "rope"}:
        return
    fused = _only(plain, outcome.kinds & {"norms", "rope"})
    limit = max(FLOAT32, outcome.own / 2**8)  # bf16 is 2^16 times as coarse
    result = beside(fused, copy.deepcopy(plain), given, limit)
    outcome.check("norms", lambda _: result.good, result.found)


def _only(plain: nn.Module, kinds: set[str]) -> nn.Module:
    """A copy in which nothing but these is fused, and no layer is in FP8."""
    return fp8.convert(copy.deepcopy(plain), filter=lambda *_: False, fuse=kinds)


def _fused(
    outcome: Outcome,
    name: str,
    plain: nn.Module,
    given: dict[str, Tensor],
    recipe: str,
    limit: float,
) -> None:
    fused, composed = (convert(plain, recipe, fuse) for fuse in (True, False))
    limit = max(limit, ROUTED) if is_routed(fused) else limit
    result = beside(fused, composed, given, limit)
    outcome.check(name, lambda _: result.good, result.found)


def _reverted(outcome: Outcome, plain: nn.Module, given: dict[str, Tensor]) -> None:
    model, twin = convert(plain, "tensorwise", True), copy.deepcopy(plain)
    for each in (model, twin):
        run(each, given)  # some models count steps in buffers
    fp8.revert(model)
    outcome.checks.append("revert")
    kinds = [(type(a), type(b)) for a, b in zip(plain.modules(), model.modules(), strict=True)]
    if changed := [a.__name__ for a, b in kinds if a is not b]:
        raise Mismatch(f"classes that stay: {', '.join(changed[:4])}")
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    if ours.keys() != theirs.keys() or not all(map(torch.equal, ours.values(), theirs.values())):
        raise Mismatch("a reverted model has other parameters")
    if model.state_dict().keys() != plain.state_dict().keys():
        raise Mismatch("a reverted model has other names in its state_dict")
    if not same_bits(run(model, given), run(twin, given)):
        raise Mismatch("a reverted model's step has other bits")


def _variant(outcome: Outcome, subject: Subject) -> None:
    VARIANTS[outcome.variant](subject)
    outcome.checks.append(outcome.variant)
