"""PEFT: LoRA over layers whose weight is FP8.

    config = fp8.integrations.peft.register(LoraConfig(target_modules="all-linear"))
    model = get_peft_model(fp8.freeze(model), config)          # train it, model.save_pretrained(..)

    model = fp8.integrations.peft.adopt(PeftModel.from_pretrained(base, folder))
    model = model.merge_and_unload()                           # layers of FP8 codes, with the delta

Without the two calls adapters train as well, in PEFT's own class; what it cannot do is merge, since
it takes codes for numbers, and then it raises.
"""

import warnings
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..nn._freezing import Codes, quantized
from ..nn._frozen import FrozenLinear
from ..nn._scales import canonical
from ._missing import missing

try:
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear as _LoraLinear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise missing(__name__, "peft", "0.21.2", error) from error

__all__ = ["FrozenLoraLinear", "adopt", "register"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Of init_lora_weights, those that neither read nor change the base's weight."""


def register(config: LoraConfig) -> LoraConfig:
    """Have PEFT make a `FrozenLoraLinear` of every `fp8.FrozenLinear` that `config` targets, for
    `get_peft_model`, `add_adapter` and their like. Returns `config`.

    It does not become part of what is saved: after loading, call `adopt`.

    Raises TypeError for anything but a LoraConfig, and ValueError for options that cannot be had
    over FP8 codes: DoRA and other variants, and values of `init_lora_weights` that change the
    base's weight (pissa, olora, corda, loftq, lora_ga, mica).

    Example:
        >>> config = fp8.integrations.peft.register(LoraConfig(r=16, target_modules="all-linear"))
        >>> model = get_peft_model(fp8.freeze(model), config)
    """
    if type(config) is not LoraConfig:
        raise TypeError(
            "fp8.integrations.peft.register: expected a peft.LoraConfig, got "
            f"{type(config).__name__}"
        )
    _check(config)
    config._register_custom_module({FrozenLinear: FrozenLoraLinear})
    return config


def adopt(model: ModelT) -> ModelT:
    """Make PEFT's own LoRA layers over `fp8.FrozenLinear`s `FrozenLoraLinear`s: in a model that
    came from `PeftModel.from_pretrained`, `load_adapter`, or a config that was not registered. In
    place; returns `model`. Adapters keep their parameters, so an optimizer stays good.

    Raises ValueError for adapters with DoRA or another variant.

    Example:
        >>> model = fp8.integrations.peft.adopt(PeftModel.from_pretrained(base, folder))
    """
    found = [
        module
        for module in model.modules()
        if type(module) is _LoraLinear and isinstance(module.get_base_layer(), FrozenLinear)
    ]
    for module in found:
        for name, variant in module.lora_variant.items():
            raise ValueError(_refusal(f"{type(variant).__name__}, which adapter {name!r} is"))
    for module in found:
        module.__class__ = FrozenLoraLinear
    return model


class _Before(NamedTuple):
    """What a layer had before the first adapter was merged."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


class FrozenLoraLinear(_LoraLinear):
    """y = base(x) + scaling · B(A(dropout(x))), the base an `fp8.FrozenLinear`; as PEFT's own, but
    for merging.

    A and B are in float32, or in the base's `compute_dtype` with `autocast_adapter_dtype=False`.
    The base saves nothing of x for the backward, A does.

    Merging: the weight becomes code · scale + scaling · B · A in float32, quantized again with the
    base's granularity, from the codes before the first merge, however many adapters are merged
    since. So a delta is rounded as a weight is: where it is small beside the weight, much of it is
    lost. Unmerging puts the codes and scales of before back, bit for bit; they are kept until then,
    N·K bytes.
    """

    _before: _Before | None = None

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # a config's, for the Conv1D of the same model

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        """Add an adapter. Raises as `register`."""
        _check(config)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (None: the active ones) into codes and scales.

        safe_merge: raise ValueError where the result would not be finite, and change nothing.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        before = self._before
        if before is None:
            bias = None if base.bias is None else base.bias.detach().clone()
            before = _Before(base.weight.detach(), base.scales.detach(), bias)
        weight, bias = self._merged(before, [*self.merged_adapters, *names])
        if safe_merge and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
            raise ValueError(
                f"fp8.integrations.peft: merging {', '.join(names)} gives values that are not "
                "finite; nothing was changed"
            )
        codes = _quantize(weight, base)
        base.weight.data, base.scales.data = codes.weight, codes.scale.reshape(base.scales.shape)
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
        self._before = before
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what the layer had before adapters were merged."""
        before = self._before
        if before is None or not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        device = base.weight.device
        base.weight.data, base.scales.data = before.weight.to(device), before.scale.to(device)
        if before.bias is not None:
            base.bias.data = before.bias.to(base.bias)
        self._before = None
        self.merged_adapters.clear()

    def _merged(self, before: _Before, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with these adapters, in float32. The second is None where it stays."""
        base = self.get_base_layer()
        codes, device = before.weight.to(base.weight.device), base.weight.device
        scale = canonical(before.scale.to(device), base.granularity, *codes.shape)
        weight: Tensor = torch.ops.fp8.dequantize.default(codes, scale, torch.float32)
        bias: Tensor | None = None
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            weight += self.scaling[name] * (b.weight.float() @ a.weight.float()).to(device)
            if not self.lora_bias[name]:
                continue
            if before.bias is None:
                raise RuntimeError(
                    f"fp8.integrations.peft: adapter {name!r} has a bias, and the layer has none "
                    "that it could be merged into"
                )
            start = before.bias.float().to(device) if bias is None else bias
            bias = start + self.scaling[name] * b.bias.float().to(device)
        return weight, bias


def _quantize(weight: Tensor, like: FrozenLinear) -> Codes:
    """Codes of a weight [N, K], scaled as those of `like`."""
    linear = nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    options = ":power_of_two" if like.power_of_two else ""
    return quantized(linear, f"{like.granularity}{options}")


def _check(config: Any) -> None:
    start = config.init_lora_weights
    if start not in _STARTS:
        raise ValueError(
            f"fp8.integrations.peft: init_lora_weights={start!r} makes adapters of the base's "
            "weight or changes it, which FP8 codes do not allow; expected True, False, 'gaussian', "
            "'orthogonal' or 'eva'"
        )
    for name, field in type(config).__dataclass_fields__.items():
        if field.metadata.get("is_lora_variant") and getattr(config, name):
            raise ValueError(_refusal(f"{name}={getattr(config, name)!r}"))


def _refusal(what: str) -> str:
    return (
        f"fp8.integrations.peft: got {what}: variants of LoRA (DoRA and others) compute with the "
        "base's weight as numbers, which a frozen layer does not have; use plain LoRA, or leave "
        "these layers out of fp8.freeze with its filter"
    )
