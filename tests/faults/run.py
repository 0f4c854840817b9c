"""Proves the tests: applies each fault of faults.py to a copy of the tree and sees a test go red.

python tests/faults/run.py [--jobs N] [WORD ...]

Words: only faults whose name or file has one of them. The copies, one a job, are
build/faults/tree0 and so on, each with a build of its own that is kept for the next run. Without a
GPU they are built without CUDA, and the faults of kernels are skipped and counted. Status 1 if some
fault goes unnoticed, or if a test is red without any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from fault import Fault, apply
from faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()


def tool(name: str) -> str:
    """A tool of the running Python's environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"test-faults: needs {name}")
    return found


class Tree:
    """A copy of the tree. jobs: compilers at once."""

    def __init__(self, path: Path, jobs: int) -> None:
        self.path = path
        self.jobs = jobs

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": str(self.path / "python"),
            "TSAN_OPTIONS": "halt_on_error=1",  # thousands of races otherwise
        }
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, *command: object) -> None:
        result = self.run(*command)
        if result.returncode != 0:
            raise SystemExit(f"test-faults: {command[0]} failed\n{result.stdout}{result.stderr}")

    def copy(self) -> None:
        """Brings it up to date; files that did not change keep their times, and their objects."""
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
        for name in names:
            source, target = ROOT / name, self.path / name
            if not source.is_file():
                continue
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def configure(self) -> None:
        script = self.path / "scripts/catch2.sh"
        header = subprocess.check_output(["bash", script], text=True).strip()
        build = self.path / "build"
        self.must(
            *(tool("cmake"), "-S", self.path, "-B", build, "-G", "Ninja"),
            *("-DFP8_BUILD_TESTS=ON", f"-DCATCH2_INCLUDE_DIR={header}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DFP8_CUDA={'ON' if GPU else 'OFF'}"),
        )
        self.must(
            *(tool("cmake"), "-S", self.path / "tests/cpp/host", "-B", build / "tsan"),
            *("-G", "Ninja", "-DFP8_SANITIZE=thread", f"-DCATCH2_INCLUDE_DIR={header}"),
        )

    def build(self, test: str) -> bool:
        """Builds what the test needs; a fault that does not compile proves nothing."""
        kind, _, name = test.partition(" ")
        folder = self.path / ("build/tsan" if kind == "tsan" else "build")
        targets = [name] if kind in ("ctest", "tsan") else ["fp8_torch", "_C"]
        result = self.run(tool("cmake"), "--build", folder, "-j", self.jobs, "--target", *targets)
        if result.returncode != 0:
            print(result.stdout[-3000:], result.stderr[-1000:], file=sys.stderr)
        return result.returncode == 0

    def is_green(self, test: str) -> bool:
        kind, _, name = test.partition(" ")
        build = self.path / "build"
        if kind == "ctest":
            command = [tool("ctest"), "--test-dir", build, "--no-tests=error", "-R"]
            return self.run(*command, f"^{name}$").returncode == 0
        if kind == "tsan":
            command = ["setarch", "-R", tool("ctest"), "--test-dir", build / "tsan"]
            return self.run(*command, "--no-tests=error", "-R", f"^{name}$").returncode == 0
        result = self.run(
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test.split()
        )
        # 2: a fault may break the import. Else no tests, or no such file: none that went red.
        if result.returncode not in (0, 1, 2):
            raise SystemExit(f"test-faults: pytest {test}\n{result.stdout}{result.stderr}")
        return result.returncode == 0

    def outcome(self, fault: Fault) -> str:
        """'noticed', or what else came of it."""
        text = apply(fault, self.path)
        try:
            if not self.build(fault.command):
                return "does not compile"
            return "UNNOTICED" if self.is_green(fault.command) else "noticed"
        finally:
            (self.path / fault.file).write_text(text)

    def try_all(self, faults: list[Fault]) -> int:
        """How many were not noticed, each said in a line; those of a test that is red without a
        fault are none."""
        self.copy()
        self.configure()
        bad = 0
        for test, those in by_test(faults).items():
            if not self.build(test) or not self.is_green(test):
                print(f"test-faults: red without a fault: {test}", file=sys.stderr, flush=True)
                bad += len(those)
                continue
            for fault in those:
                began = time.monotonic()
                outcome = self.outcome(fault)
                bad += outcome != "noticed"
                about = f"{fault.name} ({fault.file}; {fault.test})"
                print(f"{outcome:<9} {time.monotonic() - began:4.0f} s  {about}", flush=True)
        return bad


def by_test(faults: Iterable[Fault]) -> dict[str, list[Fault]]:
    """Those of one test together: it has to be green without them once."""
    groups: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[fault.command].append(fault)
    return groups


def cost(faults: list[Fault]) -> int:
    """Of those of one test, in runs of a test in Python; a compiler takes as long as some."""
    return 1 + sum(1 if fault.file.endswith(".py") else 4 for fault in faults)


def shares(faults: list[Fault], jobs: int) -> list[list[Fault]]:
    """As many parts that take about as long, none empty."""
    parts: list[list[Fault]] = [[] for _ in range(jobs)]
    costs = [0] * jobs
    for those in sorted(by_test(faults).values(), key=cost, reverse=True):
        least = costs.index(min(costs))
        parts[least] += those
        costs[least] += cost(those)
    return [part for part in parts if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree (default 1)")
    parser.add_argument("words", nargs="*", help="of the faults' names or files")
    options = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not options.words or any(word in f"{fault.name} {fault.file}" for word in options.words)
    ]
    runnable = [fault for fault in chosen if GPU or not fault.gpu]
    parts = shares(runnable, max(options.jobs, 1))
    if len(parts) > 1:  # or the threads of each would wait for the others'
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = int(subprocess.check_output(["bash", ROOT / "scripts/jobs.sh"], text=True))
    with ThreadPoolExecutor(max(len(parts), 1)) as pool:
        tried = [
            pool.submit(
                Tree(ROOT / f"build/faults/tree{i}", max(jobs // len(parts), 1)).try_all, part
            )
            for i, part in enumerate(parts)
        ]
        bad = sum(future.result() for future in tried)
    print(
        f"test-faults: {len(runnable) - bad} of {len(runnable)} faults noticed; "
        f"{len(chosen) - len(runnable)} need a GPU and were skipped"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
