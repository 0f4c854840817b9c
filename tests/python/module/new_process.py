"""A Python of its own, for what happens once in a process: imports, environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import fp8

PACKAGES = str(Path(fp8.__file__).parents[1])


def python(
    *arguments: str, without: Collection[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """How `python ARGUMENTS...` ended, and what it printed. It finds this fp8; its environment is
    ours, less the variables `without`, with `variables`."""
    path = os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])
    ours = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments],
        env={name: text for name, text in ours.items() if name not in without} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
