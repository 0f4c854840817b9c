"""`python -m fp8_rebuild` compiles what the installed fp8 lacks for this environment.

That is libfp8_torch, where torch is of another minor version than those that fp8 came with, and
fp8._C, where Python is. The kernels stay as they are, so no nvcc is needed, and nothing of the CUDA
Toolkit: a C++ compiler (g++ 12 or newer), cmake, and for fp8._C Python's headers and pybind11. What
was compiled goes into the package. Nobody has tested it there: `python -m fp8` says "unknown".

A module beside fp8, not in it, because where it is needed `import fp8` fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import util
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).resolve().parent / "fp8"
INSTALLED = PACKAGE / "share/fp8/sources"
CLONE = PACKAGE.parents[1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fp8_rebuild", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--force", action="store_true", help="also what is there already")
    parser.add_argument("--jobs", type=int, help="compilers at once (default: what fits in memory)")
    options = parser.parse_args()

    sources = INSTALLED if INSTALLED.is_dir() else CLONE
    if not (sources / "CMakeLists.txt").is_file():
        fail(f"there are no sources in {INSTALLED}: install fp8 again")
    if not os.access(PACKAGE, os.W_OK):
        fail(f"{PACKAGE} cannot be written: run this as the user who installed fp8")
    torch_folder, version = find_torch()
    library = PACKAGE / f"lib/torch{minor(version)}/libfp8_torch.so"
    module = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    made = []
    with tempfile.TemporaryDirectory(prefix="fp8-rebuild-") as build:
        if options.force or not is_current(library):
            jobs = str(options.jobs or default_jobs(sources))
            print(f"fp8_rebuild: libfp8_torch for torch {version}: about ten minutes on one core")
            library_options = [
                f"-DFP8_CORE={PACKAGE}",
                f"-DFP8_PYTHON_PACKAGE_DIR={PACKAGE}",
                f"-DLibTorch_ROOT={torch_folder}",
            ]
            compile_with_cmake(sources, Path(build) / "torch", library_options, jobs, "fp8_torch")
            made.append(library)
        if options.force or not module.exists():
            print(f"fp8_rebuild: fp8._C for Python {sys.version_info[0]}.{sys.version_info[1]}")
            bindings = sources / "csrc/bindings"
            compile_with_cmake(bindings, Path(build) / "bindings", module_options(), "1")
            made.append(module)
    for path in made:
        print(f"fp8_rebuild: made {path}")
    if not made:
        print(f"fp8_rebuild: nothing to do: {library} and {module} are there (--force: again)")
    subprocess.run([sys.executable, "-c", "import fp8; fp8.plan_cache_info()"], check=True)
    print(f"fp8_rebuild: import fp8 works with torch {version}")


def find_torch() -> tuple[Path, str]:
    """The folder and the version of the torch that would be imported."""
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fail("there is no torch in this environment: pip install torch")
    program = "import torch; print(torch.__version__)"
    version = subprocess.check_output([sys.executable, "-c", program], text=True).strip()
    return Path(spec.submodule_search_locations[0]).resolve(), version


def is_current(library: Path) -> bool:
    """Whether it is there, and of this version of fp8."""
    facts = library.with_name("build.json")
    installed = PACKAGE / "include/fp8/version.h"
    return (
        library.exists()
        and facts.exists()
        and f'"{json.loads(facts.read_text())["fp8"]}"' in installed.read_text()
    )


def minor(version: str) -> str:
    """'2.11.0+cu130' -> '2.11'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def default_jobs(sources: Path) -> str:
    """As many compilers as cores and memory allow."""
    return subprocess.check_output(["bash", str(sources / "scripts/jobs.sh")], text=True).strip()


def module_options() -> list[str]:
    """CMake's options for fp8._C; ends the program where something is missing."""
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").is_file():
        fail(f"fp8._C needs Python's headers, and there is no {headers}/Python.h (python3-dev)")
    try:
        import pybind11
    except ImportError:
        fail("fp8._C needs pybind11: pip install pybind11")
    return [
        f"-DFP8_PACKAGE={PACKAGE}",
        f"-DFP8_PYTHON_INCLUDE_DIRS={headers}",
        f"-DFP8_PYBIND11_INCLUDE_DIR={pybind11.get_include()}",
    ]


def compile_with_cmake(
    sources: Path, build: Path, options: list[str], jobs: str, target: str = "all"
) -> None:
    """Configures and builds one target; ends the program where that fails."""
    cmake = tool("cmake")
    if cmake is None:
        fail("cmake is missing: pip install cmake")
    if os.environ.get("CXX") is None and shutil.which("c++") is None:
        fail("there is no C++ compiler: apt-get install g++, or set CXX")
    configure = [cmake, "-S", str(sources), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    ninja = tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    elif shutil.which("make") is None:
        fail("there is neither ninja nor make: pip install ninja")
    compile_all = [cmake, "--build", str(build), "--parallel", jobs, "--target", target]
    for command in ([*configure, *options], compile_all):
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"this failed, its messages are above: {' '.join(command)}")


def tool(name: str) -> str | None:
    """A tool of this environment (pip puts it beside Python), else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def fail(message: str) -> NoReturn:
    """Ends the program with one line."""
    raise SystemExit(f"fp8_rebuild: {message}")


if __name__ == "__main__":
    main()
