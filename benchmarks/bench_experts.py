"""Experts of a mixture at inference, weights in FP8 or not: a call, from a CUDA graph, cold L2.

    python benchmarks/bench_experts.py --quick

`frozen` has weights that are FP8 (fp8.FrozenExperts' operator), `fused` quantizes them in each
replay, as a converted model does; `bf16` is the composition that transformers runs by default (its
`grouped_mm`), `bf16 products` its two grouped products alone, of rows that are sorted already.
`of a copy`: the time of copying on the device as many bytes as the codes of the experts that have
tokens, over that of the call; no call could read them faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import tables
import timing
import torch
from passes import copy_us
from runs import Row, import_fp8, main
from torch import Tensor
from tqdm import tqdm


class Mixture(NamedTuple):
    name: str
    experts: int
    top_k: int
    hidden: int
    features: int


MIXTURES = (
    Mixture("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Mixture("Mixtral-8x7B", 8, 2, 4096, 14336),
)
TOKENS = (1, 4, 16, 64, 512, 8192)
BF16 = torch.bfloat16


def composed(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, H] in bf16, as transformers composes it: nothing waits for the host."""
    tokens, top_k = index.shape
    experts, order = torch.sort(index.reshape(-1))
    groups = torch.arange(gate_up.size(0), device=x.device)
    offsets = torch.searchsorted(experts, groups, out_int32=True, right=True)
    rows = x[order // top_k]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    h = torch.nn.functional.silu(gate) * up
    y = torch._grouped_mm(h, down.transpose(1, 2), offs=offsets)
    y = y * weights.reshape(-1)[order, None].to(y.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[back].view(tokens, top_k, -1).sum(1)


def variants(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> dict[str, Callable[[], Tensor]]:
    ops = torch.ops.fp8

    def in_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = ops.quantize_rowwise(weight.view(-1, weight.size(2)))
        return codes.view(weight.shape), scale.view(*weight.shape[:2], 1)

    def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = ops.quantize_blockwise_128x128(weight.view(-1, weight.size(2)))
        return codes.view(weight.shape), scale.unflatten(0, (weight.size(0), -1)).contiguous()

    rowwise = (*in_rows(gate_up), *in_rows(down))
    blockwise = (*in_blocks(gate_up), *in_blocks(down))
    given = (x, index, weights)
    counts = torch.bincount(index.flatten(), minlength=gate_up.size(0))
    offsets = counts.cumsum(0).int()
    rows = torch.randn(index.numel(), x.size(1), device=x.device, dtype=BF16)
    h = torch.randn(index.numel(), down.size(2), device=x.device, dtype=BF16)

    def products() -> Tensor:
        torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)
        return torch._grouped_mm(h, down.transpose(1, 2), offs=offsets)

    return {
        "bf16": lambda: composed(*given, gate_up, down),
        "bf16 products": products,
        "frozen rowwise": lambda: ops.experts_frozen(*given, *rowwise),
        "frozen blockwise": lambda: ops.experts_frozen(*given, *blockwise),
        "fused rowwise": lambda: ops.moe_experts(*given, gate_up, down, recipe="rowwise"),
    }


def measure_mixture(mixture: Mixture, tokens: int, repeats: int) -> list[Row]:
    experts, hidden, features = mixture.experts, mixture.hidden, mixture.features

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16) * shape[-1] ** -0.5

    gate_up, down = drawn(experts, 2 * features, hidden), drawn(experts, hidden, features)
    x = torch.randn(tokens, hidden, device="cuda", dtype=BF16)
    weights, index = torch.rand(tokens, experts, device="cuda").softmax(-1).topk(mixture.top_k)
    used = index.unique().numel()
    calls = variants(x, index, weights, gate_up, down)  # which have the operands, that replays read
    with torch.no_grad():
        exact = composed(x, index, weights, gate_up, down).double()
        graphs = {name: timing.graph_of(run) for name, run in calls.items()}
    times = timing.device_times({name: run for name, (run, _) in graphs.items()}, repeats)
    bound = copy_us(used * 3 * features * hidden, repeats) if tokens <= 64 else None
    return [
        {
            "mixture": mixture.name,
            "tokens": tokens,
            "experts_used": used,
            "variant": name,
            "time_us": found.as_dict(),
            "speedup": times["bf16"].median / found.median,
            "of_weight_copy": None if bound is None else bound / found.median,
            "sqnr_db": None if "products" in name else timing.sqnr(graphs[name][1], exact),
        }
        for name, found in times.items()
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import_fp8()
    mixtures = MIXTURES[:1] if options.quick else MIXTURES
    values = (1, 16, 512, 8192) if options.quick else TOKENS
    rows: list[Row] = []
    for mixture in tqdm(mixtures, unit="mixture"):
        for tokens in values:
            rows += measure_mixture(mixture, tokens, 20 if options.quick else 40)
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["mixture, tokens", "experts", "variant", "us", "x bf16", "of a copy", "SQNR dB"]
    lines = [
        [
            f"{row['mixture']}, {row['tokens']}",
            row["experts_used"],
            row["variant"],
            row["time_us"]["median"],
            tables.ratio(row["speedup"]),
            None if row["of_weight_copy"] is None else tables.ratio(row["of_weight_copy"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=3)


if __name__ == "__main__":
    sys.exit(main("experts", __doc__.splitlines()[0], measure, table))
