"""What fp8's operators quantize, told from their arguments: for each operator below autograd a
function that measures the operands its products read.

A function gets the call after it has run, so histories have settled, and repeat their scales for
tensors that come again. Names are those of the weights; None is a weight of another model. Not
reached: what `moe_experts` makes on the way (the input of the second product, the gradient of the
first one's output), and the second quantization of grouped layers, along the rows of a group, for
the weight gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipe import OPTIONS, RECIPES, Recipe, check_recipe
from . import _mlp_values as mlp_values
from ._quantization import Format, measure, quantize

Names = Sequence[str | None]
Record = Callable[["Key", Tensor], None]

_BITS = 8  # of a recipe's number; its options are above


class Key(NamedTuple):
    """One operand of one layer, as one product reads it."""

    layer: str
    operand: str
    """x, weight or dy."""
    product: str
    """fprop, dgrad or wgrad: the first of those that read this quantization."""
    recipe: str
    dtype: str
    scaling: str


class Ran(NamedTuple):
    """A call of an operator below autograd."""

    arguments: dict[str, Any]
    results: Any
    names: Names
    again: bool
    """A recomputation of a forward that was seen before."""
    late: bool
    """A recomputation of one that ran without gradients: only now x is quantized for wgrad."""


def recipe_of(value: str | int) -> Recipe:
    """Of a public operator's argument, or a private one's."""
    if isinstance(value, str):
        return check_recipe(value)
    name = list(RECIPES)[value & ((1 << _BITS) - 1)]
    bits = value >> _BITS
    return Recipe(name, **{option: True for i, option in enumerate(OPTIONS) if bits >> i & 1})


class _Operands:
    """Measures operands of one recipe."""

    def __init__(self, recipe: Recipe, record: Record) -> None:
        self.recipe = recipe
        self.record = record
        self.tensorwise = recipe.granularity == "tensorwise"
        self.blocks = recipe.granularity == "blockwise"

    def see(
        self,
        names: Names,
        operand: str,
        product: str,
        value: Tensor,
        *,
        static: Tensor | None = None,
        history: Tensor | None = None,
        parts: Sequence[int] | None = None,
        dim: int = 0,
    ) -> None:
        """value: [M, K], as the product reads it. parts: a name for each, else all have all."""
        if value.numel() == 0 or not any(names):
            return
        dtype = {
            "x": self.recipe.input_dtype,
            "weight": self.recipe.weight_dtype,
            "dy": self.recipe.grad_output_dtype,
        }[operand]
        kind: str = self.recipe.granularity
        if self.blocks:
            kind = "128x128" if operand == "weight" else "1x128"
        form = Format(dtype, kind, self.recipe.power_of_two)
        role = ("x", "weight", "dy").index(operand)
        amax = None if history is None else _amax_used(history[role])
        data, scale = quantize(value, form, scale=static, amax=amax)
        sums = measure(value, data, scale, parts, dim)
        scaling = "static" if static is not None else "dynamic" if amax is None else "delayed"
        for i, name in enumerate(names):
            if name is not None:
                short = str(dtype).removeprefix("torch.float8_").removesuffix("fn")
                key = Key(name, operand, product, str(self.recipe), short, scaling)
                self.record(key, sums[i if parts is not None else 0])

    def stacked(self, weight: Tensor) -> Tensor:
        """[E, N, K] as one matrix. Squares do not reach from one expert into the next: zeros, which
        nothing here counts but as elements, fill up the last ones of each."""
        rest = -weight.size(1) % 128 if self.blocks else 0
        return torch.nn.functional.pad(weight, (0, 0, 0, rest)).flatten(0, 1)

    def transposed(
        self, names: Names, operand: str, product: str, value: Tensor, **how: Any
    ) -> None:
        """The second quantization, of the transpose: with scales along its own rows."""
        if not self.tensorwise:
            dim = 1 - how.pop("dim", 0)
            self.see(names, operand, product, value.t(), dim=dim, **how)

    def gradient(
        self, names: Names, dy: Tensor, needs_dx: bool, needs_dweight: bool, **how: Any
    ) -> None:
        """dy [M, N], for the products that are asked for."""
        for_dweight = needs_dweight and self.recipe.wgrad == "fp8"
        if needs_dx or (for_dweight and self.tensorwise):
            self.see(names, "dy", "dgrad" if needs_dx else "wgrad", dy, **how)
        if for_dweight:
            self.transposed(names, "dy", "wgrad", dy, **how)


def _amax_used(row: Tensor) -> Tensor:
    """That which made the scale of the last call with a history; its layout: csrc/host/formats.h.

    Behind three tables of records there are their number and the guess: of a tensor that had a
    record, what made its scale; else 0, and the newest record says it.
    """
    records = (row.numel() - 2) // 3
    count, guess = row[-2], row[-1]
    newest = row[records : 2 * records].gather(0, ((count - 1) % records).long().reshape(1))
    return torch.where(guess != 0, guess, newest).view(torch.float32).reshape(())


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.size(-1))


def linear_forward(ran: Ran, record: Record) -> None:
    """_linear_forward, and fused_linear where there is no gradient."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    how = {"history": a["history"]} if operands.recipe.scaling == "delayed" else {}
    x = _matrix(a["x"])
    if not ran.again:
        operands.see(ran.names, "x", "fprop", x, static=a["input_scale"], **how)
        operands.see(ran.names, "weight", "fprop", a["weight"], **how)
    _second_input(ran, operands, ran.names, x, bool(a.get("save_x_t")))


def _second_input(ran: Ran, operands: _Operands, names: Names, x: Tensor, saved: bool) -> None:
    """x quantized for wgrad, where that is another quantization."""
    if saved and operands.recipe.wgrad == "fp8" and ran.again == ran.late:
        operands.transposed(names, "x", "wgrad", x)


def linear_backward(ran: Ran, record: Record) -> None:
    """_linear_backward."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    how = {"history": a["history"]} if operands.recipe.scaling == "delayed" else {}
    dy = _matrix(a["dy"])
    operands.gradient(ran.names, dy, a["needs_dx"], a["needs_dweight"], **how)
    if a["needs_dx"] and not operands.blocks:  # squares are the same, turned
        operands.transposed(ran.names, "weight", "dgrad", a["weight"])


def merged_forward(ran: Ran, record: Record) -> None:
    """_merged_forward, and merged_linear: one weight, of those one below the other."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    how = {"history": a["history"]} if operands.recipe.scaling == "delayed" else {}
    x = _matrix(a["x"])
    weights = a["weights"]
    if not ran.again:
        operands.see(ran.names, "x", "fprop", x, **how)
        sizes = [w.size(0) for w in weights]
        operands.see(ran.names, "weight", "fprop", torch.cat(list(weights)), parts=sizes, **how)
    _second_input(ran, operands, ran.names, x, bool(a.get("save_x_t")))


def merged_backward(ran: Ran, record: Record) -> None:
    """_merged_backward: one dy, of those beside each other. Parts without a gradient are not among
    its arguments, so the names are those of the weights that are."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    how = {"history": a["history"]} if operands.recipe.scaling == "delayed" else {}
    dys = [_matrix(dy) for dy in a["dys"]]
    sizes = [dy.size(1) for dy in dys]
    needs_dweight = a["needs_dweight"] != 0
    operands.gradient(
        ran.names, torch.cat(dys, 1), a["needs_dx"], needs_dweight, parts=sizes, dim=1, **how
    )
    if a["needs_dx"] and not operands.blocks:
        weights = torch.cat(list(a["weights"]))
        operands.transposed(ran.names, "weight", "dgrad", weights, parts=sizes)


def grouped_forward(ran: Ran, record: Record) -> None:
    """_grouped_forward and grouped_linear; rows past the last group are none of a layer's."""
    a = ran.arguments
    if ran.again:
        return
    operands = _Operands(recipe_of(a["recipe"]), record)
    operands.see(ran.names, "x", "fprop", _in_groups(a["x"], a["offsets"]))
    operands.see(ran.names, "weight", "fprop", operands.stacked(a["weight"]))


def grouped_backward(ran: Ran, record: Record) -> None:
    """_grouped_backward."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    if a["needs_dx"]:
        operands.see(ran.names, "dy", "dgrad", _in_groups(a["dy"], a["offsets"]))


def _in_groups(rows: Tensor, offsets: Tensor) -> Tensor:
    if offsets.numel() == 0:
        return rows[:0]
    inside = torch.arange(rows.size(0), device=rows.device) < offsets[-1]
    return torch.where(inside.unsqueeze(1), rows, 0.0)


def moe_forward(ran: Ran, record: Record) -> None:
    """_moe_forward and moe_experts: x, of each token once, and both weights."""
    a = ran.arguments
    if ran.again:
        return
    operands = _Operands(recipe_of(a["recipe"]), record)
    first, second = ran.names
    operands.see([first], "x", "fprop", _matrix(a["x"]))
    operands.see([first], "weight", "fprop", operands.stacked(a["gate_up"]))
    operands.see([second], "weight", "fprop", operands.stacked(a["down"]))


def moe_backward(ran: Ran, record: Record) -> None:
    """_moe_backward: dy, of each token once."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    operands.see([ran.names[1]], "dy", "dgrad", _matrix(a["dy"]))


def mlp_forward(ran: Ran, record: Record) -> None:
    """_mlp_forward and mlp: x, of gate and up alike, h, and the weights."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    delayed = operands.recipe.scaling == "delayed"
    linears, names = mlp_values.linears(a), list(ran.names)
    firsts, down = names[:-1], names[-1:]
    x = _matrix(a["x"])
    needs = a.get("needs", 0)
    saves_x = bool(needs & mlp_values.GATE_OR_UP)

    def history(linear: str) -> dict[str, Any]:
        return {"history": a[f"{linear}_history"]} if delayed else {}

    if not ran.again:
        operands.see(firsts, "x", "fprop", x, **history("gate"))
        for linear, name in zip(linears, names, strict=True):
            operands.see([name], "weight", "fprop", a[linear], **history(linear))
    if not ran.again or ran.late:
        products = mlp_values.products(a, ran.results)
        h = mlp_values.hidden(a, *products)
        if not ran.again:
            operands.see(down, "x", "fprop", h, **history("down"))
        h = mlp_values.hidden(a, *mlp_values.kept(a, *products))
        _second_input(ran, operands, down, h, bool(needs & mlp_values.DOWN))
    _second_input(ran, operands, firsts, x, saves_x)


def mlp_backward(ran: Ran, record: Record) -> None:
    """_mlp_backward: dy of down, and those of gate and up, which the operator makes on the way."""
    a = ran.arguments
    operands = _Operands(recipe_of(a["recipe"]), record)
    delayed = operands.recipe.scaling == "delayed"
    needs = a["needs"]
    linears, names = mlp_values.linears(a), list(ran.names)
    dy = _matrix(a["dy"])
    to_h = bool(needs & mlp_values.TO_H)

    def history(linear: str) -> dict[str, Any]:
        return {"history": a[f"{linear}_history"]} if delayed else {}

    operands.gradient(names[-1:], dy, to_h, bool(needs & mlp_values.DOWN), **history("down"))
    if to_h and not operands.blocks:
        operands.transposed(names[-1:], "weight", "dgrad", a["down"])
    if not to_h or (delayed and a["gate_out"] is None):
        return  # recomputed with scales that are no argument: not reached
    gradients = mlp_values.gradients(a, dy)
    needs_dx = bool(needs & mlp_values.X)
    bits = (mlp_values.GATE, mlp_values.UP)
    for linear, name, bit, gradient in zip(linears, names, bits, gradients, strict=False):
        operands.gradient([name], gradient, needs_dx, bool(needs & bit), **history(linear))
        if needs_dx and not operands.blocks and a[linear] is not None:
            operands.transposed([name], "weight", "dgrad", a[linear])


_Observe = Callable[[Ran, Record], None]
_ops = torch.ops.fp8
BELOW_AUTOGRAD: dict[Any, tuple[_Observe, tuple[str, ...]]] = {
    _ops._linear_forward.default: (linear_forward, ("weight",)),
    _ops.fused_linear.default: (linear_forward, ("weight",)),
    _ops._fused_linear_into.default: (linear_forward, ("weight",)),
    _ops._linear_backward.default: (linear_backward, ("weight",)),
    _ops._merged_forward.default: (merged_forward, ("weights",)),
    _ops.merged_linear.default: (merged_forward, ("weights",)),
    _ops._merged_backward.default: (merged_backward, ("weights",)),
    _ops._mlp_forward.default: (mlp_forward, ("gate", "up", "down")),
    _ops.mlp.default: (mlp_forward, ("gate", "up", "down")),
    _ops._mlp_backward.default: (mlp_backward, ("gate", "up", "down")),
    _ops._grouped_forward.default: (grouped_forward, ("weight",)),
    _ops.grouped_linear.default: (grouped_forward, ("weight",)),
    _ops._grouped_linear_into.default: (grouped_forward, ("weight",)),
    _ops._grouped_backward.default: (grouped_backward, ("weight",)),
    _ops._moe_forward.default: (moe_forward, ("gate_up", "down")),
    _ops.moe_experts.default: (moe_forward, ("gate_up", "down")),
    _ops._moe_experts_into.default: (moe_forward, ("gate_up", "down")),
    _ops._moe_backward.default: (moe_backward, ("gate_up", "down")),
}
"""Of each operator that multiplies: who measures its operands, and its arguments that are
weights."""

PUBLIC: dict[Any, tuple[str, ...]] = {
    op: weights
    for op, (_, weights) in BELOW_AUTOGRAD.items()
    if not op._schema.name.startswith("fp8::_") or op._schema.name.endswith("_into")
}
"""Those that modules call, with parameters as they are."""
