"""Proves the tests: applies each fault of faults.py to a copy of the tree and sees a test go red.

python tests/faults/run.py [WORD ...]    only faults whose name or file has one of the words

The copy is build/faults/tree, with a build of its own that is kept for the next run. Without a GPU
it is built without CUDA, and the faults of kernels are skipped and counted. Status 1 if some fault
goes unnoticed, or if a test is red without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from fault import Fault, apply
from faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build/faults/tree"
GPU = torch.cuda.is_available()


def tool(name: str) -> str:
    """A tool of the running Python's environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"test-faults: needs {name}")
    return found


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(TREE / "python"),
        "TSAN_OPTIONS": "halt_on_error=1",  # thousands of races otherwise
    }
    return subprocess.run(
        [str(word) for word in command],
        cwd=TREE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def must(*command: object) -> None:
    result = run(*command)
    if result.returncode != 0:
        raise SystemExit(f"test-faults: {command[0]} failed\n{result.stdout}{result.stderr}")


def copy_tree() -> None:
    """Brings the copy up to date; files that did not change keep their times, and their objects."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    for name in names:
        source, target = ROOT / name, TREE / name
        if not source.is_file():
            continue
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def configure() -> None:
    header = subprocess.check_output(["bash", TREE / "scripts/catch2.sh"], text=True).strip()
    must(
        *(tool("cmake"), "-S", TREE, "-B", TREE / "build", "-G", "Ninja"),
        *("-DFP8_BUILD_TESTS=ON", f"-DCATCH2_INCLUDE_DIR={header}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DFP8_CUDA={'ON' if GPU else 'OFF'}"),
    )
    must(
        *(tool("cmake"), "-S", TREE / "tests/cpp/host", "-B", TREE / "build/tsan", "-G", "Ninja"),
        *("-DFP8_SANITIZE=thread", f"-DCATCH2_INCLUDE_DIR={header}"),
    )


def build(test: str) -> bool:
    """Builds what the test needs; a fault that does not compile proves nothing."""
    kind, _, name = test.partition(" ")
    folder = TREE / ("build/tsan" if kind == "tsan" else "build")
    targets = [name] if kind in ("ctest", "tsan") else ["fp8_torch", "_C"]
    jobs = subprocess.check_output(["bash", TREE / "scripts/jobs.sh"], text=True).strip()
    result = run(tool("cmake"), "--build", folder, "-j", jobs, "--target", *targets)
    if result.returncode != 0:
        print(result.stdout[-3000:], result.stderr[-1000:], file=sys.stderr)
    return result.returncode == 0


def is_green(test: str) -> bool:
    kind, _, name = test.partition(" ")
    if kind == "ctest":
        command = [tool("ctest"), "--test-dir", TREE / "build", "--no-tests=error", "-R"]
        return run(*command, f"^{name}$").returncode == 0
    if kind == "tsan":
        command = ["setarch", "-R", tool("ctest"), "--test-dir", TREE / "build/tsan"]
        return run(*command, "--no-tests=error", "-R", f"^{name}$").returncode == 0
    result = run(
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test.split()
    )
    if result.returncode not in (0, 1):  # no tests, or no such file: not a test that went red
        raise SystemExit(f"test-faults: pytest {test}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def try_fault(fault: Fault) -> str:
    """'noticed', or what else came of it."""
    text = apply(fault, TREE)
    try:
        if not build(fault.command):
            return "does not compile"
        return "UNNOTICED" if is_green(fault.command) else "noticed"
    finally:
        (TREE / fault.file).write_text(text)


def main(words: list[str]) -> int:
    chosen = [
        fault
        for fault in FAULTS
        if not words or any(word in f"{fault.name} {fault.file}" for word in words)
    ]
    runnable = [fault for fault in chosen if GPU or not fault.gpu]
    copy_tree()
    configure()
    for test in dict.fromkeys(fault.command for fault in runnable):
        if not build(test) or not is_green(test):
            print(f"test-faults: red without a fault: {test}", file=sys.stderr)
            return 1
    bad = 0
    for fault in runnable:
        began = time.monotonic()
        outcome = try_fault(fault)
        bad += outcome != "noticed"
        seconds = time.monotonic() - began
        print(
            f"{outcome:<9} {seconds:4.0f} s  {fault.name} ({fault.file}; {fault.test})", flush=True
        )
    print(
        f"test-faults: {len(runnable) - bad} of {len(runnable)} faults noticed; "
        f"{len(chosen) - len(runnable)} need a GPU and were skipped"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
