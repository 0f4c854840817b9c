"""A kernel whose registers spill does not pass: ptxas warns, and warnings are errors in CI."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ROOT / "build/compile_commands.json"
FLAG = "-Xptxas=--warn-on-spills"
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spill(float* p) {
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) p[(i * 7 % 200) * 1024 + threadIdx.x] = v[199 - i] * v[i];
}
"""


@pytest.mark.skipif(not COMMANDS.exists(), reason="needs the build folder of `make build`")
def test_every_kernel_is_compiled_with_the_warning():
    commands = json.loads(COMMANDS.read_text())
    kernels = [entry for entry in commands if entry["file"].endswith(".cu")]
    if not kernels:
        pytest.skip("built without CUDA")
    for entry in kernels:
        assert FLAG in entry["command"], entry["file"]


def test_the_warning_and_werror_stop_a_spill(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "spill.cu"
    source.write_text(SPILLS)
    command = [nvcc, "-arch=sm_90", "-cubin", "-o", tmp_path / "spill.cubin", source, FLAG]
    warned = subprocess.run(command, capture_output=True, text=True, check=False)
    assert warned.returncode == 0
    assert "Registers are spilled" in warned.stderr
    strict = subprocess.run(
        [*command, "-Werror=all-warnings"], capture_output=True, text=True, check=False
    )
    assert strict.returncode != 0
