"""Where an example runs, and the size that suits it, where the command line names none."""

from __future__ import annotations

import argparse

import torch


def choose(options: argparse.Namespace) -> None:
    """Sets `device` and `size` of the options where they are None."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.size is None:
        options.size = "cpu" if options.device == "cpu" else "gpu"
