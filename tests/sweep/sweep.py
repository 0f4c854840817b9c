"""make sweep: every family of transformers that converts, small: fused, composed and bf16 compared.

    python tests/sweep/sweep.py --families llama t5     # these alone
    python tests/sweep/sweep.py --kind decoder --every 8 --variant hook

Loss and every gradient, in the ways of cases.py, and for each family in turn one of the things that
programs do (variants.py), or the one of --variant; then DDP and FSDP2 of two processes. On a GPU
where there is one. A family that cannot be made small, or in which nothing is converted, is listed
with the reason; fewer than 60 decoders or 20 others that ran are a failure, and so is a fusion that
was not met. Exit code 1 where something failed. Result: JSON beside those of the benchmarks, or in
build/status where arguments made it another run than the whole one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/sweep", "tests/compat", "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bf16's own bits are repeated

import status  # noqa: E402
import torch  # noqa: E402
from runs import import_fp8  # noqa: E402

import_fp8()

import transformers  # noqa: E402
from cases import Outcome, examine  # noqa: E402
from families import Family, families, named  # noqa: E402
from processes import WRAPPERS, run_processes  # noqa: E402
from variants import VARIANTS  # noqa: E402

from fp8.conversion import _fusions  # noqa: E402

LEAST = {"decoder": 60, "other": 20}  # families that must have run
WIDTH = 100


class Sweep:
    """The families of one run and what came of them."""

    def __init__(self, chosen: list[Family], device: str, variant: str | None = None) -> None:
        self.chosen, self.device, self.variant = chosen, device, variant
        self.outcomes: list[Outcome] = []
        self.failures: list[dict[str, Any]] = []
        order = {family: number for number, family in enumerate(families())}
        self.numbers = [order[family] for family in chosen]  # a part has the variants of the whole

    def fail(self, what: str, errors: list[str], **more: Any) -> None:
        self.failures.append({"what": what, "error": "; ".join(errors)[:1000], **more})

    def run(self) -> None:
        for index, (family, number) in enumerate(zip(self.chosen, self.numbers, strict=True)):
            if sys.stdout.isatty():
                done = index / len(self.chosen)
                bar = f"[{'#' * int(20 * done):<20}] {index} of {len(self.chosen)}: {family.name}"
                print(f"{bar:<{WIDTH}}", end="\r", flush=True)
            begin = time.monotonic()
            outcome = examine(family, number, self.device, self.variant)
            outcome.seconds = time.monotonic() - begin
            self.outcomes.append(outcome)
            print(f"{line(outcome):<{WIDTH}}", flush=True)
            for text in outcome.failures:
                print(f"    {text}", flush=True)
            if outcome.failures:
                again = f"python tests/sweep/sweep.py --families {family.name}"
                again += f" --variant '{outcome.variant}'"
                self.fail(family.name, outcome.failures, command=again)

    def processes(self) -> None:
        """DDP and FSDP2."""
        for wrapper, family in WRAPPERS.items():
            error = run_processes(wrapper, family)
            print(f"{'failed' if error else 'passed':<8}{wrapper} of two processes, {family}")
            if error:
                print(f"    {error}", flush=True)
                self.fail(f"{wrapper} of {family}", [error])

    def missing(self) -> None:
        """What a whole run must have met."""
        ran = Counter(o.family.kind for o in self.outcomes if o.status != "unfit")
        for kind, least in LEAST.items():
            if ran[kind] < least:
                self.fail(f"{kind} families", [f"{ran[kind]} ran, {least} should"])
        met = {kind for o in self.outcomes for kind in o.kinds}
        for fusion in _fusions.fusions():
            if fusion.name not in met:
                self.fail(fusion.name, ["no family has it"])

    def counts(self) -> dict[str, int]:
        states = Counter(o.status for o in self.outcomes)
        ran = [o for o in self.outcomes if o.status != "unfit"]
        return {
            "passed": states["passed"],
            "failed": len(self.failures),
            "skipped": states["unfit"],
            "decoders": sum(o.family.kind == "decoder" for o in ran),
            "others": sum(o.family.kind == "other" for o in ran),
            "checks": sum(len(o.checks) for o in ran),
        }


def line(outcome: Outcome) -> str:
    """One family."""
    state = {"unfit": "-"}.get(outcome.status, outcome.status)
    text = f"{state:<8}{outcome.family.name:<25}"
    if outcome.status != "unfit":
        fused = " ".join(sorted(outcome.kinds)) or "nothing fused"
        text += f"{outcome.seconds:5.1f} s  {outcome.variant:<24}{fused}"
    if outcome.reason:
        text = f"{text}{'  ' if outcome.status != 'unfit' else ''}({outcome.reason})"
    return text


def table(outcomes: list[Outcome]) -> str:
    """What was compared, how often, and how far apart it was at most."""
    ran = [o for o in outcomes if o.status != "unfit"]
    lines = [f"{'check':<30}{'families':>9}{'failed':>8}  most of loss and of all gradients"]
    names = [*dict.fromkeys(name for o in ran for name in o.checks)]
    for name in sorted(names, key=lambda n: (n in VARIANTS, n)):
        count = sum(name in o.checks for o in ran)
        failed = sum(any(f.startswith(f"{name}: ") for f in o.failures) for o in ran)
        found = [o.distances[name] for o in ran if name in o.distances]
        most = (
            f"{max(d.loss for d in found):.1g}, {max(d.whole for d in found):.1g}" if found else ""
        )
        lines.append(f"{name:<30}{count:>9}{failed:>8}  {most}")
    kinds = Counter(kind for o in ran for kind in o.kinds)
    lines.append("fused: " + ", ".join(f"{kind} in {n} families" for kind, n in kinds.items()))
    unfit = Counter(o.reason.split(":")[0] for o in outcomes if o.status == "unfit")
    lines += [f"left out, {reason}: {count}" for reason, count in unfit.most_common(8)]
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", metavar="NAME", help="model types, default: all")
    parser.add_argument("--kind", choices=LEAST, help="these alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N of them")
    parser.add_argument("--variant", choices=VARIANTS, help="for all; default: each in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    return parser.parse_args(arguments)


def chosen_by(options: argparse.Namespace) -> list[Family]:
    found = named(options.families) if options.families else families()
    return [f for f in found if options.kind in (None, f.kind)][:: options.every]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)  # the models are small
    torch.use_deterministic_algorithms(True, warn_only=True)
    sweep = Sweep(chosen_by(options), device, options.variant)
    print(
        f"sweep: {len(sweep.chosen)} families on {device}, transformers {transformers.__version__}"
    )
    begin = time.monotonic()
    sweep.run()
    if not arguments:
        sweep.processes()
        sweep.missing()
    counts = sweep.counts()
    facts = {
        "device": device,
        "transformers": transformers.__version__,
        "left_out": {o.family.name: o.reason for o in sweep.outcomes if o.status == "unfit"},
        "not_here": {o.family.name: o.reason for o in sweep.outcomes if o.reason and o.checks},
    }
    seconds = time.monotonic() - begin
    folder = options.output or status.folder_of(arguments)
    path = status.write("sweep", counts, sweep.failures, seconds, folder, facts)
    print(f"\n{table(sweep.outcomes)}")
    print(
        f"sweep: {counts['decoders']} decoders and {counts['others']} others ran, "
        f"{counts['skipped']} left out; {counts['failed']} failures, {seconds:.0f} s; wrote {path}"
    )
    return 1 if sweep.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
