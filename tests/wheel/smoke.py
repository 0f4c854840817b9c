"""The installed wheel, in an environment of its own: `make test-wheel` runs this.

python smoke.py ROOT    ROOT is the source tree, whose VERSION and examples are used, no more.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import fp8

ROOT = Path(sys.argv[1])
PACKAGE = Path(fp8.__file__).parent
MINOR = ".".join(torch.__version__.split(".")[:2])


def check_files() -> None:
    version = (ROOT / "VERSION").read_text().strip()
    assert PACKAGE.is_relative_to(sys.prefix), PACKAGE
    assert fp8.__version__ == metadata.version("fp8") == version
    assert "torch>=2.11" in metadata.requires("fp8")  # no upper bound: pip moves no newer torch
    library = f"lib/torch{MINOR}/libfp8_torch.so"
    for name in (
        library,
        "lib/libfp8_core.so",
        "include/fp8/ops.h",
        "include/fp8/nn.h",
        "include/fp8/nn_blocks.h",
        "include/fp8/core.h",
        "share/cmake/FP8/FP8Config.cmake",
        "share/fp8/sources/CMakeLists.txt",
        "share/fp8/sources/csrc/torch/registration/schemas.cpp",
        "../fp8_rebuild.py",
        "py.typed",
    ):
        assert (PACKAGE / name).is_file(), name
    recorded = {str(file) for file in metadata.files("fp8")}
    assert f"fp8/{library}" in recorded  # so that pip uninstalls it
    facts = fp8.info()
    assert facts["built with"]["torch"].startswith(f"{MINOR}.")


def check_training() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 16)).to(device)
    fp8.convert(model, filter=lambda module, name: True)
    x, target = torch.randn(32, 64, device=device), torch.randn(32, 16, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def check_another_torch() -> None:
    """Import under another torch minor stops, and says what to do."""
    program = "import torch; torch.__version__ = '2.99.0+cu130'; import fp8"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    for words in ("ImportError", "torch 2.99.0+cu130 is running", "python -m fp8_rebuild"):
        assert words in result.stderr, result.stderr


def check_rebuild_has_nothing_to_do() -> None:
    command = [sys.executable, "-m", "fp8_rebuild"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stdout, result.stdout


def check_cpp() -> str:
    """A C++ program through fp8.cmake_prefix_path; the package lies beside torch here."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        return "C++ left out: no cmake or no compiler here"
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    with tempfile.TemporaryDirectory() as build:
        for command in (
            [
                *("cmake", "-S", ROOT / "examples/cpp", "-B", build),
                f"-DCMAKE_PREFIX_PATH={fp8.cmake_prefix_path}",
                f"-DPython_EXECUTABLE={sys.executable}",
            ],
            ["cmake", "--build", build, "--target", "run_saved"],
        ):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
        weight, x = torch.randn(32, 64), torch.randn(8, 64)

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.ops.fp8.fused_linear(x, weight)

        folder = Path(build)
        torch.jit.trace(Layer(), x).save(folder / "model.pt")
        torch.save(x, folder / "input.pt")
        arguments = [folder / name for name in ("model.pt", "input.pt", "output.pt")]
        subprocess.run([folder / "run_saved", *arguments], check=True, env=environment)
        assert torch.equal(torch.load(folder / "output.pt"), Layer()(x))
    return "C++ program built and run"


def main() -> None:
    check_files()
    check_training()
    check_another_torch()
    check_rebuild_has_nothing_to_do()
    print(f"wheel: fp8 {fp8.__version__} works with torch {torch.__version__}; {check_cpp()}")


if __name__ == "__main__":
    main()
