"""One token of a whole Llama 3 8B: the time of a decode step, and the memory of its weights.

    python benchmarks/bench_generate.py --quick

Random weights, a cache of fixed size that is full. `graph` replays a CUDA graph of the step, eager
is bound by the host. bf16's lm_head and embedding are everybody's. fp8: frozen layers (fp8.freeze),
by the decode kernel, or without it, or inside fp8.batch_invariant().
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version

import memory
import tables
import timing
import torch
from decoding import Decoder
from runs import Row, import_fp8, main
from shapes import BlockShape
from torch import Tensor, nn
from tqdm import tqdm

VOCABULARY = 128256
MODEL = "Llama-3-8B"
SHAPE = BlockShape(4096, 14336, 32, 8, layers=32, sequences=1, tokens=1024)
BATCHES = (1, 16)


def torchao_rows(model: nn.Module) -> nn.Module:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, filter_fn=lambda m, name: type(m) is nn.Linear and name != "lm_head")
    return model


def weights_gib(model: nn.Module) -> float:
    """Of what a layer reads: codes and scales, or numbers."""
    return sum(nbytes(parameter) for parameter in model.parameters()) / memory.GIB


def nbytes(tensor: Tensor) -> int:
    """A peer's tensor is one of tensors, and says the size that it had before."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(nbytes(getattr(tensor, name)) for name in names)


def set_decode(model: nn.Module, decode: bool) -> None:
    fp8 = import_fp8()
    for module in model.modules():
        if isinstance(module, fp8.FrozenLinear):
            module.decode = decode


class Variants:
    """Steps of one shape, by name, with the model that each runs."""

    def __init__(self, shape: BlockShape) -> None:
        self.fp8 = import_fp8()
        self.plain = Decoder(shape, VOCABULARY).requires_grad_(False)
        self.tokens = torch.randint(0, VOCABULARY, (shape.sequences, 1), device="cuda")
        self.steps: dict[str, Callable[[], object]] = {}
        self.outputs: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.skipped: Row = {}

    def add(
        self,
        name: str,
        model: nn.Module,
        graph: bool = True,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        def step() -> Tensor:
            with context():
                return model(self.tokens)

        self.weights[name] = weights_gib(model)
        if not graph:
            self.outputs[name], self.steps[name] = step(), step
            return
        self.steps[name], self.outputs[name] = timing.graph_of(step)

    def make(self) -> None:
        self.add("bf16", self.plain, graph=False)
        self.add("bf16, graph", self.plain)
        for recipe in ("rowwise", "blockwise"):
            model = self.fp8.freeze(copy.deepcopy(self.plain), recipe)
            name = f"fp8 {recipe}"
            self.add(name, model, graph=False)
            self.add(f"{name}, graph", model)
            set_decode(model, False)
            self.add(f"{name}, graph, decode=False", model)
            set_decode(model, True)
            self.add(f"{name}, graph, batch invariant", model, context=self.fp8.batch_invariant)
        try:
            name = f"torchao {version('torchao')} PerRow"
            model = torchao_rows(copy.deepcopy(self.plain))
            self.add(name, model, graph=False)
            self.add(f"{name}, graph", model)
        except Exception as error:
            self.skipped["torchao PerRow"] = f"{type(error).__name__}: {error}".splitlines()[0]


def measure_shape(shape: BlockShape, repeats: int) -> tuple[list[Row], Row]:
    variants = Variants(shape)
    with torch.no_grad():
        variants.make()
        times = timing.device_times(variants.steps, repeats)
        for step in variants.steps.values():
            step()  # so that what graphs left is of the same tokens
    exact = variants.outputs["bf16"].double()
    rows = [
        {
            "model": MODEL,
            "layers": shape.layers,
            "batch": shape.sequences,
            "context": shape.tokens,
            "variant": name,
            "step_us": found.as_dict(),
            "tokens_per_s": shape.sequences * 1e6 / found.median,
            "speedup": times["bf16, graph"].median / found.median,
            "weights_gib": variants.weights[name],
            "weights_ratio": variants.weights[name] / variants.weights["bf16"],
            "sqnr_db": None
            if name.startswith("bf16")
            else timing.sqnr(variants.outputs[name], exact),
        }
        for name, found in times.items()
    ]
    return rows, variants.skipped


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    rows: list[Row] = []
    skipped: Row = {}
    for batch in tqdm(BATCHES[:1] if options.quick else BATCHES, unit="batch"):
        layers = 2 if options.quick else SHAPE.layers
        found, without = measure_shape(
            SHAPE._replace(sequences=batch, layers=layers), 5 if options.quick else 15
        )
        rows += found
        skipped |= without
        options.save(rows, skipped)
        memory.free()
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = [
        *("model, batch × context", "variant", "ms", "tokens/s", "x bf16 graph"),
        *("weights GiB", "x bf16", "SQNR dB"),
    ]
    lines = [
        [
            f"{row['model']}, {row['layers']} layers, {row['batch']} × {row['context']}",
            row["variant"],
            row["step_us"]["median"] / 1e3,
            row["tokens_per_s"],
            tables.ratio(row["speedup"]),
            row["weights_gib"],
            tables.ratio(row["weights_ratio"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("generate", __doc__.splitlines()[0], measure, table))
