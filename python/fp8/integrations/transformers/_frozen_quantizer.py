"""FP8 weights through `from_pretrained`: a checkpoint that has them, or one in high precision that
is quantized while it is loaded.

Importing this module imports transformers and registers, under the name `fp8_frozen`, a config and
a quantizer with it. Which layers are frozen is decided by the headers of the safetensors files, as
in `fp8.load`; transformers itself then loads codes and scales as it loads other parameters, with
its device maps. What it can not know (scales of experts, torchao's names) is read here, when it is
done.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoints._folder import Checkpoint, inputs_of, refuse_format
from ...checkpoints._layers import input_scale_of, squeezed
from ...checkpoints._load import Source
from ...checkpoints._plan import Plan, Target, make_plan
from ...checkpoints._safetensors import DTYPES, Entry, read_header, reading
from ...conversion._expert_rules import find_experts
from ...conversion._freeze import not_frozen, shared_weights
from ...conversion._freeze_experts import experts_recipe_of, not_frozen_experts
from ...conversion._rules import find_linears
from ...nn._freezing import Codes, quantized
from ...nn._frozen import FrozenLinear, freeze_in_place
from ...nn._frozen_experts import WEIGHTS, FrozenExperts
from ...recipe import Recipe, check_recipe
from . import _frozen_experts
from ._names import renaming_of

METHOD = "fp8_frozen"
"""The name in transformers' registries; `fp8` is that of its own quantizer."""


class FrozenConfig(QuantizationConfigMixin):
    """How `from_pretrained` makes a model with `FrozenLinear` layers.

    For a checkpoint in high precision, as quantization_config: layers are quantized as `fp8.freeze`
    does it, one tensor at a time. For one in FP8: see `frozen_config`.

    Args:
        recipe: of a checkpoint in high precision: a key of `fp8.RECIPES`, with options.
        static_inputs: of one in FP8: use the static scales of inputs that it has.
        source: the quantization_config that the checkpoint came with.
        **kwargs: of later versions: not looked at.

    Raises ValueError for an unknown recipe.

    Example:
        >>> config = FrozenConfig("rowwise")
        >>> model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    """

    def __init__(
        self,
        recipe: str | Recipe = "rowwise",
        static_inputs: bool = True,
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.recipe = str(check_recipe(recipe))
        self.static_inputs = static_inputs
        self.source = source


def frozen_config(folder: str | Path, *, static_inputs: bool = True, **kwargs: Any) -> Any:
    """The config of an FP8 checkpoint, changed so that `from_pretrained` makes its linear layers
    `FrozenLinear`, whatever quantizer it names.

    kwargs: of `AutoConfig.from_pretrained`. What is saved of such a model reloads by itself where
    fp8 is registered.

    Example:
        >>> config = fp8.integrations.transformers.frozen_config(folder)
        >>> model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    """
    config = AutoConfig.from_pretrained(folder, **kwargs)
    found: Any = getattr(config, "quantization_config", None)
    text: Any = config.get_text_config()
    if found is None and text is not config:
        found = getattr(text, "quantization_config", None)
        if found is not None:
            del text.quantization_config
    source = found if isinstance(found, dict) or found is None else found.to_dict()
    if source is not None and source.get("quant_method") == METHOD:
        source = source.get("source")
    own = FrozenConfig(static_inputs=static_inputs, source=source)
    config.quantization_config = own.to_dict()
    return config


class FrozenQuantizer(HfQuantizer):
    """What transformers calls while it loads a model."""

    requires_calibration = False
    quantization_config: FrozenConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._chosen: set[nn.Module] = set()
        self._experts: dict[nn.Module, tuple[Recipe, torch.dtype]] = {}
        self._merged: set[nn.Module] = set()
        self._plan: Plan | None = None
        self._checkpoint: Checkpoint | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError for a checkpoint of a format that is not read."""
        if self.pre_quantized and self.quantization_config.source:
            refuse_format("from_pretrained", self.quantization_config.source)

    # --- before: which layers ---------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        if not self.pre_quantized:
            linears = find_linears(model)
            left = not_frozen(model, linears)
            tied = _tied(model)
            self._chosen = {
                found.module
                for found in linears
                if found.module not in left and f"{found.name}.weight" not in tied
            }
            mixtures = find_experts(model)
            left_experts = not_frozen_experts(model, mixtures, shared_weights(model))
            recipe = check_recipe(self.quantization_config.recipe)
            for mixture in mixtures:
                if mixture.module not in left_experts:
                    own = experts_recipe_of(mixture.module, recipe), _dtype_of(mixture.module)
                    self._experts[mixture.module] = own
            return model
        self._checkpoint = _checkpoint(model, checkpoint_files or [], self.quantization_config)
        plan = make_plan(model, self._checkpoint, strict=False, skeleton=True)
        self._plan = plan
        for module, weight in plan.frozen.items():
            if weight.codes.endswith(".weight"):  # the others are read when the rest is loaded
                self._skeleton(module, weight)
        for experts, codes in plan.frozen_experts.items():
            self._experts[experts] = check_recipe("rowwise"), _dtype_of(experts)
            _frozen_experts.skeleton(experts, codes)
            if _frozen_experts.are_merged(model, plan.names[experts], codes):
                self._merged.add(experts)
        passed = {*plan.passed_over, *_companions(plan)}
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(n)}$" for n in passed)}
        return model

    def _skeleton(self, module: nn.Linear, weight: Any) -> None:
        """A frozen layer of the shapes that the file has, on the meta device."""
        tensors = self._tensors()
        static = input_scale_of(weight) if self.quantization_config.static_inputs else None

        def empty(name: str) -> Tensor:
            return torch.empty(tensors[name].shape, dtype=torch.float32, device="meta")

        codes = Codes(
            torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device="meta"),
            empty(weight.scale),
            None if static is None else empty(static),
            weight.granularity,
            None,
            False,
        )
        freeze_in_place(module, codes, weight.scale_name, weight.input_scale_name)

    def _tensors(self) -> dict[str, Entry]:
        assert self._checkpoint is not None
        return self._checkpoint.tensors

    # --- while: a checkpoint in high precision ----------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a layer, or of experts, that are to be frozen."""
        prefix, _, last = param_name.rpartition(".")
        if last not in ("weight", *WEIGHTS):
            return False
        module = model.get_submodule(prefix)
        return module in (self._chosen if last == "weight" else self._experts)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element, for device maps."""
        needed = not self.pre_quantized and self.param_needs_quantization(model, param_name)
        return 1 if needed else param.element_size()

    def get_quantize_ops(self) -> Any:
        """What transformers gives each such weight to."""
        return _Quantize(self.quantization_config.recipe, self._experts)

    # --- after ------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan, checkpoint = self._plan, self._checkpoint
        if plan is None:
            _frozen_experts.finish((m, *how) for m, how in self._experts.items())
        if plan is not None and checkpoint is not None:
            with reading() as reader, torch.no_grad():
                source = Source(checkpoint, reader, torch.device("cpu"))
                for module, weight in plan.frozen.items():
                    if type(module) is FrozenLinear:
                        _settle(module)
                        source.tell_input(module, weight)
                    else:
                        source.freeze(module, weight, self.quantization_config.static_inputs)
                for experts, own in plan.frozen_experts.items():
                    dtype, merged = self._experts[experts][1], experts in self._merged
                    _frozen_experts.settle(experts, own, source, dtype, merged)
                for target, weight in plan.dequantized.values():
                    _replace(target)
                    source.dequantize(target, weight)
                for target, slices in plan.experts.values():
                    if any(part.weight is not None for part in slices):
                        _replace(target)
                        source.merge(target, slices)
        self._plan = self._checkpoint = None
        self._chosen, self._experts, self._merged = set(), {}, set()
        _check(model)
        return model

    def is_serializable(self) -> bool:
        """Codes and scales are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on the layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are one operator each."""
        return True


class _Quantize(ConversionOps):
    """The weight of a linear layer, as it comes from the file: codes and scales of a frozen one."""

    def __init__(self, recipe: str, experts: dict[nn.Module, tuple[Recipe, torch.dtype]]) -> None:
        self.recipe, self.experts = recipe, experts

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Changes the layer's class, and gives its new parameters for transformers to set."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        prefix, _, last = full_layer_name.rpartition(".")
        module = model.get_submodule(prefix)
        if module in self.experts:
            recipe, _ = self.experts[module]
            made = _frozen_experts.quantize(module, last, weight, recipe)
            for p in made.values():
                p._is_hf_initialized = True  # type: ignore[attr-defined]
            return {f"{prefix}.{name}": p for name, p in made.items()}
        dtype, bias = module.weight.dtype, module.bias
        module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        freeze_in_place(module, quantized(module, self.recipe))
        module.bias = bias
        names = ("weight", module.scale_name)
        for name in names:
            module._parameters[name]._is_hf_initialized = True
        return {f"{prefix}.{name}": module._parameters[name] for name in names}


def _dtype_of(experts: Any) -> torch.dtype:
    if isinstance(experts, FrozenExperts):
        return experts.compute_dtype
    dtype: torch.dtype = experts._parameters["down_proj"].dtype
    return dtype


def _tied(model: Any) -> set[str]:
    """Names of weights that are to be tied: on the meta device they are not yet."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if not getattr(model.config, "tie_word_embeddings", True):
        return set()
    return {*pairs, *pairs.values()}


def _checkpoint(model: Any, files: list[Any], config: Any) -> Checkpoint:
    """The tensors of the files, under the names that transformers gives them."""
    renamed = renaming_of(model)
    assert renamed is not None  # a model of transformers
    tensors: dict[str, Entry] = {}
    inputs: dict[str, tuple[Any, bool]] = {}

    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise NotImplementedError(
                f"fp8: {file} is no safetensors file; save the model again with "
                "safe_serialization=True"
            )
        header = read_header(file)
        tensors |= {renamed(name): entry for name, entry in header.tensors.items()}
        inputs |= {
            renamed(f"{name}.weight").removesuffix(".weight"): how
            for name, how in inputs_of(file, header).items()
        }
    path = Path(files[0]).parent if files else Path()
    return Checkpoint(path, tensors, config.source or {}, inputs)


def _companions(plan: Plan) -> set[str]:
    """Tensors that have no place in the model's parameters, but are read here."""
    weights = [weight for _, weight in plan.dequantized.values()]
    weights += [part.weight for _, parts in plan.experts.values() for part in parts if part.weight]
    frozen = [codes.slices() for codes in plan.frozen_experts.values()]
    weights += [part.weight for parts in frozen for part in parts if part.weight]
    names = {name for w in weights for name in (w.scale, w.input_scale) if name}
    experts = {merged: parts for merged, (_, parts) in plan.experts.items()}
    for module, codes in plan.frozen_experts.items():
        for name, parts in zip(WEIGHTS, (codes.gate_up, codes.down), strict=True):
            experts[f"{plan.names[module]}.{name}"] = parts
    for merged, parts in experts.items():  # what transformers makes of their scales
        names |= {
            f"{merged}_{part.weight.scale_name.removeprefix('weight_')}"
            for part in parts
            if part.weight
        }
    for weight in plan.frozen.values():
        names |= {weight.input_scale} if weight.input_scale else set()  # not taken, as it may be
        if not weight.codes.endswith(".weight"):
            names |= {weight.codes, weight.scale}
    return names


def _settle(layer: FrozenLinear) -> None:
    """What transformers has set may ask for gradients, and has the file's dtype where the name was
    changed, and the file's shape."""
    for name in ("weight", layer.scale_name, layer.input_scale_name):
        p = layer._parameters.get(name)
        if p is None:
            continue
        values = p.detach()
        if name != "weight":
            values = values.float().reshape(squeezed(tuple(values.shape)))
        layer._parameters[name] = nn.Parameter(values, requires_grad=False)
    if layer.bias is not None and layer.bias.dtype != layer.compute_dtype:
        layer.bias = nn.Parameter(layer.bias.detach().to(layer.compute_dtype))


def _replace(target: Target) -> None:
    """Where transformers has put codes as numbers, room for numbers."""
    old = target.get()
    new = nn.Parameter(
        torch.empty(target.shape, dtype=target.dtype, device=old.device),
        requires_grad=target.dtype.is_floating_point,
    )
    for container, name in target.places:
        container[name] = new


def _check(model: nn.Module) -> None:
    """No codes are anywhere but in frozen layers, where their scales are."""
    names = {name for name, dtype in DTYPES.items() if dtype.itemsize == 1 and "F8" in name}
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            is_codes = p is not None and p.dtype in {DTYPES[n] for n in names}
            if is_codes and not isinstance(module, FrozenLinear | FrozenExperts):
                raise NotImplementedError(
                    f"fp8: '{prefix}.{name}' was loaded as {p.dtype} and is in no frozen layer: "
                    "codes without their scale. fp8.load(model, folder) says more"
                )


auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FrozenConfig)
auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, FrozenQuantizer)
