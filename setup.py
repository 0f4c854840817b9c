"""Builds the wheel's native part: configure and build with CMake, which is the build's description.

Everything else about the package is in pyproject.toml. CMake writes lib/, _C*.so and _build.py
straight into the folder that becomes the wheel's fp8/, and installs include/ and share/cmake there,
so that C++ programs find what `cmake --install` would give them. Options for CMake go into
CMAKE_ARGS, for example
`CMAKE_ARGS="-DFP8_CUDA_ARCHITECTURES=89;90" pip install --no-build-isolation .`
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake instead of a compiler."""

    def run(self) -> None:
        """Configures and builds into build/wheel, with the results in the wheel's folder."""
        try:
            import torch  # noqa: F401  (CMake asks it for LibTorch's place)
        except ImportError as error:
            raise SystemExit(
                "fp8: building needs torch. Install torch 2.11 first, then run "
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
        jobs = subprocess.check_output(["bash", SOURCE / "scripts/jobs.sh"], text=True).strip()
        configure = [
            *("cmake", "-S", SOURCE, "-B", build, "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DFP8_BUILD_TESTS=OFF",
            f"-DFP8_PYTHON_PACKAGE_DIR={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
        devel = ["cmake", "--install", build, "--prefix", package, "--component", "devel"]
        subprocess.run(devel, check=True)

    def get_outputs(self) -> list[str]:
        """Files that `setup.py install --record` lists: whatever CMake left in the package."""
        package = Path(self.build_lib) / "fp8"
        made = ("lib/*", "include/**/*.h", "share/**/*.cmake", "_C*.so")
        return [str(path) for pattern in made for path in package.glob(pattern)]


setup(ext_modules=[Extension("fp8._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
