"""Generate with weights in FP8: a small language model decoded in bf16 and with frozen layers.

The model is a Llama of transformers, trained for a few seconds on the text of the main demo, byte
by byte, or one that is loaded from a folder, in high precision or in FP8. The same weights, frozen
by rows and by blocks, are then decoded by `generate`, and on a GPU from a CUDA graph as well. Run
it with `make demo-inference`, or `PYTHONPATH=python python examples/generate.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import devices
import fp8
from stdlib_text import VOCABULARY, Text, load_text

RECIPES = ("rowwise", "blockwise")


@dataclass(frozen=True)
class Job:
    """A Llama, how long it is trained, and how much is generated."""

    width: int
    inner: int
    layers: int
    heads: int
    batch: int  # sequences a training step
    length: int  # bytes a sequence
    steps: int
    learning_rate: float
    dtype: torch.dtype  # of training
    tokens: int  # generated
    prompt: int = 64


JOBS = {
    "tiny": Job(64, 128, 2, 2, 4, 64, 12, 3e-3, torch.float32, 8, 16),
    "cpu": Job(128, 384, 3, 4, 8, 64, 100, 2e-3, torch.float32, 32),
    "gpu": Job(4096, 14336, 4, 32, 8, 512, 60, 2e-4, torch.bfloat16, 128),
}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """With so many threads inside; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(job: Job, text: Text, device: torch.device) -> nn.Module:
    """A Llama over bytes, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=job.width,
        intermediate_size=job.inner,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=max(1, job.heads // 4),
        max_position_embeddings=1024,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(job.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate)
    for step in range(job.steps):
        tokens, targets = (t.to(device) for t in text.batch(step, job.batch, job.length, 0))
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {job.steps} steps, loss {loss.item():.3f} nats per byte")
    return model.to(torch.bfloat16).eval()


def loaded(folder: Path, device: torch.device) -> nn.Module:
    """A causal language model of transformers, in bf16, its layers frozen where the files have FP8
    codes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is FP8 is told by the files
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(fp8.load(model, folder))
    return model.to(device).eval()


def tokens_of(folder: Path | None, text: Text, count: int, vocabulary: int) -> torch.Tensor:
    """[count] token ids of held-out text: bytes, or what the folder's tokenizer makes of them."""
    data = text.held_out[: 8 * count]
    if folder is None or not any(folder.glob("tokenizer*")):
        return data[:count].long() % vocabulary
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)(bytes(data.tolist()).decode(errors="replace"))
    return torch.tensor(words["input_ids"][:count])


def frozen_layers(model: nn.Module) -> dict[str, fp8.FrozenLinear]:
    """A model's, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, fp8.FrozenLinear)}


def thawed(model: nn.Module) -> nn.Module:
    """A copy with an nn.Linear for each frozen layer, of the numbers that the codes stand for."""
    model = copy.deepcopy(model)
    for name, layer in frozen_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.dequantize(), False), layer.bias
        model.set_submodule(name, linear)
    return model


def variants_of(model: nn.Module, recipes: Sequence[str]) -> dict[str, nn.Module]:
    """What is compared: bf16 first."""
    if frozen_layers(model):
        return {"bf16": thawed(model), "fp8 as loaded": model}
    made = {f"fp8 {recipe}": fp8.freeze(copy.deepcopy(model), recipe) for recipe in recipes}
    return {"bf16": model} | made


@torch.no_grad()
def eager(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """[count] greedy tokens by transformers' generate."""
    mask = torch.ones_like(prompt)
    lengths = {"min_new_tokens": count, "max_new_tokens": count}
    found = model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    return found[0, prompt.shape[1] :]


class Decoder:
    """Greedy decoding through a cache of fixed size: every step is the same kernels on the same
    addresses, so that a CUDA graph can hold it."""

    def __init__(self, model: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.step: Callable[[], None] = self._step

    def _feed(self, tokens: torch.Tensor) -> None:
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def _step(self) -> None:
        self._feed(self.token)

    @torch.no_grad()
    def capture(self) -> None:
        """Make `step` the replay of a graph. Needs a GPU."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # allocations, and plans of matmuls, are made before
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.step = graph.replay

    @torch.no_grad()
    def __call__(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        self.cache.reset()
        self._feed(prompt)
        tokens = [self.token.clone()]
        for _ in range(count - 1):
            self.step()
            tokens.append(self.token.clone())
        return torch.cat(tokens, 1)[0]


def speed(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """What `run` generates the second time, and tokens per second."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    tokens = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens, len(tokens) / (time.perf_counter() - begin)


@torch.no_grad()
def logits_of(model: nn.Module, batches: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] float32 of given text, so that nobody's choices change what follows."""
    return model(input_ids=batches, use_cache=False).logits.float().flatten(0, 1)


def decibels(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Power of what is expected over that of the error."""
    error = (actual - expected).norm().item()
    return 20 * math.log10(expected.norm().item() / error) if error else math.inf


def rows_of(
    name: str, model: nn.Module, expected: torch.Tensor, ids: torch.Tensor, job: Job
) -> list[list[str]]:
    """The table's rows of one model: eager, and from a CUDA graph where there is a GPU."""
    prompt, count, device = ids[None, : job.prompt], job.tokens, ids.device
    own = logits_of(model, ids.view(4, -1))
    same = (own.argmax(-1) == expected.argmax(-1)).float().mean().item()
    close = decibels(own, expected)
    shown = ["", ""] if name == "bf16" else [f"{same:.1%}", f"{close:.1f} dB"]
    memory = f"{sum(p.nbytes for p in model.parameters()) / 2**20:.2f} MiB"
    _, rate = speed(lambda: eager(model, prompt, count), device)
    rows = [[name, "eager", f"{rate:.1f}", memory, *shown]]
    if device.type == "cuda":
        decoder = Decoder(model, job.prompt + count + 8)
        try:
            decoder.capture()
        except RuntimeError as error:
            print(f"{name}: no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            _, rate = speed(lambda: decoder(prompt, count), device)
            rows.append([name, "graph", f"{rate:.1f}", memory, *shown])
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """One line per row, columns aligned for a terminal."""
    header = ["model", "decoding", "tokens/s", "weights", "same choice", "logits"]
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line))
        for line in lines
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a checkpoint, not a new model"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", choices=JOBS, help="model and training (default: cpu or gpu)")
    parser.add_argument("--tokens", type=int, help="to generate")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=fp8.RECIPES, metavar="R")
    options = parser.parse_args(arguments)
    if options.tokens is not None and options.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {options.tokens}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model must be a folder, got {options.model}")
    devices.choose(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains or loads, generates, prints the table; returns the exit status."""
    options = parse(arguments)
    # For a model as small as the CPU's, more threads are slower.
    with threads(1 if options.device == "cpu" and not options.model else None):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """What the command line asks for."""
    job, device = JOBS[options.size], torch.device(options.device)
    if options.tokens is not None:
        job = Job(**(vars(job) | {"tokens": options.tokens}))
    text = load_text()
    model = loaded(options.model, device) if options.model else trained(job, text, device)
    count = 4 * max(job.prompt, 128)
    ids = tokens_of(options.model, text, count, model.config.vocab_size).to(device)
    variants = variants_of(model, options.recipes)
    expected = logits_of(variants["bf16"], ids.view(4, -1))
    rows = [row for n, m in variants.items() for row in rows_of(n, m, expected, ids, job)]
    layers = len(frozen_layers(list(variants.values())[-1]))
    print(f"frozen  {layers} layers; embeddings, norms and lm_head stay in bf16\n\n{table(rows)}\n")
    print(f"same choice, logits: beside bf16, on {len(ids)} tokens of held-out text.")
    if device.type == "cpu":
        print(
            "On a CPU frozen layers multiply what the codes stand for: speed there is not a GPU's."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
