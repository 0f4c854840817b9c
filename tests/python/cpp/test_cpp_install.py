"""`cmake --install` and the Python package: what is in them, and what find_package makes of it."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cmake_runs import ROOT, TREE, configure

import fp8
from fp8 import _build

HEADERS = ["core.h", "nn.h", "nn_blocks.h", "ops.h", "version.h"]
CMAKE_FILES = ["FP8Config.cmake", "FP8ConfigVersion.cmake", "LibTorch.cmake"]
MINOR = ".".join(torch.__version__.split(".")[:2])
LIBRARIES = ["libfp8_core.so", f"torch{MINOR}/build.json", f"torch{MINOR}/libfp8_torch.so"]
if _build.CUDA_VERSION:
    LIBRARIES.append("without_cuda/libfp8_core.so")


def needed(program: Path) -> str:
    """`ldd`: every library that the program loads, with its place."""
    return subprocess.check_output(["ldd", program], text=True)


def names(folder: Path) -> list[str]:
    """Every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def find_package(tmp_path: Path, line: str, prefix: object, *options: str) -> str:
    """Configures a project that does nothing but look for fp8, and returns CMake's output."""
    tmp_path.joinpath("CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.28)\nproject(consumer LANGUAGES CXX)\n"
        f"{line}\n"
        'foreach(target FP8::core FP8::torch)\n  if(TARGET ${target})\n    message("has ${target}")'
        '\n  endif()\nendforeach()\nmessage("found=${FP8_FOUND} ${FP8_NOT_FOUND_MESSAGE}")\n'
    )
    return configure(tmp_path, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", *options)


def test_install_has_headers_libraries_and_cmake_files_only(prefix):
    assert sorted(path.name for path in prefix.iterdir()) == ["include", "lib", "share"]
    assert names(prefix / "include/fp8") == HEADERS
    assert names(prefix / "lib") == LIBRARIES
    assert names(prefix / "share/cmake/FP8") == CMAKE_FILES


def test_package_has_the_same(package, prefix):
    assert Path(fp8.cmake_prefix_path) == package / "share/cmake"
    for folder in ("include/fp8", "lib", "share/cmake/FP8"):
        assert names(package / folder) == names(prefix / folder)
        for name in names(prefix / folder):
            assert (prefix / folder / name).read_bytes() == (package / folder / name).read_bytes()


def test_install_names_no_folder_of_the_build_machine(prefix):
    for path in [*(prefix / "share/cmake/FP8").iterdir(), *(prefix / "include/fp8").iterdir()]:
        assert str(ROOT) not in path.read_text(), path
    for name in (name for name in LIBRARIES if name.endswith(".so")):
        dynamic = subprocess.check_output(["readelf", "-d", prefix / "lib" / name], text=True)
        paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
        assert all(entry.startswith("$ORIGIN") for entry in ":".join(paths).split(":")), paths


def test_find_package_through_the_python_package(tmp_path):
    text = find_package(tmp_path, "find_package(FP8 REQUIRED)", fp8.cmake_prefix_path)
    assert "has FP8::torch" in text
    assert "has FP8::core\n" not in text
    assert "found=1" in text


@pytest.mark.skipif(not _build.CUDA_VERSION, reason="built without CUDA")
def test_find_package_core_needs_no_torch(tmp_path, prefix):
    nothing = f"-DLibTorch_ROOT={tmp_path}"
    text = find_package(tmp_path, "find_package(FP8 COMPONENTS core)", prefix, nothing)
    assert "has FP8::core\n" in text
    assert "has FP8::torch" not in text
    assert "found=1" in text


@pytest.mark.skipif(not _build.CUDA_VERSION, reason="built without CUDA")
def test_find_package_both(tmp_path, prefix):
    text = find_package(tmp_path, "find_package(FP8 COMPONENTS torch core)", prefix)
    assert "has FP8::core\n" in text
    assert "has FP8::torch" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("find_package(FP8 COMPONENTS extra)", "no component 'extra', only core and torch"),
        ("find_package(FP8)", "there is no LibTorch in "),
        ("find_package(FP8 9.0)", "found=0"),
    ],
)
def test_find_package_says_why_not(tmp_path, prefix, line, message):
    text = find_package(tmp_path, line, prefix, f"-DLibTorch_ROOT={tmp_path}")
    assert message in " ".join(text.split())
    assert "found=0" in text


def test_find_package_refuses_another_torch(tmp_path, prefix):
    other = tmp_path / "torch"
    other.mkdir()
    for version, message in {
        "2.99.1+cpu": f"this fp8 has libraries for LibTorch {MINOR}, but 2.99.1+cpu is in",
        "2.10.0+cpu": "fp8 needs torch 2.11 or newer, but 2.10.0+cpu is in",
    }.items():
        (other / "version.py").write_text(f"__version__ = '{version}'\n")
        text = find_package(tmp_path, "find_package(FP8)", prefix, f"-DLibTorch_ROOT={other}")
        assert message in " ".join(text.split())


def test_find_package_gives_a_torch_without_cuda_the_core_without(tmp_path, prefix):
    other = tmp_path / "torch"
    other.mkdir()
    (other / "version.py").write_text(f"__version__ = '{MINOR}.0+cpu'\n")
    line = (
        "find_package(FP8)\n"
        'get_target_property(links FP8::torch INTERFACE_LINK_LIBRARIES)\nmessage("links=${links}")'
    )
    text = find_package(tmp_path, line, prefix, f"-DLibTorch_ROOT={other}")
    assert "found=1" in text
    core = "lib/without_cuda/libfp8_core.so"
    assert (core in text) == bool(_build.CUDA_VERSION)  # else there is one core


def test_programs_are_built_from_the_install_tree_alone(programs):
    commands = json.loads((programs / "compile_commands.json").read_text())
    assert len(commands) == 3
    for command in commands:
        assert f"{TREE}/moved/include" in command["command"]
        assert "csrc" not in re.sub(r"\S*/torch/csrc/api/include", "", command["command"])


def test_programs_load_torch_and_no_python(programs):
    for name in ("train", "run_saved", "first_steps"):
        text = needed(programs / name)
        assert "not found" not in text
        assert "python" not in " ".join(re.findall(r"^\s*(\S+)", text, re.MULTILINE))
        assert f"{TREE}/moved/lib/torch{MINOR}/libfp8_torch.so" in text
        assert "libtorch_cpu.so" in text


@pytest.mark.skipif(not _build.CUDA_VERSION, reason="built without CUDA")
def test_programs_load_cuda_through_torch(programs):
    text = needed(programs / "run_saved")
    assert "libtorch_cuda.so" in text  # by name: nothing refers to it
    (lt,) = re.findall(r"libcublasLt\S* => (\S+)", text)
    assert "/nvidia/" in lt or "/torch/" in lt  # the one that came with torch


def test_core_program_loads_neither_torch_nor_python(core_program):
    text = needed(core_program)
    assert "not found" not in text
    for name in re.findall(r"^\s*(\S+)", text, re.MULTILINE):
        assert not re.search(r"torch|c10|python", Path(name).name), name
