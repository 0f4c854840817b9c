"""GPU tests: skipped where there is no CUDA device, counted at the end of the run.

`make test-gpu` passes --require-gpu: then they run, and fail, instead.
"""

from __future__ import annotations

import pytest
import torch
import torch.compiler.config

NO_GPU = "needs a CUDA device"

# A test's CUDA graph that lies in a reference cycle is destroyed whenever Python collects garbage.
# Within another test's capture that is an error, which fails the capture, and all that draws random
# numbers after it: so torch collects before each.
torch.compiler.config.force_cudagraph_gc = True


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp8")
    group.addoption("--require-gpu", action="store_true", help="do not skip GPU tests")
    group.addoption(
        "--cpp-gpu-skipped", type=int, default=0, help="GPU tests in C++ that were left out"
    )


def _group(item: pytest.Item, gpu: bool) -> str | None:
    """What one process has of several (pytest-xdist): tests that share a CMake build; without a
    GPU, where fixtures cost more than tests, those of a file."""
    if item.path.parent.name == "cpp":
        return "cpp"
    return None if gpu else str(item.path)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if group := _group(item, config.getoption("--require-gpu")):
            item.add_marker(pytest.mark.xdist_group(group))
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
