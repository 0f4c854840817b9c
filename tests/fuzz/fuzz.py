"""make fuzz: any public operator, any legal input, against an independent reference.

    python tests/fuzz/fuzz.py --seconds 30 --seed 7      # other cases: another seed
    python tests/fuzz/fuzz.py --seed 7 --case 1234       # one case of a run again
    python tests/fuzz/fuzz.py --ops linear moe           # these families alone

On a CPU the reference is exact arithmetic and fp64; where there is a GPU, each case runs there and
on the CPU, against the same reference: what is quantized has the reference's bits on both, products
lie within the derived bounds of each. A failing case is made smaller and printed as a program; the
run goes on, and ends with exit code 1. Result: JSON beside those of the benchmarks, or in
build/status where arguments made it another run than the default one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("tests/fuzz", "tests/python", "tests/python/mlp", "benchmarks")
sys.path[:0] = [str(ROOT / folder) for folder in _FOLDERS]

import status  # noqa: E402
import torch  # noqa: E402
from case_fields import Case, Family, failure_of, kind_of, shrink  # noqa: E402
from runs import import_fp8  # noqa: E402

import_fp8()

from fuzz_delayed import DELAYED  # noqa: E402
from fuzz_experts import EXPERTS  # noqa: E402
from fuzz_frozen import FROZEN  # noqa: E402
from fuzz_grouped import GROUPED  # noqa: E402
from fuzz_grouped_mm import GROUPED_MM  # noqa: E402
from fuzz_linear import LINEAR  # noqa: E402
from fuzz_matmul import MATMUL  # noqa: E402
from fuzz_merged import MERGED  # noqa: E402
from fuzz_mlp import MLP  # noqa: E402
from fuzz_moe import MOE  # noqa: E402
from fuzz_norm import NORM  # noqa: E402
from fuzz_quantize import DEQUANTIZE, QUANTIZE  # noqa: E402
from fuzz_rope import ROPE  # noqa: E402

_DENSE = (QUANTIZE, DEQUANTIZE, MATMUL, LINEAR, FROZEN, MERGED, MLP, DELAYED)
_ALL = (*_DENSE, GROUPED_MM, GROUPED, MOE, EXPERTS, NORM, ROPE)
FAMILIES = {f.name: f for f in _ALL}
SECONDS = {"cpu": 180, "cuda": 300}
LAST_CASE = ROOT / "build" / "fuzz" / "last_case.txt"  # for a case that ends the process
SHRINK_SECONDS = 20.0


def drawn(seed: int, index: int, families: list[Family]) -> tuple[Family, Case]:
    """Case `index` of a run: the same for the same seed and families, whatever ran before."""
    rng = random.Random(f"{seed}/{index}")
    (family,) = rng.choices(families, [f.share for f in families])
    return family, family.draw(rng)


def replay(family: str, case: Case, device: str) -> None:
    """One case; raises as it failed."""
    FAMILIES[family].check(case, device)


def program(family: str, case: Case, device: str) -> str:
    """The case as Python, to be run from the root of the repository."""
    fields = "".join(f"    {name!r}: {value!r},\n" for name, value in case.items())
    return (
        "import sys\n\n"
        'sys.path[:0] = ["tests/fuzz", "python"]\n'
        "import fuzz\n\n"
        f"fuzz.replay({family!r}, {{\n{fields}}}, {device!r})\n"
    )


class Run:
    """The cases of one run and what came of them."""

    def __init__(self, seed: int, families: list[Family], devices: list[str]) -> None:
        self.seed, self.families, self.devices = seed, families, devices
        self.cases = dict.fromkeys((f.name for f in families), 0)
        self.failures: dict[str, dict[str, Any]] = {}  # by their kind

    def case(self, index: int) -> None:
        family, case = drawn(self.seed, index, self.families)
        LAST_CASE.write_text(program(family.name, case, self.devices[0]))
        self.cases[family.name] += 1
        for device in self.devices:
            error = failure_of(lambda c, on=device: family.check(c, on), case)
            if error is not None:
                self._failed(index, family, case, device, error)
                return

    def _failed(self, index: int, family: Family, case: Case, device: str, error: Exception):
        kind = f"{family.name}, {device}: {kind_of(error)}"
        if kind in self.failures:
            self.failures[kind]["times"] += 1
            return
        small = shrink(case, family, lambda c: family.check(c, device), SHRINK_SECONDS)
        message = str(failure_of(lambda c: family.check(c, device), small) or error)
        self.failures[kind] = {
            "what": kind,
            "seed": self.seed,
            "case": index,
            "times": 1,
            "error": message,
            "program": program(family.name, small, device),
        }
        print(f"\nFAILED seed {self.seed}, case {index}: {type(error).__name__}: {message}")
        print(f"\n{self.failures[kind]['program']}", flush=True)

    def until(self, end: float) -> None:
        """Cases 0, 1, 2, ... until that time, with a line that says how far it is."""
        begin = shown = time.monotonic()
        index, every = 0, 0.5 if sys.stdout.isatty() else 15.0
        while (now := time.monotonic()) < end:
            self.case(index)
            index += 1
            if now - shown >= every:
                shown = now
                done = (now - begin) / (end - begin)
                bar = "#" * int(20 * done)
                line = f"[{bar:<20}] {now - begin:4.0f} s, {index} cases"
                line += f", {len(self.failures)} kinds of failures" if self.failures else ""
                print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="180 on a CPU, 300 where there is a GPU")
    parser.add_argument("--seed", type=int, help="default: of the clock, and printed")
    parser.add_argument("--case", type=int, help="this case of the seed alone")
    parser.add_argument("--ops", nargs="+", choices=FAMILIES, help="families, default: all")
    parser.add_argument("--without", nargs="+", default=[], choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--device", choices=("cpu", "cuda", "both"), help="default: every one")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    gpu = torch.cuda.is_available()
    devices = ["cuda", "cpu"] if gpu else ["cpu"]
    if options.device in ("cpu", "cuda"):
        devices = [options.device]
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000
    seconds = options.seconds or SECONDS[devices[0]]
    names = [n for n in options.ops or FAMILIES if n not in options.without]
    families = [FAMILIES[name] for name in names]
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    # Small problems: threads that wait for each other on a shared machine take most of the time.
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // 4)))
    LAST_CASE.parent.mkdir(parents=True, exist_ok=True)
    run = Run(seed, families, devices)
    print(f"fuzz: seed {seed}, {seconds:.0f} s on {' and '.join(devices)}: {', '.join(names)}")
    begin = time.monotonic()
    if options.case is not None:
        family, case = drawn(seed, options.case, families)
        print(program(family.name, case, devices[0]))
        run.case(options.case)
    else:
        run.until(begin + seconds)
    failures = list(run.failures.values())
    total = sum(run.cases.values())
    counts = {"cases": total, "failed": len(failures), **run.cases}
    folder = options.output or status.folder_of(arguments)
    facts = {"seed": seed, "devices": devices}
    path = status.write("fuzz", counts, failures, time.monotonic() - begin, folder, facts)
    print(f"\nfuzz: {total} cases, {len(failures)} kinds of failures, seed {seed}; wrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
