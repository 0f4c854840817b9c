"""make soak: thousands of steps of small models in every recipe; nothing may grow, nor go astray.

    python tests/soak/soak.py --steps 2000 --seed 7

20,000 steps where there is a GPU, 2,000 on a CPU, or what 280 s allow. Looked at, about 40 times
a run: memory, handles, plans and tensors (footprint.py says what may grow by how much); and that
every loss is finite. At the end each model's loss is that of bf16, up to 15%, and on a CPU the
first steps of a second run with the same seed have the same bits. A failure names the step and the
seed; exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/soak"), str(ROOT / "benchmarks")]

import status  # noqa: E402
import torch  # noqa: E402
from runs import import_fp8  # noqa: E402

import_fp8()

import footprint  # noqa: E402
import trainees  # noqa: E402

STEPS = {"cuda": 20_000, "cpu": 2_000}
SECONDS = 280  # a host that is slower than this allows does fewer steps
WARM_UP = 0.1  # of the steps: allocators and caches fill
LOOKS = 40
# FP8 keeps 28 dB or more of every operand: its noise adds a few percent to what the targets' own
# leaves of the loss (trainees.NOISE).
LOSS_RATIO = 1.15
ACCUMULATES, EVALUATES = 25, 10  # every so many steps
REPLACES = 10  # so many times a run


class Soak:
    """A run: losses [trainee, step], and what failed."""

    def __init__(self, steps: int, seed: int, device: str, seconds: float = SECONDS) -> None:
        self.steps, self.seed, self.device, self.seconds = steps, seed, device, seconds
        self.done = 0
        dtype = torch.bfloat16
        self.trainees = trainees.make(device, dtype, seed)
        self.teacher = trainees.Teacher(device, dtype, seed)
        self.losses = torch.zeros(len(self.trainees), steps, device=device)
        self.failures: list[dict[str, Any]] = []

    def fail(self, step: int, what: str) -> None:
        self.failures.append({"what": what, "step": step, "seed": self.seed})
        print(f"\nFAILED step {step}, seed {self.seed}: {what}", flush=True)

    def step(self, step: int) -> None:
        rows = trainees.ROWS[step % len(trainees.ROWS)]
        batches = [self.teacher.batch(rows)]
        if step % ACCUMULATES == ACCUMULATES - 1:
            batches.append(self.teacher.batch(rows))
        for number, trainee in enumerate(self.trainees):
            self.losses[number, step] = trainee.step(batches)
            if step % EVALUATES == 0:
                with torch.no_grad():
                    trainee.model(batches[0][0])
        every = max(1, self.steps // REPLACES)
        if step % every == every - 1:  # weights that end, with all that hangs on them
            for trainee in trainees.make(self.device, torch.bfloat16, step):
                for _ in range(18):
                    trainee.step(batches[:1])

    def look(self, first: int, step: int) -> None:
        """Losses of the steps since `first`."""
        bad = (~self.losses[:, first : step + 1].isfinite()).nonzero().tolist()
        if bad:
            number, since = min(bad, key=lambda place: place[1])
            self.fail(first + since, f"{self.trainees[number].name}: loss is not finite")

    def run(self, after_step: Callable[[int], None] = lambda step: None) -> None:
        """after_step: for tests."""
        cycle = len(trainees.ROWS)
        every = max(cycle, self.steps // LOOKS // cycle * cycle)
        before, first = None, 0
        end = time.monotonic() + self.seconds
        for step in range(self.steps):
            self.step(step)
            after_step(step)
            self.done = step + 1
            if (step + 1) % every:
                continue
            self.look(first, step)
            first = step + 1
            now = footprint.measure()
            if before is None and step >= self.steps * WARM_UP:
                before = now
            grown = footprint.growth(before, now) if before else []
            for what in grown:
                self.fail(step, what)
            print(f"step {step + 1:6} of {self.steps}: {_line(now)}", flush=True)
            if self.failures:
                return
            if time.monotonic() > end:
                print(f"soak: {self.seconds} s are over: {self.done} of {self.steps} steps")
                break
        self.look(first, self.done - 1)
        if not self.failures:
            self.compare()

    def compare(self) -> None:
        """How the losses fell, against bf16's."""
        losses = self.losses[:, : self.done]
        head = losses[:, : len(trainees.ROWS)].mean(1).tolist()
        tail = losses[:, -max(len(trainees.ROWS), self.done // 10) :].mean(1).tolist()
        ends = {t.name: end for t, end in zip(self.trainees, tail, strict=True)}
        for trainee, begin, end in zip(self.trainees, head, tail, strict=True):
            print(f"{trainee.name:28} loss {begin:.4f} -> {end:.4f}")
            peer = ends[trainee.peer]
            if not end <= peer * LOSS_RATIO:
                self.fail(self.done, f"{trainee.name}: loss {end:.4f}, {trainee.peer}'s {peer:.4f}")
            if not end < begin:
                self.fail(self.done, f"{trainee.name}: loss did not fall from {begin:.4f}")

    def same_bits_again(self, steps: int) -> None:
        """A second run of the first steps."""
        again = Soak(steps, self.seed, self.device)
        for step in range(steps):
            again.step(step)
        for number, step in (again.losses != self.losses[:, :steps]).nonzero().tolist()[:1]:
            one, other = (run.losses[number, step].item() for run in (self, again))
            name = self.trainees[number].name
            self.fail(step, f"{name}: loss {one!r}, and {other!r} in a second run")


def _line(now: dict[str, int]) -> str:
    words = []
    for name, value in now.items():
        amount = f"{value / footprint.MIB:.1f} MiB" if name.endswith("bytes") else str(value)
        words.append(f"{name.removesuffix(' bytes')} {amount}")
    return ", ".join(words)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="20000 where there is a GPU, 2000 on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"at most (default {SECONDS})"
    )
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = options.steps or STEPS[device]
    torch.set_num_threads(1)  # the layers are small
    begin = time.monotonic()
    soak = Soak(steps, options.seed, device, options.seconds)
    print(f"soak: {steps} steps of {len(soak.trainees)} models on {device}, seed {options.seed}")
    soak.run()
    repeated = 0
    if device == "cpu" and not soak.failures:
        repeated = min(soak.done, 100)
        soak.same_bits_again(repeated)
    seconds = time.monotonic() - begin
    counts = {
        "steps": soak.done,
        "asked": steps,
        "models": len(soak.trainees),
        "repeated": repeated,
        "failed": len(soak.failures),
    }
    folder = options.output or status.folder_of(arguments)
    path = status.write("soak", counts, soak.failures, seconds, folder, {"seed": options.seed})
    print(f"soak: {soak.done} steps, {len(soak.failures)} failures, {seconds:.0f} s; wrote {path}")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
