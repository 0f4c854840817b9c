"""Later runs against earlier ones, by figures that hardly depend on the machine: ratios to bf16, to
a copy, to nn.Linear, each measured within one run."""

from __future__ import annotations

from runs import Row

# For each benchmark the fields that name a row, and those that are compared.
RATIOS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": (
        ("model", "part", "layers", "sequences", "context", "variant"),
        ("speedup", "peak_ratio"),
    ),
    "linear": (("sweep", "m", "k", "n", "variant"), ("step_speedup",)),
    "block": (
        ("model", "layers", "sequences", "context", "rotary", "variant"),
        ("speedup", "peak_ratio"),
    ),
    "accumulate": (("sequences", "context", "variant"), ("speedup", "peak_ratio")),
    "breakdown": (("case", "variant"), ("speedup",)),
    "quantize": (("op", "input_mb"), ("of_copy",)),
    "matmul": (("m", "k", "n", "variant"), ("speedup",)),
    "decode": (("m", "k", "n", "variant"), ("speedup",)),
    "experts": (("mixture", "tokens", "variant"), ("speedup",)),
    "generate": (
        ("model", "layers", "batch", "context", "variant"),
        ("speedup", "weights_ratio"),
    ),
    "host": (("variant", "bias"), ("step_ratio",)),
    "sizes": (("m", "k", "n", "variant"), ("step_speedup",)),
    "grouped": (("name", "rows", "routing", "product", "variant"), ("speedup",)),
    "fsdp": (
        ("model", "layers", "sequences", "context", "gpus", "variant"),
        ("speedup", "peak_ratio"),
    ),
    "moe": (("model", "tokens", "variant"), ("step_speedup", "forward_speedup", "peak_ratio")),
}
SMALLER_IS_BETTER = {"step_ratio", "peak_ratio", "weights_ratio"}
TOLERANCE = 0.07
TOLERANCES = {"host": 0.15}  # other processes share the host
THEIRS = ("bf16", "torch", "TE", "GEMMs", "ATen")  # how the names begin of what is not ours


def lacking(run: Row) -> set[str]:
    """Fields that a comparison needs and some row lacks: a run of an earlier form."""
    keys, figures = RATIOS.get(run["benchmark"], ((), ()))
    return {field for row in run["rows"] for field in (*keys, *figures) if field not in row}


def ratios(run: Row) -> dict[tuple, float]:
    """By the name of each row of ours and the figure's: its value, larger is better."""
    keys, figures = RATIOS[run["benchmark"]]
    found = {}
    for row in run["rows"]:
        name = tuple(row[key] for key in keys)
        if any(isinstance(part, str) and part.startswith(THEIRS) for part in name):
            continue
        for figure in figures:
            value = row[figure]
            found[(*name, figure)] = 1 / value if figure in SMALLER_IS_BETTER else value
    return found


def regressions(new: Row, old: Row) -> list[str]:
    """Rows of `new` worse than the same rows of `old` by more than the tolerance."""
    allowed = TOLERANCES.get(new["benchmark"], TOLERANCE)
    before = ratios(old)
    return [
        f"{new['benchmark']} {', '.join(map(str, name))}: {value:.3f}, was {before[name]:.3f}"
        for name, value in ratios(new).items()
        if name in before and value < before[name] * (1 - allowed)
    ]


def compared(new: Row, old: Row) -> int:
    """How many figures both have."""
    return len(ratios(new).keys() & ratios(old).keys())


def check(new: dict[str, Row], old: dict[str, Row]) -> tuple[bool, str]:
    """Runs by the name of their file. Whether all is well, and the report. Nothing to compare
    counts as a failure: such a check would pass for ever."""
    both = [name for name in new if name in old]
    count = sum(compared(new[name], old[name]) for name in both)
    if not count:
        return False, f"nothing to compare: {', '.join(new)} against {', '.join(old) or 'no run'}"
    worse = [line for name in both for line in regressions(new[name], old[name])]
    summary = f"{count} figures of {len(both)} runs compared, {len(worse)} worse"
    return not worse, "\n".join([*worse, summary if worse else f"no regression: {summary}"])
