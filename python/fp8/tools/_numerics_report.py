"""What `fp8.numerics` found: rows, a table, a plot."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any

from torch import nn

from ..integrations.transformers import _experts
from ..nn._grouped import GroupedLinear
from ..nn._linear import Linear
from ._numerics_sums import NumericsRow

_OPERANDS = ("x", "weight", "dy")
_FIGURES = ("sqnr_db", "flushed", "saturated")
_NAME_WIDTH = 34


class Numerics:
    """The result of `fp8.numerics`, empty while its context is open. `str()` is `table()`."""

    __module__ = "fp8.tools"

    def __init__(self) -> None:
        self.rows: list[NumericsRow] = []
        """One for each operand of each layer and product, in the order of the first call."""
        self.notes: list[str] = []
        """What was not measured, and why."""

    def _fill(self, rows: list[NumericsRow], layers: dict[str, str]) -> None:
        self.rows = rows
        self.notes = _notes(rows, layers)

    def __str__(self) -> str:
        return self.table()

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts of strings, numbers and dicts of numbers, for json.dumps: None where a
        figure is NaN or infinite."""
        return [_plain(asdict(row)) for row in self.rows]

    def table(self, limit: int = 24, by: str = "sqnr_db") -> str:
        """The worst layers first, `limit` of them, which is one screen.

        by: of which figure: "sqnr_db", "flushed" or "saturated"; another: ValueError.

        `x dB`, `W dB` and `dy dB` are means over the calls, of the product that reads the worst
        quantization; `amax` the largest; `sat %` and `flush %` the worst mean share of x, W and dy,
        with its operand. NaN and Inf come before all. "-": not seen, as dy without a backward.
        """
        if by not in _FIGURES:
            raise ValueError(f"fp8.numerics: expected by out of {_FIGURES}, got {by!r}")
        layers = _by_layer(self.rows)
        order = sorted(layers, key=lambda layer: _badness(layers[layer], by))
        head = ["layer", "recipe", "calls", *("x dB", "W dB", "dy dB")]
        head += ["x amax", "W amax", "dy amax", "sat %", "flush %", "nan/inf"]
        lines = [head, *(_line(layer, layers[layer]) for layer in order[:limit])]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        if len(order) > limit:
            worst = min(_worst(layers[layer]) for layer in order[limit:])
            text.append(f"and {len(order) - limit} layers more, the worst with {worst:.1f} dB")
        if not order:
            text = ["no layer in FP8 was called"]
        return "\n".join([*text, *self.notes])

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a PNG with every layer in the order of the calls: SQNR of x, weight and dy (the
        mean, and the range over the calls), and below it the shares that were flushed to zero and
        saturated. Needs matplotlib.
        """
        from ._numerics_plot import plot

        plot(_by_layer(self.rows), path)


Operands = dict[str, list[NumericsRow]]


def _by_layer(rows: Iterable[NumericsRow]) -> dict[str, Operands]:
    layers: dict[str, Operands] = {}
    for row in rows:
        layers.setdefault(row.layer, {}).setdefault(row.operand, []).append(row)
    return layers


def worst_row(rows: Sequence[NumericsRow]) -> NumericsRow:
    """Of those of one operand: that of the lowest SQNR."""
    return min(rows, key=lambda row: math.inf if math.isnan(s := row.sqnr_db.mean) else s)


def _worst(operands: Operands) -> float:
    values = [row.sqnr_db.mean for rows in operands.values() for row in rows]
    return min((v for v in values if not math.isnan(v)), default=math.inf)


def _badness(operands: Operands, by: str) -> tuple[bool, float]:
    """Ascending: the worst first."""
    every = [row for rows in operands.values() for row in rows]
    finite = not any(row.nonfinite for row in every)
    if by == "sqnr_db":
        return finite, _worst(operands)
    shares = [getattr(row, by).mean for row in every]
    return finite, -max((share for share in shares if not math.isnan(share)), default=0.0)


def _line(layer: str, operands: Operands) -> list[str]:
    every = [row for rows in operands.values() for row in rows]
    worst = {operand: worst_row(rows) for operand, rows in operands.items()}
    decibels = [f"{worst[o].sqnr_db.mean:.1f}" if o in worst else "-" for o in _OPERANDS]
    amaxes = [f"{worst[o].amax.max:.3g}" if o in worst else "-" for o in _OPERANDS]
    return [
        _shortened(layer),
        " ".join(dict.fromkeys(row.recipe for row in every)),
        str(max(row.calls for row in every)),
        *decibels,
        *amaxes,
        _largest_share(every, "saturated"),
        _largest_share(every, "flushed"),
        str(sum(worst[o].nonfinite for o in worst)),
    ]


def _largest_share(rows: Iterable[NumericsRow], figure: str) -> str:
    shares = [(getattr(row, figure).mean, row.operand) for row in rows]
    share, operand = max(((s, o) for s, o in shares if not math.isnan(s)), default=(0.0, ""))
    if share == 0:
        return "0"
    percent = 100 * share
    text = f"{percent:.2f}" if percent >= 0.01 else f"{percent:.0e}"
    return f"{'W' if operand == 'weight' else operand} {text}"


def _shortened(name: str) -> str:
    if len(name) <= _NAME_WIDTH:
        return name
    half = _NAME_WIDTH // 2
    return f"{name[: half - 2]}..{name[-half:]}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def layers_of(model: nn.Module) -> dict[str, str]:
    """The weights in FP8 of a model, as rows name them, and the kind of their module."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            found[name or "(model)"] = "linear"
        elif _experts.in_fp8(module) and _experts.refused(module) is None:
            for weight in _experts.weights_of(module)[::2]:
                found[names.get(id(weight), name).removesuffix(".weight")] = "experts"
    return found


def _notes(rows: Iterable[NumericsRow], layers: dict[str, str]) -> list[str]:
    seen = {row.layer for row in rows}
    notes = []
    if unseen := [name for name in layers if name not in seen]:
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        notes.append(f"not seen: {', '.join(unseen[:5])}{more}")
    if "experts" in layers.values():
        notes.append(
            "of experts as one operator: not the second product's x, nor the first one's dy"
        )
    return notes
