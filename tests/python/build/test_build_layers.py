"""The check that keeps torch headers out of fp8_core finds what it must find."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/check_layers.py", root]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path):
    """A clean miniature of the source tree."""
    files = {
        "CMakeLists.txt": (
            "set(CORE_SOURCES csrc/matmul/plan.cpp)\n"
            "add_library(fp8_core SHARED  # the layer without torch\n"
            "  csrc/core/quantize/rowwise.cu ${CORE_SOURCES})\n"
            "add_library(fp8_torch SHARED csrc/torch/matmul/scaled_mm.cpp)\n"
        ),
        "csrc/include/fp8/core.h": "#include <cstdint>\n",
        "csrc/core/device/check.h": "#pragma once\n#include <string>\n",
        "csrc/core/quantize/rowwise.cu": '#include "core/device/check.h"\n#include <fp8/core.h>\n',
        "csrc/matmul/plan.cpp": '#include "plan.h"\n',
        "csrc/matmul/plan.h": "#pragma once\n",
        "csrc/torch/matmul/scaled_mm.cpp": "#include <ATen/ATen.h>\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_layers_of_this_tree_are_clean():
    result = check(ROOT)
    assert result.returncode == 0, result.stderr


def test_layers_allow_torch_outside_the_core(tree):
    assert check(tree).returncode == 0


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("csrc/include/fp8/core.h", "#include <torch/library.h>"),
        ("csrc/core/quantize/rowwise.cu", "#  include <ATen/cuda/CUDAContext.h>"),
        ("csrc/core/quantize/extra.cuh", '#include "c10/util/Exception.h"'),
        ("csrc/matmul/plan.cpp", "#include <c10/core/Device.h>"),
        ("csrc/matmul/plan.h", "#include <ATen/Tensor.h>"),
        ("csrc/core/device/check.h", "#include <torch/torch.h>"),
    ],
)
def test_layers_find_a_torch_header(tree, file, line):
    with (tree / file).open("a") as opened:
        opened.write(line + "\n")
    result = check(tree)
    assert result.returncode == 1
    assert file in result.stderr
    assert "fp8_core may include no torch header" in result.stderr


def test_layers_ignore_comments(tree):
    (tree / "csrc/matmul/plan.h").write_text("// #include <ATen/Tensor.h>\n")
    assert check(tree).returncode == 0


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("csrc/host/formats.h", '#include "core/device/check.h"'),
        ("csrc/core/device/check.h", '#include "core/quantize/rowwise.cu"'),
    ],
)
def test_includes_lead_downwards(tree, file, line):
    (tree / file).parent.mkdir(parents=True, exist_ok=True)
    with (tree / file).open("a") as opened:
        opened.write(line + "\n")
    result = check(tree)
    assert result.returncode == 1
    assert f"{file} includes" in result.stderr
    assert "is not below" in result.stderr
