"""The parts into which `make test-gpu` cuts its tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    folders = ["tests/python/build", "tests/python/cpp", "tests/python/matmul"]
    result = subprocess.run(
        [*command, *options, *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_shards_hold_every_test_once():
    shards = [collected("-m", "gpu", f"--shard={i}/3") for i in (1, 2, 3)]
    assert sorted(name for shard in shards for name in shard) == sorted(collected("-m", "gpu"))
    assert all(shards)
    cpp = [shard for shard in shards if any("/cpp/" in name for name in shard)]
    assert len(cpp) == 1  # they share a build
