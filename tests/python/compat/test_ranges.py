"""NVTX ranges, as a tool hears them that NVTX loads: one for each operator, both ways of a node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp8

PACKAGE = Path(fp8.__file__).parent
SOURCE = Path(__file__).with_name("nvtx_listener.cpp")
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"

needs_nvtx = pytest.mark.skipif(
    not any(
        b"NVTX_INJECTION64_PATH" in library.read_bytes()
        for library in PACKAGE.glob("lib/torch*/libfp8_torch.so")
    )
    or not (CUDA / "nvtx3/nvToolsExt.h").is_file()
    or shutil.which("g++") is None,
    reason="needs a build with NVTX (any with CUDA), its headers and g++",
)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("nvtx") / "liblistener.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{CUDA}", str(SOURCE), "-o"]
    subprocess.run([*command, str(library)], check=True)
    return library


def heard(program: str, listener: Path, device: str) -> list[str]:
    """The ranges of a program, "outer/inner", in the order in which they begin; torch's own not."""
    file = listener.with_name("heard.txt")
    file.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(PACKAGE.parent),
        "NVTX_INJECTION64_PATH": str(listener),
        "NVTX_HEARD": str(file),
    }
    head = f"import torch, fp8\ntorch.set_default_device({device!r})\n"
    subprocess.run([sys.executable, "-c", head + program], check=True, env=environment)
    found, open_now = [], []
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("<"):
            open_now.append(line[1:])
            found.append("/".join(open_now))
        else:
            open_now.pop()
    assert open_now == []
    return [path for path in found if "fp8::" in path]


@needs_nvtx
def test_ranges_of_a_linear_layer(listener, device):
    program = """
x, w = torch.randn(16, 32), torch.randn(48, 32, requires_grad=True)
fp8.ops.fused_linear(x, w).sum().backward()
with torch.no_grad():
    fp8.ops.fused_linear(x, w)
"""
    assert heard(program, listener, device) == [
        "fp8::fused_linear",
        "fp8::fused_linear/fp8::_linear_forward",
        "fp8::fused_linear backward",
        "fp8::fused_linear backward/fp8::_linear_backward",
        "fp8::fused_linear",
    ]


@needs_nvtx
def test_ranges_of_groups_and_experts(listener, device):
    program = """
x, offsets = torch.randn(16, 32), torch.tensor([8, 16], dtype=torch.int32)
w = torch.randn(2, 32, 32, requires_grad=True)
fp8.ops.grouped_linear(x, w, offsets).sum().backward()
index, weights = torch.tensor([[0], [1]] * 8), torch.ones(16, 1)
up, down = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, 32, 32)
fp8.ops.moe_experts(x, index, weights, up, down).sum().backward()
"""
    outer = [path for path in heard(program, listener, device) if "/" not in path]
    names = ("grouped_linear", "moe_experts")
    assert outer == [f"fp8::{name}{way}" for name in names for way in ("", " backward")]


@needs_nvtx
def test_ranges_of_the_other_operators(listener, device):
    program = """
x = torch.randn(16, 32)
a, scale = fp8.ops.quantize_tensorwise(x)
fp8.ops.scaled_mm(a, a, scale, scale)
fp8.ops.dequantize(a, scale)
"""
    expected = [f"fp8::{name}" for name in ("quantize_tensorwise", "scaled_mm", "dequantize")]
    assert heard(program, listener, device) == expected
