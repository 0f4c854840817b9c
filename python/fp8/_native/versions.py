"""Which versions of torch and of cuBLASLt fp8 is for, and what was done with each pair.

The one place: the wheel is built for the torches of this table (scripts/wheel.sh), its first row is
pip's requirement, and `fp8.info` prints it. A row says what was done, never what should work:

- tested: the test suite ran on it
- sampled: part of the suite ran on it (values and gradients of linear and quantize, registration,
  compile, modules and conversion)
- builds: libfp8_torch was compiled for it and loads, no more
- unknown: no one tried
"""

from typing import NamedTuple


class Pair(NamedTuple):
    """A minor version of torch, with the CUDA libraries that pip installs with it."""

    torch: str  # minor: "2.11"
    release: str  # what the wheel's library is compiled with: "2.11.0"
    cuda: str  # of that release: "13.0"
    cublaslt: str  # as cublasLtGetVersion tells it: "13.1.0"
    cpu: str  # what was done with the CPU's kernels
    gpu: str  # what was done on a GPU


PAIRS = (
    Pair("2.11", "2.11.0", "13.0", "13.1.0", "tested", "tested"),
    Pair("2.12", "2.12.1", "13.0", "13.1.1", "unknown", "unknown"),
    Pair("2.13", "2.13.0", "13.0", "13.1.1", "sampled", "builds"),
    Pair("2.14", "2.14.1", "13.0", "13.1.1", "unknown", "unknown"),
    Pair("2.15", "2.15.0", "13.2", "13.4.1", "sampled", "builds"),
)

GUARDS_MEASURED_WITH = ("13.1",)
"""Minor versions of cuBLASLt on which the algorithms that compute wrongly were looked for.

The guards (csrc/core/matmul/lt_choice.cpp) hold for every version; another may need more of them.
"""


def minor(version: str) -> str:
    """'2.11.0+cu130' -> '2.11'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def status(torch: str, cublaslt: str) -> dict[str, str]:
    """What was done with these two: {"cpu": ..., "gpu": ...}, words of the table with a remark.

    Full versions: "2.11.0+cu130", "13.1.0"; cublaslt "none" or "unknown" where none is loaded.
    """
    pair = next((pair for pair in PAIRS if pair.torch == minor(torch)), None)
    if pair is None:
        return {"cpu": "unknown", "gpu": "unknown"}
    if not cublaslt[0].isdigit():
        return {"cpu": pair.cpu, "gpu": "no CUDA here"}
    gpu = pair.gpu if cublaslt == pair.cublaslt else f"unknown with cuBLASLt {cublaslt}"
    if minor(cublaslt) not in GUARDS_MEASURED_WITH:
        gpu += f" (guards were measured with cuBLASLt {', '.join(GUARDS_MEASURED_WITH)})"
    return {"cpu": pair.cpu, "gpu": gpu}


def table() -> list[str]:
    """The pairs as text, one a line, for `fp8.info`."""
    return [
        f"torch {pair.torch}, CUDA {pair.cuda}, cuBLASLt {pair.cublaslt}: "
        f"CPU {pair.cpu}, GPU {pair.gpu}"
        for pair in PAIRS
    ]
