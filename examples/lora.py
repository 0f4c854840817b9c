"""LoRA on a frozen base: a Llama's layers become FP8 codes, and PEFT trains adapters beside them.

The model is trained for some steps on the text of the main demo, byte by byte, and frozen. Adapters
then learn what it has not seen: the same text in capitals. They are saved, loaded onto another copy
of the base, merged into its codes, and taken out again. Run it with `make demo-lora`, or
`PYTHONPATH=python python examples/lora.py --help` where peft is installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

import devices
import fp8
from generate import JOBS, frozen_layers, threads, trained
from stdlib_text import Text, load_text

NEEDED = (
    "examples/lora.py needs the package peft: pip install --no-deps peft==0.21.2 "
    "accelerate==1.15.0 psutil==7.2.2, or make demo-lora, which installs what tests/compat needs"
)


def in_capitals(tokens: torch.Tensor) -> torch.Tensor:
    """a..z become A..Z."""
    return torch.where((tokens >= 97) & (tokens <= 122), tokens - 32, tokens)


def loss_of(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats per byte. tokens, targets: [batch, length] int64."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def megabytes(model: nn.Module, of: Callable[[str], bool] = lambda name: True) -> str:
    """Memory of the parameters whose names `of` takes."""
    size = sum(p.nbytes for name, p in model.named_parameters() if of(name))
    return f"{size / 2**20:.2f} MiB"


def train(model: nn.Module, text: Text, steps: int, rate: float, batch: int, length: int) -> None:
    """AdamW on what requires a gradient: the adapters."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=rate)
    model.train()
    for step in range(steps):
        tokens, targets = text.batch(step, batch, length, 1)
        device = adapters[0].device
        loss = loss_of(model, in_capitals(tokens).to(device), in_capitals(targets).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", choices=JOBS, help="model and training (default: cpu or gpu)")
    parser.add_argument("--recipe", default="rowwise", choices=fp8.RECIPES, metavar="RECIPE")
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args(arguments)
    devices.choose(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, saves, loads, merges; returns the exit status: 1 where adapters learned nothing."""
    options = parse(arguments)
    if find_spec("peft") is None:
        print(NEEDED, file=sys.stderr)
        return 2
    with threads(1 if options.device == "cpu" else None):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """What the command line asks for."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from fp8.integrations.peft import adopt, register

    job, device, text = JOBS[options.size], torch.device(options.device), load_text()
    tokens, targets = text.held_out_batch(0, 8, job.length)
    held_out = [in_capitals(t).to(device) for t in (tokens, targets)]

    @torch.no_grad()
    def judged(model: nn.Module) -> float:
        return loss_of(model, *held_out).item()

    model = trained(job, text, device)
    print(f"base    bf16 {megabytes(model)}", end="")
    base = fp8.freeze(model, options.recipe)
    print(f", frozen {megabytes(base)}: {len(frozen_layers(base))} layers {options.recipe}")
    other = copy.deepcopy(base)

    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    model = get_peft_model(base, register(config))
    print(f"lora    rank {options.rank}, {megabytes(model, lambda name: 'lora_' in name)} trained")
    before = judged(model)
    train(model, text, job.steps, 2 * job.learning_rate, job.batch, job.length)
    after = judged(model)
    print(f"loss    {before:.3f} before, {after:.3f} after {job.steps} steps, held-out capitals")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = adopt(PeftModel.from_pretrained(other, folder)).eval()
    print(f"loaded  {judged(again):.3f}")
    again.merge_adapter()
    print(f"merged  {judged(again):.3f}: base and adapters in one weight, rounded to FP8")
    again.unmerge_adapter()
    apart = judged(again)
    print(f"apart   {apart:.3f}: the codes from before")
    merged = again.merge_and_unload()
    print(f"result  {megabytes(merged)}, {len(frozen_layers(merged))} frozen layers, for fp8.save")
    return 0 if after < before and apart == after else 1


if __name__ == "__main__":
    sys.exit(main())
