"""The tensors of a model as a checkpoint has them: codes and scales where it computes in FP8."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..conversion._convert import check_model
from ..conversion._freeze import shared_weights, sharing_a_scale, unfit
from ..conversion._rules import find_linears
from ..integrations.transformers._names import expert_names_of
from ..nn._freezing import Codes, quantized_together
from ..nn._frozen import FrozenLinear
from ..nn._frozen_experts import FrozenExperts
from ..nn._frozen_stack import scale_shape
from ..nn._linear import Linear
from ..nn._scales import Granularity, canonical, shape_of
from ..recipe import check_recipe
from ._experts_export import Part, is_coded, parts_of

FORMATS = ("compressed-tensors", "fp8")


class Layer(NamedTuple):
    """A linear layer that is exported as codes."""

    granularity: Granularity
    input_granularity: Granularity
    static: bool
    power_of_two: bool


class Item(NamedTuple):
    """One tensor, which `get` makes or finds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]


def export_weights(model: nn.Module, *, format: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The name and tensor of every parameter and persistent buffer of `model`, one by one.

    Of a FrozenLinear its codes and scales; of an fp8.Linear the codes that its forward computes, to
    the bit, made when they are asked for: what an engine that samples for reinforcement learning is
    to be given, half the bytes of bfloat16. The same of FrozenExperts and of experts that
    `fp8.convert` converted, one by one, as checkpoints have them: `experts.0.gate_proj.weight`
    (Mixtral: `w1`). Others as they are. Tensors that are the model's own
    are not copied: they change with the model.

    Args:
        model: converted, frozen or neither.
        format: the names and shapes of scales, one of "compressed-tensors" (`weight_scale`, of [N,
            1], [1] or blocks) and "fp8" (`weight_scale_inv`, of blocks or 0-dim). None: a frozen
            layer's own; of others `weight_scale_inv` for blocks, else `weight_scale`.

    Raises TypeError for a model that is no nn.Module, and ValueError for an unknown format, a
    scale that it cannot have ("fp8": one per row), or experts in blocks that lie across gate and up
    (widths inside an expert that are no multiple of 128).

    Example:
        >>> for name, tensor in fp8.export_weights(model):
        ...     print(name, list(tensor.shape))
    """
    check_model("export_weights", model)
    if format is not None:
        check_format("export_weights", format)
    items, _ = items_of(model, format)
    return ((item.name, item.get()) for item in items)


def check_format(function: str, format: object) -> None:
    """Raises ValueError for an unknown one."""
    if format not in FORMATS:
        raise ValueError(f"fp8.{function}: expected a format out of {FORMATS}, got {format!r}")


def items_of(model: nn.Module, format: str | None) -> tuple[list[Item], dict[str, Layer]]:
    """Every tensor once, under its first name, and the layers whose weight is codes, by name."""
    codes, layers = _codes_of(model), {}
    items: list[Item] = []
    seen: set[int] = set()
    names = expert_names_of(model)
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        own: tuple[str, ...] = ()
        if isinstance(module, nn.Linear) and module in codes:
            layer, get = codes[module]
            layers[prefix] = layer
            own = ("weight", "input_scale")
            if isinstance(module, FrozenLinear):
                own = ("weight", module.scale_name, module.input_scale_name)
            items += _coded(module, layer, get, dot, format)
        elif is_coded(module):
            own = ("gate_up_proj", "down_proj")
            if isinstance(module, FrozenExperts):
                own += tuple(name + module.scale_suffix for name in own)
            for part in parts_of(module, prefix, names):
                kind = part.granularity
                layer = Layer(kind, kind, False, part.power_of_two)
                layers[part.name] = layer
                if len(part.shape) == 2:
                    items += _coded(part.shape, layer, part.get, f"{part.name}.", format)
                else:
                    items += _merged(part, format)
        passing = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in own or name in passing or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            shape = tuple(tensor.shape)
            items.append(Item(dot + name, tensor.dtype, shape, partial(torch.detach, tensor)))
    return items, layers


def _codes_of(model: nn.Module) -> dict[nn.Linear, tuple[Layer, Callable[[], Codes]]]:
    """Each layer that is codes, and what gives them."""
    found: dict[nn.Linear, tuple[Layer, Callable[[], Codes]]] = {}
    converted: list[nn.Linear] = []
    shared = shared_weights(model)
    for linear in find_linears(model):
        module = linear.module
        if isinstance(module, FrozenLinear):
            static = module.static_scale
            codes = Codes(
                module.weight, module.scales, static, module.granularity, None, module.power_of_two
            )
            layer = Layer(
                module.granularity, module.input_granularity, static is not None,
                module.power_of_two and static is None,
            )  # fmt: skip
            found[module] = layer, partial(_same, codes)
        elif isinstance(module, Linear) and module not in shared:
            if linear.refused() is None and unfit(module) is None:
                converted.append(module)
    recipes = {module: check_recipe(module.recipe) for module in converted}  # type: ignore[arg-type]
    for group in sharing_a_scale(model, converted, recipes):
        made = _Together(group)
        for i, module in enumerate(group):
            recipe = recipes[module]
            fixed = module.input_scale is not None
            kind = recipe.granularity
            layer = Layer(kind, kind, fixed, recipe.power_of_two and not fixed)
            found[module] = layer, partial(made.get, i)
    return found


def _same(codes: Codes) -> Codes:
    return codes


class _Together:
    """Layers that are quantized together: once, for as long as one of them is still to be asked
    for."""

    def __init__(self, group: list[nn.Linear]) -> None:
        self.group, self.left = group, 0
        self.made: list[Codes] | None = None

    def get(self, index: int) -> Codes:
        """The codes of one."""
        if self.made is None:
            self.made, self.left = quantized_together(self.group), len(self.group)
        codes = self.made[index]
        self.left -= 1
        if not self.left:
            self.made = None
        return codes


def _coded(
    of: nn.Linear | tuple[int, int],
    layer: Layer,
    get: Callable[[], Codes],
    dot: str,
    format: str | None,
) -> list[Item]:
    """Codes, scale and the input's scale of a layer, or of a part of experts of these extents."""
    module = of if isinstance(of, FrozenLinear) else None
    rows, cols = of if isinstance(of, tuple) else (of.out_features, of.in_features)
    kind = layer.granularity
    names = ["weight_scale_inv" if kind == "blockwise" else "weight_scale", "input_scale"]
    shape = shape_of(kind, rows, cols)
    one: tuple[int, ...] = (1,)
    if format is None and module is not None:
        names = [module.scale_name, module.input_scale_name]
        shape = tuple(module.scales.shape)
        if module.static_scale is not None:
            one = tuple(module.static_scale.shape)
    elif format == "fp8":
        _check_kind(kind, dot[:-1], format)
        names, one = ["weight_scale_inv", "activation_scale"], ()
        shape = () if kind == "tensorwise" else shape
    elif format == "compressed-tensors":
        names = ["weight_scale", "input_scale"]
    parts = _Parts(get, shape, one, kind, (rows, cols))
    items = [
        Item(f"{dot}weight", torch.float8_e4m3fn, (rows, cols), parts.weight),
        Item(f"{dot}{names[0]}", torch.float32, shape, parts.scale),
    ]
    if layer.static:
        items.append(Item(f"{dot}{names[1]}", torch.float32, one, parts.input_scale))
    return items


def _check_kind(kind: Granularity, name: str, format: str | None) -> None:
    if format == "fp8" and kind == "rowwise":
        raise ValueError(
            f"fp8: {name or '(model)'} has a scale per row, which the format 'fp8' has not: take "
            "'compressed-tensors', or freeze with the recipe 'blockwise'"
        )


def _merged(part: Part, format: str | None) -> list[Item]:
    """Codes and scales of all experts."""
    kind = part.granularity
    _check_kind(kind, part.name, format)
    parts = _Parts(part.get, scale_shape(kind, part.shape), (), kind, None)
    name = f"{part.name}{'_scale_inv' if kind == 'blockwise' else '_scale'}"
    return [
        Item(part.name, torch.float8_e4m3fn, part.shape, parts.weight),
        Item(name, torch.float32, parts.shape, parts.scale),
    ]


class _Parts:
    """The tensors of one layer, in the order weight, scale, input scale: made once."""

    def __init__(
        self,
        get: Callable[[], Codes],
        shape: tuple[int, ...],
        one: tuple[int, ...],
        kind: Granularity,
        extents: tuple[int, int] | None,
    ) -> None:
        self.get, self.shape, self.one, self.kind, self.extents = get, shape, one, kind, extents
        self.codes: Codes | None = None

    def _made(self) -> Codes:
        if self.codes is None:
            self.codes = self.get()
        return self.codes

    def weight(self) -> Tensor:
        return self._made().weight.detach()

    def scale(self) -> Tensor:
        codes = self._made()
        scale = codes.scale.detach()
        if self.extents is not None:
            scale = canonical(scale, self.kind, *self.extents)
        scale = scale.reshape(self.shape)
        if codes.input_scale is None:
            self.codes = None
        return scale

    def input_scale(self) -> Tensor:
        scale = self._made().input_scale
        assert scale is not None
        self.codes = None
        return scale.detach().reshape(self.one)
