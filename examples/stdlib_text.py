"""Real text that every machine has: the sources of the Python standard library, as bytes.

The files are taken in sorted order and split by the checksum of their path, so that the same Python
version gives the same bytes everywhere and a file never moves between training and held-out text.
A batch is a function of (seed, step) alone: every variant of the demo sees the same one.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

# Third-party code, and folders that distributions leave out or ship apart.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
)
HELD_OUT_ONE_IN = 10  # one file in ten is never trained on
VOCABULARY = 256  # byte values


@dataclass(frozen=True)
class Text:
    """Training and held-out text: two 1-D uint8 tensors, files separated by one zero byte."""

    train: torch.Tensor  # [bytes] uint8
    held_out: torch.Tensor  # [bytes] uint8
    files: int
    root: Path

    def batch(
        self, step: int, batch_size: int, length: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of training step `step`: two [batch_size, length] int64 tensors.

        The targets are the inputs one byte later. Windows are drawn at random from the training
        text by a generator seeded with (seed, step).
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        last = self.train.numel() - length - 1
        starts = torch.randint(0, last + 1, (batch_size,), generator=generator)
        return _windows(self.train, starts, length)

    def held_out_batch(
        self, index: int, batch_size: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `batch`, from fixed windows of the held-out text that do not depend on a seed."""
        generator = torch.Generator().manual_seed(index)
        last = self.held_out.numel() - length - 1
        starts = torch.randint(0, last + 1, (batch_size,), generator=generator)
        return _windows(self.held_out, starts, length)


def load_text(root: Path | None = None) -> Text:
    """Reads every .py file below `root` (default: this Python's standard library).

    Raises:
        RuntimeError: there is too little text to train on.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train, held_out = bytearray(), bytearray()
    paths = sorted(_sources(root), key=lambda path: path.relative_to(root).as_posix())
    for path in paths:
        name = path.relative_to(root).as_posix()
        split = held_out if zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0 else train
        split += path.read_bytes() + b"\0"
    if min(len(train), len(held_out)) < 16_384:
        raise RuntimeError(
            f"demo: need at least 16384 bytes of training and of held-out text, got {len(train)} "
            f"and {len(held_out)} from {len(paths)} .py files below {root}"
        )
    return Text(_to_tensor(train), _to_tensor(held_out), len(paths), root)


def _sources(root: Path) -> list[Path]:
    return [
        path
        for path in root.rglob("*.py")
        if path.is_file() and SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]


def _to_tensor(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _windows(
    text: torch.Tensor, starts: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = starts[:, None] + torch.arange(length + 1)
    tokens = text[offsets].long()  # [batch, length + 1]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
