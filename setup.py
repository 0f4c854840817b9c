"""Builds the wheel's native part: configure and build with CMake, which is the build's description.

Everything else about the package is in pyproject.toml. CMake writes lib/, _C*.so and _build.py
straight into the folder that becomes the wheel's fp8/, and installs include/ and share/ there, so
that C++ programs find what `cmake --install` would give them. Options for CMake go into CMAKE_ARGS,
for example `CMAKE_ARGS="-DFP8_CUDA_ARCHITECTURES=89;90" pip install --no-build-isolation .`

The wheel is for the torch and the Python that build it. scripts/wheel.sh makes one for several:
  FP8_WHEEL_TORCHES    more torch packages, or unpacked ones, as folders between colons
  FP8_WHEEL_PYTHONS    folders with Python.h of more Pythons, between colons
  FP8_WHEEL_PLATFORM   tags the wheel py3-none-PLATFORM, as one for several Pythons must be

FP8_BUILD_DIR names a build tree, as `make build` leaves it in build/. Where it is of the same
sources, Python and options, it is brought up to date and installed from; else it is left alone.
"""

from __future__ import annotations

import filecmp
import os
import re
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


def files(root: Path) -> dict[str, Path]:
    """What CMake compiles from, by its path below the root."""
    found = [root / "CMakeLists.txt", root / "VERSION"]
    found += [path for folder in ("cmake", "csrc") for path in (root / folder).rglob("*")]
    return {path.relative_to(root).as_posix(): path for path in found if path.is_file()}


def difference(build: Path, options: list[str]) -> str | None:
    """Why a build tree does not stand for these sources, this Python and these options."""
    cache = build / "CMakeCache.txt"
    if not cache.is_file():
        return "it has no CMakeCache.txt"
    known = dict(re.findall(r"^([^#/\s:]+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    for option in options:
        name, _, value = option.removeprefix("-D").partition("=")
        name = name.partition(":")[0]
        if known.get(name) != value:
            return f"it has {name}={known.get(name, '')}, and {option} is asked for"
    here, there = files(SOURCE), files(Path(known["CMAKE_HOME_DIRECTORY"]))
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            return f"{name} is in one of the two sources only"
        if not filecmp.cmp(here[name], there[name], shallow=False):
            return f"its {name} is another"
    return None


class CMakeBuild(build_ext):
    """Runs CMake instead of a compiler."""

    def run(self) -> None:
        """Configures and builds, or takes what is built, with the results in the wheel's folder."""
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
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            *arguments,
        ]
        self.make_package(package, options)
        self.add_torches(package, arguments)
        self.add_pythons(package)

    def make_package(self, package: Path, options: list[str]) -> None:
        """For this torch and this Python: built, or installed from what is."""
        if built := os.environ.get("FP8_BUILD_DIR"):
            reason = difference(Path(built), options)
            if reason is None:
                self.compile_tree(Path(built), "--target", "fp8_core", "fp8_torch", "_C")
                self.install_from(Path(built), package, "runtime", "python", "devel", "sources")
                return
            print(f"fp8: {built} does not serve, building anew: {reason}", file=sys.stderr)
        build = Path(self.build_temp).resolve() / "fp8"
        folder = f"-DFP8_PYTHON_PACKAGE_DIR={package}"
        self.configure(SOURCE, build, "-DFP8_BUILD_TESTS=OFF", folder, *options)
        self.compile_tree(build)
        self.install_from(build, package, "devel", "sources")

    def add_torches(self, package: Path, arguments: list[str]) -> None:
        """A libfp8_torch for each of FP8_WHEEL_TORCHES."""
        for number, torch_folder in enumerate(folders("FP8_WHEEL_TORCHES")):
            build = Path(self.build_temp).resolve() / f"torch{number}"
            self.configure(
                SOURCE,
                build,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DFP8_CORE={package}",
                f"-DFP8_PYTHON_PACKAGE_DIR={package}",
                f"-DLibTorch_ROOT={torch_folder}",
                *arguments,
            )
            self.compile_tree(build)

    def add_pythons(self, package: Path) -> None:
        """A _C for each of FP8_WHEEL_PYTHONS."""
        headers = folders("FP8_WHEEL_PYTHONS")
        if not headers:
            return
        import pybind11

        build = Path(self.build_temp).resolve() / "bindings"
        self.configure(
            SOURCE / "csrc/bindings",
            build,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFP8_PACKAGE={package}",
            f"-DFP8_PYTHON_INCLUDE_DIRS={';'.join(headers)}",
            f"-DFP8_PYBIND11_INCLUDE_DIR={pybind11.get_include()}",
        )
        self.compile_tree(build)

    def configure(self, source: Path, build: Path, *options: str) -> None:
        """Prepares a tree for compile_tree."""
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *options], check=True)

    def compile_tree(self, build: Path, *arguments: str) -> None:
        """Compiles what is out of date."""
        jobs = subprocess.check_output(["bash", SOURCE / "scripts/jobs.sh"], text=True).strip()
        subprocess.run(["cmake", "--build", build, "--parallel", jobs, *arguments], check=True)

    def install_from(self, build: Path, package: Path, *components: str) -> None:
        """Copies what CMake would install; stripped, as nvcc leaves names of temporary files."""
        for component in components:
            prefix = ["--prefix", package, "--component", component]
            subprocess.run(["cmake", "--install", build, "--strip", *prefix], check=True)

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
