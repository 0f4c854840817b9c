"""`fp8.FrozenLinear`: a linear layer whose weight is FP8, codes and scales, and nothing else.

What inference and adapters need: N·K bytes in memory in place of twice as many, and nothing to
quantize but the input. Codes and scales are parameters under the names that checkpoints give them;
they are moved, copied and saved as other parameters are, but whatever casts a model leaves them as
they are, since a code is no number.
"""

from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from .._native import nested
from ..recipe import Recipe
from . import _frozen_reads, _frozen_state
from ._calls import CALLED, _mark_traced, has_own_forward
from ._freezing import Codes, check_granularity, given, input_granularity_of, quantized
from ._frozen_module import FrozenModule
from ._linear import Linear
from ._scales import Granularity, canonical, shape_of

_E4M3 = torch.float8_e4m3fn
_linear_frozen = torch.ops.fp8.linear_frozen.default


class FrozenLinear(FrozenModule, nn.Linear):
    """y = x · (codes · scale)ᵀ + bias, the input quantized in the call, the product in FP8.

    weight: [out_features, in_features] float8_e4m3fn, and its scale, float32: one, one per row
    ([out_features, 1]), or one per block of 128 x 128. Both are parameters without a gradient.
    bias: [out_features] in x's dtype. x: [..., in_features] bfloat16, float16 or float32. y: [...,
    out_features] in x's dtype. Gradients reach x and bias.

    `fp8.freeze` makes these layers of a model's, `fp8.load` of a checkpoint's; a new one is zeros,
    to be loaded into.

    Args, beyond those of nn.Linear:
        dtype: of the bias; the `compute_dtype`, in which x is expected.
        granularity: what of the weight shares a scale: "tensorwise", "rowwise" or "blockwise".
        input_granularity: what of x does: all of it, a row, or 128 elements of a row. None:
            "blockwise" beside a weight in blocks, else "rowwise".
        static_input: with a scale of x that is given, in place of one computed in every call; x is
            quantized as a whole then, and values beyond 448 · input_scale saturate. Not beside a
            weight in blocks.
        power_of_two: scales of x that are computed are powers of two.
        scale_name, input_scale_name: what the parameters are called: "weight_scale_inv", say.

    `.to(dtype)`, `.half()` and their like change bias and `compute_dtype`, and neither codes nor
    scales. A state_dict with anything but codes and their scale is an error.

    Raises ValueError for an unknown granularity, and for one of x that does not go with the
    weight's: blocks go with blocks, a static scale of x with "tensorwise".

    Example:
        >>> layer = fp8.FrozenLinear.from_linear(torch.nn.Linear(64, 32), "rowwise")
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 32])
    """

    __module__ = "fp8.nn"  # what pickles name

    code_names = ("weight",)
    weight: Any = _frozen_reads.GuardedWeight()
    scale_name: str = "weight_scale"
    input_scale_name: str = "input_scale"
    granularity: Granularity = "rowwise"
    input_granularity: Granularity = "rowwise"
    """What of x shares a scale: "blockwise" (128 elements of a row) beside a weight in blocks, else
    "rowwise" or "tensorwise", the latter with a static scale. May be set."""
    power_of_two: bool = False
    decode: bool = True
    """Whether few rows (up to 32 or 64, on Hopper) are multiplied by a kernel made for them, see
    `fp8.ops.linear_frozen`. Faster; the bits are those of other sums. May be set."""
    compute_dtype: torch.dtype = torch.bfloat16
    """What the layer is part of: dtype of the bias and, as a rule, of x. PEFT reads it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: Granularity = "rowwise",
        input_granularity: Granularity | None = None,
        static_input: bool = False,
        power_of_two: bool = False,
        scale_name: str = "weight_scale",
        input_scale_name: str = "input_scale",
    ) -> None:
        check_granularity(granularity)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = shape_of(granularity, out_features, in_features)
        codes = Codes(
            torch.empty(out_features, in_features, dtype=torch.uint8, device=device).view(_E4M3),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(1, dtype=torch.float32, device=device) if static_input else None,
            granularity,
            input_granularity,
            power_of_two,
        )
        super(nn.Linear, self).__init__()
        own_bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        hold(self, codes, own_bias if bias else None, dtype, scale_name, input_scale_name)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe | None = None) -> Self:
        """The frozen form of an nn.Linear or fp8.Linear: codes that its forward computes in every
        call, its bias (shared), its hooks.

        recipe: a key of `fp8.RECIPES`, with options; None: that of an fp8.Linear, or "rowwise". Of
        it counts how x and the weight are scaled. `delayed` becomes "tensorwise", as in
        `fp8.freeze`. A static input scale stays, beside a recipe of one scale per tensor.

        Raises TypeError for anything but an nn.Linear or fp8.Linear itself, for a module whose
        `forward` was replaced on the instance, and for a weight that is not bfloat16, float16 or
        float32; ValueError for an unknown recipe, or a static scale beside one of rows or blocks.
        """
        if type(linear) not in (nn.Linear, Linear):
            raise TypeError(
                "fp8.FrozenLinear.from_linear: expected an nn.Linear or fp8.Linear itself, no "
                f"subclass, got {type(linear).__name__}"
            )
        if has_own_forward(linear):
            raise TypeError(
                "fp8.FrozenLinear.from_linear: forward was replaced on this instance and would be "
                "lost"
            )
        codes = quantized(linear, recipe)
        new = cls.__new__(cls)
        for key, value in vars(linear).items():
            vars(new)[key] = value.copy() if isinstance(value, dict | set) else value
        vars(new)["_compiled_call_impl"] = None  # what linear.compile() made is bound to `linear`
        freeze_in_place(new, codes)
        return new

    @classmethod
    def from_codes(
        cls,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        granularity: Granularity | None = None,
        input_granularity: Granularity | None = None,
        power_of_two: bool = False,
        scale_name: str = "weight_scale",
        input_scale_name: str = "input_scale",
    ) -> Self:
        """A layer that holds these tensors, as a checkpoint has them; they are not copied.

        Args:
            weight: [N, K] float8_e4m3fn.
            weight_scale: of one element, of N, or [ceil(N / 128), ceil(K / 128)]; float32, or a
                dtype that float32 has every value of (bfloat16, float16, float8_e8m0fnu).
            bias: [N], of `compute_dtype`.
            input_scale: of one element, for a static scale of x.
            compute_dtype: None: the bias's, or else the default dtype.
            granularity: None: by the shape of weight_scale. Says what one element is for: a weight
                of a single row or block has the shape of one per tensor.
            Others: see the class.

        Raises TypeError and ValueError that name what was expected and what came.

        Example:
            >>> codes, scale = fp8.ops.quantize_blockwise_128x128(torch.randn(256, 384))
            >>> fp8.FrozenLinear.from_codes(codes, scale, compute_dtype=torch.bfloat16)
        """
        codes = given(
            weight,
            weight_scale,
            bias,
            input_scale,
            granularity=granularity,
            input_granularity=input_granularity,
            power_of_two=power_of_two,
        )
        if compute_dtype is None:
            compute_dtype = torch.get_default_dtype() if bias is None else bias.dtype
        new = cls.__new__(cls)
        super(nn.Linear, new).__init__()
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        hold(new, codes, bias, compute_dtype, scale_name, input_scale_name)
        return new

    @property
    def scales(self) -> Tensor:
        """The weight's, whatever their name: float32."""
        found: Tensor = getattr(self, self.scale_name)
        return found

    @property
    def static_scale(self) -> Tensor | None:
        """The static scale of x, whatever its name, or None."""
        found: Tensor | None = getattr(self, self.input_scale_name, None)
        return found

    def forward(self, input: Tensor) -> Tensor:
        """y: [..., out_features] for input: [..., in_features], nested ones too."""
        if is_compiling():
            self._mark_traced()
        else:
            self.__dict__[CALLED] = True
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._traced(input)  # type: ignore[no-any-return]
        if input.is_nested:
            return nested.map_rows(self.forward, input)
        if input.dtype is _E4M3:
            raise TypeError(
                "fp8.FrozenLinear: got an input in float8_e4m3fn. Its caller has cast it to the "
                "dtype of this layer's weight, as T5's does; leave this layer as it was, with "
                "fp8.freeze's filter"
            )
        # An attribute of a module takes longer; something may have put plain tensors there.
        own = self._parameters
        weight: Tensor | None = own.get("weight")
        scale: Tensor | None = own.get(self.scale_name)
        if weight is None or scale is None:
            weight, scale = self.weight, self.scales
        static = own.get(self.input_scale_name)
        output: Tensor = _linear_frozen(
            input,
            weight,
            scale,
            self.bias,
            static,
            input_granularity=self.input_granularity,
            power_of_two=self.power_of_two,
            decode=self.decode,
        )
        return output

    _mark_traced = _mark_traced

    def _traced(self, input: Any) -> Any:
        """Under torch.fx.symbolic_trace: a call of this module, as nn.Linear is traced."""
        root = getattr(input.tracer, "root", None)
        names = root.named_modules() if isinstance(root, nn.Module) else ()
        name = next((name for name, module in names if module is self), "")
        if name:
            return input.tracer.create_proxy("call_module", name, (input,), {})
        raise TypeError("fp8.FrozenLinear: torch.fx knows this module under no name")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as numbers, code · scale in float32, rounded to `dtype` (None:
        `compute_dtype`): [out_features, in_features]."""
        scale = canonical(self.scales, self.granularity, *self.weight.shape)
        found: Tensor = torch.ops.fp8.dequantize.default(
            self.weight, scale, dtype or self.compute_dtype
        )
        return found

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros, with scales of one: nothing is drawn, the layer is there to be loaded into."""
        self.weight.view(torch.uint8).zero_()
        self.scales.fill_(1)
        if self.static_scale is not None:
            self.static_scale.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def _kept(self) -> list[str]:
        return [self.scale_name, self.input_scale_name, "weight"]

    def _misfit(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        return _frozen_state.fit(self, state_dict, prefix)

    def describe(self) -> str:
        """How weight and input are scaled, in a few words: "rowwise", "tensorwise, input rowwise",
        "tensorwise, static input_scale"."""
        options = ":power_of_two" if self.power_of_two and self.static_scale is None else ""
        if self.static_scale is not None:
            return f"{self.granularity}, static {self.input_scale_name}"
        if self.input_granularity == self.granularity:
            return f"{self.granularity}{options}"
        return f"{self.granularity}, input {self.input_granularity}{options}"

    def extra_repr(self) -> str:
        """nn.Linear's line, and how weight and input are scaled."""
        decode = "" if self.decode else ", decode=False"
        return f"{super().extra_repr()}, frozen {self.describe()}{decode}"


def hold(
    layer: FrozenLinear,
    codes: Codes,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    scale_name: str = "weight_scale",
    input_scale_name: str = "input_scale",
) -> None:
    """Make these the layer's parameters, in place of what it has, and note what they mean.
    ValueError where they mean nothing together."""
    own = input_granularity_of(codes)
    parameters: dict[str, Any] = {"weight": codes.weight, scale_name: codes.scale}
    if codes.input_scale is not None:
        parameters[input_scale_name] = codes.input_scale
    own_names = ("weight", "bias", *parameters)
    parameters = {name: nn.Parameter(p, requires_grad=False) for name, p in parameters.items()}
    others = {name: p for name, p in layer._parameters.items() if name not in own_names}
    layer._parameters.clear()
    layer._parameters.update(parameters | {"bias": bias} | others)
    layer.out_features, layer.in_features = codes.weight.shape
    layer.granularity, layer.input_granularity = codes.granularity, own
    layer.power_of_two, layer.compute_dtype = codes.power_of_two, compute_dtype
    layer.scale_name, layer.input_scale_name = scale_name, input_scale_name


def freeze_in_place(
    layer: nn.Linear,
    codes: Codes,
    scale_name: str | None = None,
    input_scale_name: str = "input_scale",
) -> None:
    """Turn an nn.Linear, an fp8.Linear or a frozen layer into the frozen layer that has these
    codes. scale_name: None for the usual one, "weight_scale_inv" of blocks, else "weight_scale"."""
    bias = layer._parameters.get("bias")
    dtype = layer.compute_dtype if isinstance(layer, FrozenLinear) else layer.weight.dtype
    if isinstance(layer, FrozenLinear):
        for name in (layer.scale_name, layer.input_scale_name):
            layer._parameters.pop(name, None)
    for name in ("recipe", "forward", CALLED):
        vars(layer).pop(name, None)
    for name in ("input_scale", "amax_history"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    layer.__class__ = FrozenLinear
    if scale_name is None:
        scale_name = "weight_scale_inv" if codes.granularity == "blockwise" else "weight_scale"
    hold(layer, codes, bias, dtype, scale_name, input_scale_name)  # type: ignore[arg-type]
