"""GPU tests: skipped where there is no CUDA device, counted at the end of the run.

`make test-gpu` passes --require-gpu: then they run, and fail, instead.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

NO_GPU = "needs a CUDA device"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp8")
    group.addoption("--require-gpu", action="store_true", help="do not skip GPU tests")
    group.addoption(
        "--shard", metavar="I/N", help="only part I of N, whole files each: for N processes at once"
    )
    group.addoption(
        "--cpp-gpu-skipped", type=int, default=0, help="GPU tests in C++ that were left out"
    )


def _unit(item: pytest.Item) -> str:
    """What must stay in one process: a file; the folder whose tests share one CMake build."""
    folder = item.path.parent
    return str(folder if folder.name == "cpp" else item.path)


def keep_shard(items: list[pytest.Item], shard: str) -> list[pytest.Item]:
    """The items of part I of N: the largest units first, each to the part with the fewest items."""
    index, count = map(int, shard.split("/"))
    sizes = Counter(map(_unit, items))
    totals, part_of = [0] * count, {}
    for unit, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        part = totals.index(min(totals))
        totals[part] += size
        part_of[unit] = part
    return [item for item in items if part_of[_unit(item)] == index - 1]


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard")
    if shard:
        kept = keep_shard(items, shard)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    if config.getoption("--require-gpu") or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if torch.cuda.is_available():
        return
    skipped = terminalreporter.getreports("skipped")
    python = sum("gpu" in report.keywords for report in skipped)
    cpp = config.getoption("--cpp-gpu-skipped")
    terminalreporter.write_line(
        f"GPU tests skipped, because this machine has no CUDA device: {python + cpp} "
        f"({python} Python, {cpp} C++)"
    )
