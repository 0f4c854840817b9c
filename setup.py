"""Builds the wheel's native part: configure and build with CMake, which is the build's description.

Everything else about the package is in pyproject.toml. CMake writes lib/, _C*.so and _build.py
straight into the folder that becomes the wheel's fp8/, and installs include/ and share/ there, so
that C++ programs find what `cmake --install` would give them. Options for CMake go into CMAKE_ARGS,
for example `CMAKE_ARGS="-DFP8_CUDA_ARCHITECTURES=89;90" pip install --no-build-isolation .`

The wheel is for the torch and the Python that build it. scripts/wheel.sh makes one for several:
  FP8_WHEEL_TORCHES    more torch packages, or unpacked ones, as folders between colons
  FP8_WHEEL_PYTHONS    folders with Python.h of more Pythons, between colons
  FP8_WHEEL_PLATFORM   tags the wheel py3-none-PLATFORM, as one for several Pythons must be
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


def folders(variable: str) -> list[str]:
    """The folders of an environment variable."""
    return [folder for folder in os.environ.get(variable, "").split(":") if folder]


class CMakeBuild(build_ext):
    """Runs CMake instead of a compiler."""

    def run(self) -> None:
        """Configures and builds below build/, with the results in the wheel's folder."""
        try:
            import torch  # noqa: F401  (CMake asks it for LibTorch's place)
        except ImportError as error:
            raise SystemExit(
                "fp8: building needs torch. Install it first, then run "
                "`pip install --no-build-isolation .`"
            ) from error
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(
                f"fp8: building needs {' and '.join(missing)} on the PATH. Install with "
                f"`pip install {' '.join(missing)}`, then run `pip install --no-build-isolation .`"
            )
        inplace = self.get_finalized_command("build_py").get_package_dir("fp8")
        package = Path(inplace if self.inplace else f"{self.build_lib}/fp8").resolve()
        build = Path(self.build_temp).resolve()
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self.cmake(
            SOURCE,
            build / "fp8",
            "-DFP8_BUILD_TESTS=OFF",
            f"-DFP8_PYTHON_PACKAGE_DIR={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *arguments,
        )
        for component in ("devel", "sources"):
            prefix = ["--prefix", package, "--component", component]
            subprocess.run(["cmake", "--install", build / "fp8", *prefix], check=True)
        for number, torch_folder in enumerate(folders("FP8_WHEEL_TORCHES")):
            self.cmake(
                SOURCE,
                build / f"torch{number}",
                f"-DFP8_CORE={package}",
                f"-DFP8_PYTHON_PACKAGE_DIR={package}",
                f"-DLibTorch_ROOT={torch_folder}",
                *arguments,
            )
        if headers := folders("FP8_WHEEL_PYTHONS"):
            import pybind11

            self.cmake(
                SOURCE / "csrc/bindings",
                build / "bindings",
                f"-DFP8_PACKAGE={package}",
                f"-DFP8_PYTHON_INCLUDE_DIRS={';'.join(headers)}",
                f"-DFP8_PYBIND11_INCLUDE_DIR={pybind11.get_include()}",
            )

    def cmake(self, source: Path, build: Path, *options: str) -> None:
        """Configures a project and builds all of it."""
        jobs = subprocess.check_output(["bash", SOURCE / "scripts/jobs.sh"], text=True).strip()
        configure = ["cmake", "-S", source, "-B", build, "-G", "Ninja"]
        subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release", *options], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        """Files that `setup.py install --record` lists: whatever CMake left in the package."""
        package = Path(self.build_lib) / "fp8"
        made = ("lib/**/*", "include/**/*.h", "share/**/*", "_C*.so")
        return [str(path) for pattern in made for path in package.glob(pattern) if path.is_file()]


class Wheel(bdist_wheel):
    """The tag of a wheel for several Pythons."""

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, ABI, platform)."""
        platform = os.environ.get("FP8_WHEEL_PLATFORM")
        return ("py3", "none", platform) if platform else super().get_tag()


setup(
    ext_modules=[Extension("fp8._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
