"""What programs do with a converted model: each family takes one in turn, fused and composed alike.

A variant raises Mismatch where the fused model does something else than the composed one, and
NotHere where a family has no such thing.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from converted import Step
from families import Family
from steps import Distance, Mismatch, beside, convert, distance, run
from torch import Tensor, nn

import fp8
from fp8.conversion import _fusions

CLOSE = 0.02
"""Of all gradients together, relative, of a fused and a composed model in float32."""
ROUTED = 0.6  # where tokens may go to other experts
NOISE = 0.3  # in bf16, whose last bits move codes: converted.CLOSE
REPEATED = 1e-2
"""Of a step under checkpointing beside one without: the gradients of tensors that are used twice
are added in another order."""
TOKENS = 5


class NotHere(Exception):
    """Why a family has no such variant."""


class Subject(NamedTuple):
    """One family, and what its variant needs."""

    family: Family
    plain: nn.Module  # in float32
    given: dict[str, Tensor]
    recipe: str
    number: int
    routed: bool
    close: float  # of gradients, in float32
    noise: float  # in bf16

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A fused and a composed copy."""
        fused, composed = (convert(self.plain, self.recipe, fuse) for fuse in (True, False))
        return fused, composed

    def random(self) -> random.Random:
        return random.Random(self.number)

    def compare(self, fused: nn.Module, composed: nn.Module, close: float = 0.0) -> Distance:
        """A step of both."""
        limit = ROUTED if self.routed else close or self.close
        result = beside(fused, composed, self.given, limit)
        if not result.good:
            raise Mismatch(str(result.found))
        return result.found


def checkpointing(subject: Subject, use_reentrant: bool) -> None:
    """Gradients are those of the same model without it, and those of the composed one."""
    fused, composed = subject.pair()
    if not getattr(fused, "supports_gradient_checkpointing", False):
        raise NotHere("no gradient checkpointing")
    without = run(fused, subject.given)
    for model in (fused, composed):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant and subject.given.get("input_ids") is not None:
            model.enable_input_require_grads()
    subject.compare(fused, composed)
    found = distance(run(fused, subject.given), without)
    if not subject.routed and not max(found.loss, found.whole) <= max(REPEATED, subject.close):
        raise Mismatch(f"with checkpointing and without: {found}")


class Adapter(nn.Module):
    """A frozen layer and two small matrices, as PEFT's LoRA has them: where peft is not here."""

    def __init__(self, base_layer: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        down = torch.randn(4, base_layer.in_features, generator=generator)
        up = torch.randn(base_layer.out_features, 4, generator=generator)
        self.lora_a = nn.Parameter(0.1 * down.to(weight))
        self.lora_b = nn.Parameter(0.1 * up.to(weight))

    @property
    def weight(self) -> Tensor:
        """For code that asks for a weight's dtype."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        added = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return self.base_layer(x) + added


def adapters(subject: Subject) -> None:
    """LoRA on some of the layers, drawn; everything else is frozen."""
    chosen = subject.random()
    names = [n for n, m in subject.plain.named_modules() if type(m) is nn.Linear and n]
    names = [n for n in names if n.rpartition(".")[2] not in ("lm_head", "gate", "router")]
    targets = chosen.sample(names, min(len(names), chosen.randint(1, 4)))
    if not targets:
        raise NotHere("no layer for an adapter")
    models = [_adapted(model, targets) for model in subject.pair()]
    subject.compare(*models)


def _adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    generator = torch.Generator().manual_seed(9)
    if importlib.util.find_spec("peft"):
        import peft

        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(9)
            try:
                return peft.get_peft_model(model, config)
            except ValueError as error:
                raise NotHere(f"peft refuses: {error}") from error
    model.requires_grad_(False)
    for name in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _adapter(model, name, generator))
    return model


def _adapter(model: nn.Module, name: str, generator: torch.Generator) -> Adapter:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return Adapter(layer, generator).to(layer.weight.device)


def frozen(subject: Subject) -> None:
    """Half of the parameters, drawn one by one."""
    models = subject.pair()
    for model in models:
        chosen = subject.random()
        for p in model.parameters():
            p.requires_grad_(chosen.random() < 0.5)
        if not any(p.requires_grad for p in model.parameters()):
            next(model.parameters()).requires_grad_(True)
    subject.compare(*models)


def autocast(subject: Subject) -> None:
    """Parameters in float32, products in bf16."""
    models = subject.pair()
    device = next(subject.plain.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        try:
            run(subject.plain, subject.given)
        except Exception as error:
            raise NotHere(f"the model itself fails: {type(error).__name__}") from error
        subject.compare(*models, subject.noise)


def generate(subject: Subject) -> None:
    """Tokens with a cache: those of the composed model, bit for bit where forward has its bits, and
    its first logits up to the order of a norm's sums where norms are fused too."""
    tokens = subject.given.get("input_ids")
    if tokens is None or not hasattr(subject.plain, "generate") or not _can_generate(subject):
        raise NotHere("does not generate")
    exact = convert(subject.plain, subject.recipe, {"rope", "mlp"})
    fused, composed = subject.pair()
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = composed.eval().generate(tokens[:, :6], **settings)
        except Exception as error:
            raise NotHere(f"the composed model fails: {type(error).__name__}") from error
        found = exact.eval().generate(tokens[:, :6], **settings)
        close = fused.eval().generate(tokens[:, :6], **settings)
    if not torch.equal(found.sequences, expected.sequences):
        raise Mismatch(f"tokens {found.sequences.tolist()}, not {expected.sequences.tolist()}")
    error = (close.logits[0] - expected.logits[0]).norm() / expected.logits[0].norm()
    if not subject.routed and not float(error) < subject.close:
        raise Mismatch(f"first logits are {float(error):.2g} off")


def _can_generate(subject: Subject) -> bool:
    return subject.family.task in ("CausalLM", "Seq2SeqLM")


def compiled(subject: Subject) -> None:
    """By torch.compile, its operators run one by one: beside the same model in eager mode."""
    fused, _ = subject.pair()
    expected = run(fused, subject.given)
    try:
        _compiled_step(subject.plain, subject.given)
    except Exception as error:
        raise NotHere(f"the model itself fails: {type(error).__name__}") from error
    found = _compiled_step(fused, subject.given)
    try:
        apart = distance(found, expected)
        if not (apart.loss < 0.01 and apart.whole < (ROUTED if subject.routed else subject.close)):
            raise Mismatch(str(apart))
    except Mismatch as error:
        own = _compiled_step(subject.plain, subject.given)
        if own.grads.keys() != run(subject.plain, subject.given).grads.keys():
            raise NotHere("the model itself has other gradients when compiled") from error
        raise


def _compiled_step(model: nn.Module, given: dict[str, Tensor]) -> Step:
    torch._dynamo.reset()
    torch._logging.set_logs(all=logging.CRITICAL)  # of graphs that break
    try:
        found = run(torch.compile(model, backend="aot_eager"), given)
    finally:
        torch._dynamo.reset()
    return found._replace(grads={n.removeprefix("_orig_mod."): g for n, g in found.grads.items()})


Change = Callable[[nn.Module, list[str]], None]  # and the list takes a name at every call


def _hook(module: nn.Module, calls: list[str]) -> None:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        calls.append(type(module).__name__)
        return output * 1.25 if isinstance(output, Tensor) else output

    module.register_forward_hook(hook)


def _instance_forward(module: nn.Module, calls: list[str]) -> None:
    forward = module.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        output = forward(*args, **kwargs)
        return output * 1.25 if isinstance(output, Tensor) else output

    module.forward = instead  # type: ignore[method-assign]


def changed(subject: Subject, change: Change) -> None:
    """Something that looks at modules from outside, on one of each kind that is fused and on one of
    its children: it is called as often as in the composed model, and what it changes counts."""
    places = _places(subject)
    if not places:
        raise NotHere("nothing is fused")
    for name in places:
        models = subject.pair()
        called: tuple[list[str], list[str]] = ([], [])
        for model, calls in zip(models, called, strict=True):
            change(model.get_submodule(name), calls)
        try:
            subject.compare(*models)
        except Mismatch as error:
            raise Mismatch(f"{name}: {error}") from error
        if len(called[0]) != len(called[1]):
            raise Mismatch(f"{name}: called {len(called[0])} times, not {len(called[1])}")


def _places(subject: Subject) -> list[str]:
    chosen = subject.random()
    model = convert(subject.plain, subject.recipe, True)
    names = {module: name for name, module in model.named_modules()}
    by_kind: dict[str, list[nn.Module]] = {}
    for fusion, module in _fusions.fused(model):
        by_kind.setdefault(fusion.name, []).append(module)
    places = []
    for _, modules in sorted(by_kind.items()):
        module = chosen.choice(modules)
        places.append(module)
        layers = [m for m in module.modules() if isinstance(m, fp8.Linear)]
        if layers:
            places.append(chosen.choice(layers))
    return [names[m] for m in places if names[m]]


VARIANTS: dict[str, Callable[[Subject], None]] = {
    "checkpointing": lambda s: checkpointing(s, False),
    "reentrant checkpointing": lambda s: checkpointing(s, True),
    "adapters": adapters,
    "frozen": frozen,
    "autocast": autocast,
    "generate": generate,
    "hook": lambda s: changed(s, _hook),
    "instance forward": lambda s: changed(s, _instance_forward),
    "compile": compiled,
}
COMPILED = ("bert", "glm", "gpt_neox", "llama", "mixtral", "phi3", "t5")
"""Families that take this in place of their turn: it is slow."""


def turn(family: str, number: int) -> str:
    """The variant of a family."""
    names = [name for name in VARIANTS if name != "compile"]
    return "compile" if family in COMPILED else names[number % len(names)]
