"""The C++ examples, built against an installed and then moved fp8, once a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmake_runs import ROOT, TREE, cmake, configure

import fp8
from fp8 import _build

sys.path.insert(0, str(ROOT / "examples"))  # the Python demo


@pytest.fixture(scope="session")
def prefix() -> Path:
    """`cmake --install` of the build under test, moved to another folder afterwards."""
    first, moved = TREE / "first", TREE / "moved"
    shutil.rmtree(first, ignore_errors=True)
    shutil.rmtree(moved, ignore_errors=True)
    if not (ROOT / "build/CMakeCache.txt").exists():
        pytest.skip("needs the build folder of `make build`")
    cmake("--install", ROOT / "build", "--prefix", first)
    first.rename(moved)
    return moved


@pytest.fixture(scope="session")
def programs(prefix: Path) -> Path:
    """Folder of the LibTorch examples, built against the installed fp8 alone."""
    build, torch_folder = TREE / "programs", Path(torch.__file__).resolve().parent
    configure(
        ROOT / "examples/cpp",
        build,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DLibTorch_ROOT={torch_folder}",
    )
    jobs = subprocess.check_output(["bash", ROOT / "scripts/jobs.sh"], text=True).strip()
    cmake("--build", build, "-j", jobs)
    return build


@pytest.fixture(scope="session")
def core_program(prefix: Path) -> Path:
    """The torch-free example."""
    if not _build.CUDA_VERSION:
        pytest.skip("built without CUDA")
    build = TREE / "core"
    configure(ROOT / "examples/cpp/core", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", build)
    return build / "core_matmul"


@pytest.fixture(scope="session")
def package() -> Path:
    return Path(fp8.__file__).parent
