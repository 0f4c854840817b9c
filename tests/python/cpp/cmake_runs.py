"""CMake and the programs that it made, as the tests of this folder run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TREE = ROOT / "build/install-tree"  # kept between runs: a second one compiles nothing


def _tool(name: str) -> str | None:
    """A tool of the running Python's environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def cmake(*arguments: object) -> str:
    """Runs CMake and returns what it printed; fails with all of it."""
    program = _tool("cmake")
    if program is None:
        pytest.skip("needs cmake")
    command = [program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def configure(source: Path, build: Path, *options: str) -> str:
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"] if _tool("ninja") else []
    cache = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    return cmake("-S", source, "-B", build, *ninja, *cache, *options)


def run(program: Path, *arguments: object, status: int = 0, **environment: str) -> str:
    """A program's output; it finds its libraries by itself, without LD_LIBRARY_PATH or Python."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("LD_LIBRARY_PATH", "PYTHONPATH")
    }
    result = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=kept | environment,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout
