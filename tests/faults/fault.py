"""A deliberate fault, and the test that must notice it; faults.py has them all.

A fault replaces one piece of text that occurs once in its file; where the file has changed so that
it no longer does, tests/python/build/test_build_faults.py says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One wrong edit. `test`: "ctest NAME", "tsan NAME" or arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    test: str
    gpu: bool = False  # only a GPU test can notice

    @property
    def command(self) -> str:
        """The test as run.py takes it; of a GPU's faults the GPU tests alone."""
        return f"-m gpu {self.test}" if self.gpu else self.test


def apply(fault: Fault, root: Path) -> str:
    """Puts the fault into the tree below `root`; returns the file's text from before."""
    path = root / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: expected its text once in {fault.file}, found it "
            f"{text.count(fault.old)} times; adapt tests/faults/"
        )
    path.write_text(text.replace(fault.old, fault.new))
    return text


QUANTIZE = "tests/python/quantize/test_quantize_values.py"
LAYOUT = "tests/python/quantize/test_quantize_layout.py"
LINEAR = "tests/python/linear"
DELAYED = f"{LINEAR}/test_linear_delayed.py"
RECOMPUTATION = f"{LINEAR}/test_delayed_recomputation.py"
MEMORY = f"{LINEAR}/test_linear_memory.py"
SPLIT = "tests/python/compat/test_split_backward.py"
HISTORIES = f"{LINEAR}/test_delayed_histories.py"
GROUPED = "tests/python/grouped"
MLP = "tests/python/mlp"
MERGED = "tests/python/merged"
EXPERTS = "tests/python/experts"
CHECKS = "tests/python/checks"
