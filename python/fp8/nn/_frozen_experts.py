"""`fp8.FrozenExperts`: the experts of a mixture whose weights are FP8, codes and scales alone.

As `FrozenLinear` is for a linear layer. All experts are one module, as in transformers' models,
whose names for the weights it has; `fp8.freeze` and `fp8.load` turn such a module into this one.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _frozen_state
from ._calls import CALLED, _mark_traced
from ._frozen_module import FrozenModule
from ._frozen_stack import Stack, dequantized, given_stack, scale_shape, together
from ._scales import Granularity

_E4M3 = torch.float8_e4m3fn
_experts_frozen = torch.ops.fp8.experts_frozen.default

WEIGHTS = ("gate_up_proj", "down_proj")
"""The names of the codes."""


class GateForm(NamedTuple):
    """Arguments of `fp8.ops.experts_frozen`: how gate and up become the input of down."""

    activation: str = "silu"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


class FrozenExperts(FrozenModule):
    """y[t] = Σ over the experts e of token t: weight · (h · down[e]ᵀ + down_bias[e]), with
    h = act(gate) · up of gate and up, the halves of x[t] · gate_up[e]ᵀ + gate_up_bias[e].

    Parameters without a gradient: gate_up_proj [E, 2 I, H] and down_proj [E, H, I], float8_e4m3fn,
    and their scales, float32: one per expert ([E, 1, 1]), one per row ([E, N, 1]), or one per block
    of 128 x 128 ([E, ceil(N / 128), ceil(K / 128)]). They are called as the weight, followed by
    "_scale", or by "_scale_inv" where they are of blocks. Biases [E, 2 I] and [E, H] are parameters
    in `compute_dtype`. What is quantized in a call is x and h, in rows, or, beside blocks, in 128
    elements of a row.

    Called with hidden_states [T, H], top_k_index [T, k] (any integers; ids outside [0, E) are
    experts of elsewhere and contribute nothing) and top_k_weights [T, k]; returns [T, H] in
    hidden_states' dtype. Gradients reach hidden_states, top_k_weights and biases.

    `fp8.freeze` makes these modules of a model's experts, `fp8.load` of a checkpoint's; a new one
    is zeros, to be loaded into.

    Args:
        num_experts: E, up to 1023.
        hidden_size, intermediate_size: H and I, multiples of 16.
        bias: whether there are biases.
        device, dtype: dtype is that of the biases, the `compute_dtype`, in which x is expected.
        granularity: what of a weight shares a scale: "tensorwise", "rowwise" or "blockwise".
        activation, interleaved, alpha, limit: see `fp8.ops.moe_experts`.
        power_of_two: scales of x and h are powers of two.

    `.to(dtype)`, `.half()` and their like change biases and `compute_dtype`, and neither codes nor
    scales. A state_dict with anything but codes and their scales is an error.

    Raises ValueError for an unknown granularity, and for extents that are not multiples of 16.

    Example:
        >>> experts = fp8.FrozenExperts(4, 64, 32, dtype=torch.bfloat16)
        >>> weights, index = torch.rand(8, 4).topk(2)
        >>> experts(torch.randn(8, 64, dtype=torch.bfloat16), index, weights).shape
        torch.Size([8, 64])
    """

    __module__ = "fp8.nn"  # what pickles name

    code_names = WEIGHTS
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None
    num_experts: int
    granularity: Granularity = "rowwise"
    scale_suffix: str = "_scale"
    """What follows a weight's name in that of its scale."""
    gate_form: tuple[str, bool, float, float] = ("silu", False, 1.702, 7.0)
    """activation, interleaved, alpha and limit."""
    power_of_two: bool = False
    compute_dtype: torch.dtype = torch.bfloat16
    """What the module is part of: dtype of the biases and, as a rule, of x."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: Granularity = "rowwise",
        activation: str = "silu",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        power_of_two: bool = False,
    ) -> None:
        if hidden_size % 16 or intermediate_size % 16:
            raise ValueError(
                "fp8.FrozenExperts: expected hidden_size and intermediate_size that are multiples "
                f"of 16, got {hidden_size} and {intermediate_size}"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        up = (num_experts, 2 * intermediate_size, hidden_size)
        down = (num_experts, hidden_size, intermediate_size)

        def empty(shape: tuple[int, int, int]) -> Stack:
            codes = torch.empty(shape, dtype=torch.uint8, device=device).view(_E4M3)
            scales = torch.empty(
                scale_shape(granularity, shape), dtype=torch.float32, device=device
            )
            return Stack(codes, scales, granularity)

        biases: list[nn.Parameter | None] = [None, None]
        if bias:
            biases = [
                nn.Parameter(torch.empty(shape[:2], dtype=dtype, device=device))
                for shape in (up, down)
            ]
        super().__init__()
        form = GateForm(activation, interleaved, alpha, limit)
        hold(self, empty(up), empty(down), biases[0], biases[1], dtype, form, power_of_two)
        self.reset_parameters()

    @classmethod
    def from_codes(
        cls,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        granularity: Granularity | None = None,
        activation: str = "silu",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        power_of_two: bool = False,
    ) -> Self:
        """Experts that hold these tensors; they are not copied.

        Args:
            gate_up: [E, 2 I, H] and down: [E, H, I] float8_e4m3fn.
            gate_up_scale, down_scale: [E], [E, N] or the grid of blocks, with dimensions of 1 or
                without; float32, or a dtype that float32 has every value of. Where one is per
                expert and the other per row, both are kept per row.
            gate_up_bias: [E, 2 I] and down_bias: [E, H], of `compute_dtype`.
            compute_dtype: None: that of the biases, or else the default dtype.
            granularity: None: by the shapes. Says what [E, 1, 1] is for, of a single block.
            Others: see the class.

        Raises TypeError and ValueError that name what was expected and what came.
        """
        stacks = [
            given_stack(f"fp8.FrozenExperts.from_codes: {name}", codes, scale, granularity)
            for name, codes, scale in (
                ("gate_up", gate_up, gate_up_scale),
                ("down", down, down_scale),
            )
        ]
        (experts, rows, hidden), other = gate_up.shape, tuple(down.shape)
        if rows % 32 or hidden % 16 or other != (experts, hidden, rows // 2):
            raise ValueError(
                "fp8.FrozenExperts.from_codes: expected gate_up [E, 2 I, H] and down [E, H, I] "
                f"with H and I multiples of 16, got {list(gate_up.shape)} and {list(other)}"
            )
        if compute_dtype is None:
            of_bias = gate_up_bias if gate_up_bias is not None else down_bias
            compute_dtype = torch.get_default_dtype() if of_bias is None else of_bias.dtype
        biases = [
            b if b is None or isinstance(b, nn.Parameter) else nn.Parameter(b, requires_grad=False)
            for b in (gate_up_bias, down_bias)
        ]
        new = cls.__new__(cls)
        super(FrozenExperts, new).__init__()
        form = GateForm(activation, interleaved, alpha, limit)
        hold(new, *together(*stacks), biases[0], biases[1], compute_dtype, form, power_of_two)
        return new

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] for [T, H], [T, k] and [T, k]."""
        if is_compiling():
            self._mark_traced()
        else:
            self.__dict__[CALLED] = True
        x = hidden_states
        if x.dtype != self.compute_dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.compute_dtype)  # as transformers does: a norm in fp32, say
        # Attributes, not self._parameters: something may have put plain tensors there.
        y: Tensor = _experts_frozen(
            x,
            top_k_index.to(torch.int64),
            top_k_weights,
            self.gate_up_proj,
            getattr(self, "gate_up_proj" + self.scale_suffix),
            self.down_proj,
            getattr(self, "down_proj" + self.scale_suffix),
            self.gate_up_proj_bias,
            self.down_proj_bias,
            *self.gate_form,
            input_granularity="blockwise" if self.granularity == "blockwise" else "rowwise",
            power_of_two=self.power_of_two,
        )
        return y.to(hidden_states.dtype)

    _mark_traced = _mark_traced

    def scales(self, weight: str) -> Tensor:
        """Those of "gate_up_proj" or "down_proj": float32."""
        found: Tensor = getattr(self, weight + self.scale_suffix)
        return found

    def dequantize(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Both weights as numbers, code · scale in float32, rounded to `dtype` (None:
        `compute_dtype`): [E, 2 I, H] and [E, H, I]."""
        up, down = (
            dequantized(
                Stack(getattr(self, name), self.scales(name), self.granularity),
                dtype or self.compute_dtype,
            )
            for name in WEIGHTS
        )
        return up, down

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros, with scales of one: nothing is drawn, the module is there to be loaded into."""
        for name in WEIGHTS:
            getattr(self, name).view(torch.uint8).zero_()
            self.scales(name).fill_(1)
            bias = getattr(self, f"{name}_bias")
            if bias is not None:
                bias.zero_()

    def _kept(self) -> list[str]:
        return [name + suffix for name in WEIGHTS for suffix in ("", self.scale_suffix)]

    def _misfit(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        return _frozen_state.fit_experts(self, state_dict, prefix)

    def describe(self) -> str:
        """How weights and input are scaled, in a few words."""
        options = ":power_of_two" if self.power_of_two else ""
        return f"{self.granularity}{options}"

    def extra_repr(self) -> str:
        """Extents, gate, and how weights and input are scaled."""
        experts, hidden, inner = self.down_proj.shape
        bias = self.gate_up_proj_bias is not None or self.down_proj_bias is not None
        return (
            f"num_experts={experts}, hidden_size={hidden}, intermediate_size={inner}, bias={bias}, "
            f"activation={self.gate_form[0]}, frozen {self.describe()}"
        )


def hold(
    module: FrozenExperts,
    gate_up: Stack,
    down: Stack,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    compute_dtype: torch.dtype,
    form: GateForm,
    power_of_two: bool,
) -> None:
    """Make these the module's parameters, in place of what it has, and note what they mean."""
    suffix = "_scale_inv" if gate_up.granularity == "blockwise" else "_scale"
    parameters: dict[str, Any] = {}
    for name, stack in zip(WEIGHTS, (gate_up, down), strict=True):
        parameters[name] = nn.Parameter(stack.codes, requires_grad=False)
        parameters[name + suffix] = nn.Parameter(stack.scales, requires_grad=False)
    parameters |= {"gate_up_proj_bias": gate_up_bias, "down_proj_bias": down_bias}
    module._parameters.clear()
    module._parameters.update(parameters)
    module.num_experts = gate_up.codes.size(0)
    module.granularity, module.scale_suffix = gate_up.granularity, suffix
    activation, interleaved, alpha, limit = form  # a plain tuple, for pickles
    module.gate_form = (activation, interleaved, alpha, limit)
    module.power_of_two = power_of_two
    module.compute_dtype = compute_dtype


def freeze_experts_in_place(
    module: nn.Module,
    gate_up: Stack,
    down: Stack,
    form: GateForm,
    power_of_two: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Turn an experts module of transformers, or a frozen one, into the frozen one that has these
    codes. dtype: its compute_dtype; None for that of the weights that it has."""
    if dtype is None and isinstance(module, FrozenExperts):
        dtype = module.compute_dtype
    elif dtype is None:
        dtype = module._parameters["down_proj"].dtype  # type: ignore[union-attr]
    gate_up_bias, down_bias = (module._parameters.get(f"{name}_bias") for name in WEIGHTS)
    for name in ("forward", CALLED):
        vars(module).pop(name, None)
    module.__class__ = FrozenExperts
    hold(
        module,  # type: ignore[arg-type]
        *together(gate_up, down),
        gate_up_bias,
        down_bias,
        dtype,
        form,
        power_of_two,
    )
