"""What one command compiled the next one uses: demo, then tests, then the wheel."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build"

# The project in small: its options and targets, of a file each.
PROJECT = """
cmake_minimum_required(VERSION 3.28)
project(small LANGUAGES CXX)
add_library(fp8_core SHARED core.cpp)
add_library(fp8_torch SHARED torch.cpp)
add_library(_C MODULE torch.cpp)
if(FP8_UNITY)
  target_compile_definitions(fp8_core PRIVATE FP8_UNITY)
endif()
if(FP8_BUILD_TESTS)
  add_library(tests STATIC ${CATCH2_INCLUDE_DIR}/tests.cpp)
endif()
"""


@pytest.fixture
def small_tree(tmp_path):
    """A tree with the Makefile of this one, where Catch2 comes with a file `catch2`."""
    for name in ("Makefile", "VERSION", "requirements.txt", "requirements-lint.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "requirements-compat.txt", tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/jobs.sh", tmp_path / "scripts")
    catch2 = tmp_path / "scripts/catch2.sh"
    catch2.write_text("#!/bin/sh\n[ -f tests.cpp ] && pwd\n")
    catch2.chmod(0o755)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "core.cpp").write_text("int core() { return 1; }\n")
    (tmp_path / "torch.cpp").write_text("int torch() { return 2; }\n")
    return tmp_path


# Tools of the running Python's environment come first.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def make(tree: Path, target: str, **variables: str) -> None:
    if not shutil.which("cmake", path=PATH) or not shutil.which("ninja", path=PATH):
        pytest.skip("needs cmake and ninja")
    words = ["VENV=", f"PYTHON={sys.executable}", *(f"{k}={v}" for k, v in variables.items())]
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "MAKEFLAGS", "MFLAGS")}
    environment["PATH"] = PATH
    result = subprocess.run(
        ["make", "--no-print-directory", target, *words],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def objects(tree: Path) -> dict[str, int]:
    """Times of the objects."""
    found = (tree / "build").rglob("*.o")
    return {path.relative_to(tree).as_posix(): path.stat().st_mtime_ns for path in found}


def test_catch2_that_arrives_after_the_build_adds_its_targets_alone(small_tree):
    make(small_tree, "build")
    before = objects(small_tree)
    assert len(before) == 3
    (small_tree / "tests.cpp").write_text("int tests() { return 3; }\n")
    make(small_tree, "_tests_built")
    after = objects(small_tree)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_an_option_that_is_given_no_more_has_its_default_again(small_tree):
    commands = small_tree / "build/compile_commands.json"
    make(small_tree, "build", CMAKE_ARGS="-DFP8_UNITY=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    before = objects(small_tree)
    assert "-DFP8_UNITY" in commands.read_text()
    make(small_tree, "build", CMAKE_ARGS="-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert "-DFP8_UNITY" not in commands.read_text()
    changed = {name for name, time in objects(small_tree).items() if time != before[name]}
    assert changed == {"build/CMakeFiles/fp8_core.dir/core.cpp.o"}


def entries(build: Path) -> dict[str, str]:
    """Compile commands by output, with the build's folder as a word."""
    commands = json.loads((build / "compile_commands.json").read_text())
    return {entry["output"]: entry["command"].replace(str(build), "BUILD") for entry in commands}


@pytest.mark.slow
@pytest.mark.skipif(not (BUILD / "CTestTestfile.cmake").exists(), reason="needs a build of tests")
def test_tests_change_no_command_of_the_libraries(tmp_path):
    same = ("FP8_CUDA", "FP8_CUDA_ARCHITECTURES", "FP8_UNITY", "FP8_WERROR", "CMAKE_CUDA_COMPILER")
    options = []
    for line in (BUILD / "CMakeCache.txt").read_text().splitlines():
        if line.split(":")[0] in same:
            options.append(f"-D{line}")
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    command += [f"-DFP8_PYTHON_PACKAGE_DIR={tmp_path}/package", "-DFP8_BUILD_TESTS=OFF"]
    environment = os.environ | {"PATH": PATH}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    with_tests = entries(BUILD)
    libraries = entries(tmp_path / "build")
    assert libraries
    assert {name: with_tests.get(name) for name in libraries} == libraries


@pytest.fixture
def difference(monkeypatch):
    """setup.py's function, for a tree of its own."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["difference"]


@pytest.fixture
def built_tree(tmp_path):
    """(sources, build) as CMake would leave them, without what is compiled."""
    for name in ("CMakeLists.txt", "VERSION"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cmake", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    build = tmp_path / "build"
    build.mkdir()
    cache = f"CMAKE_HOME_DIRECTORY:INTERNAL={tmp_path}\n# a comment\nFP8_CUDA:STRING=AUTO\n"
    (build / "CMakeCache.txt").write_text(cache)
    return tmp_path, build


def test_wheel_takes_a_build_of_the_same_sources_and_options(difference, built_tree):
    _, build = built_tree
    assert difference(build, []) is None
    assert difference(build, ["-DFP8_CUDA=AUTO"]) is None
    assert difference(build, ["-DFP8_CUDA:STRING=AUTO"]) is None


def test_wheel_takes_no_other_build(difference, built_tree):
    sources, build = built_tree
    assert "FP8_CUDA=AUTO, and -DFP8_CUDA=OFF" in difference(build, ["-DFP8_CUDA=OFF"])
    assert "-DFP8_UNITY=ON is asked for" in difference(build, ["-DFP8_UNITY=ON"])
    assert difference(sources, []) == "it has no CMakeCache.txt"
    version = (sources / "VERSION").read_text()
    (sources / "VERSION").write_text(version + "1")
    assert difference(build, []) == "its VERSION is another"
    (sources / "VERSION").write_text(version)
    (sources / "csrc/new.h").write_text("")
    assert difference(build, []) == "csrc/new.h is in one of the two sources only"
