"""`python -m fp8_rebuild`: what it makes, and what it says where it cannot.

libfp8_torch itself takes minutes to compile, and `make wheel` makes it in the same way; so what is
compiled here is fp8._C alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fp8
import fp8_rebuild
from fp8 import _build

PACKAGE = Path(fp8.__file__).parent
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the built package, which fp8_rebuild takes for its own."""
    shutil.copytree(PACKAGE, tmp_path / "fp8", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fp8_rebuild, "PACKAGE", tmp_path / "fp8")
    monkeypatch.setattr(fp8_rebuild, "CLONE", ROOT)
    monkeypatch.setattr(fp8_rebuild, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["fp8_rebuild"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "fp8"


@pytest.fixture
def commands(monkeypatch):
    """What would be run; nothing is."""
    seen = []

    def note(command, **kwargs):
        seen.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, 0)

    asked = SimpleNamespace(run=note, check_output=subprocess.check_output)
    monkeypatch.setattr(fp8_rebuild, "subprocess", asked)
    return seen


def test_rebuild_has_nothing_to_do_in_a_build_that_fits(package, capfd):
    fp8_rebuild.main()
    output = capfd.readouterr().out
    assert "nothing to do" in output
    assert f"import fp8 works with torch {torch.__version__}" in output


def test_rebuild_compiles_for_a_torch_that_the_package_lacks(package, commands, monkeypatch):
    folder = Path(torch.__file__).parent
    monkeypatch.setattr(fp8_rebuild, "find_torch", lambda: (folder, "2.99.1+cu140"))
    fp8_rebuild.main()
    configure, build, _ = commands
    assert {f"-DFP8_CORE={package}", f"-DLibTorch_ROOT={folder}"} <= set(configure)
    assert build[-2:] == ["--target", "fp8_torch"]


def test_rebuild_takes_what_another_version_left_for_missing(package, commands):
    (facts,) = package.glob("lib/torch*/build.json")
    facts.write_text(facts.read_text().replace(fp8.__version__, "0.0.1"))
    fp8_rebuild.main()
    assert commands[1][-1] == "fp8_torch"


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.skipif(
    not Path(sysconfig.get_paths()["include"], "Python.h").exists(), reason="needs Python's headers"
)
def test_rebuild_makes_the_binding(package, capfd):
    for module in package.glob("_C.*.so"):
        module.unlink()
    fp8_rebuild.main()  # imports it too, in a new process
    (made,) = package.glob("_C.*.so")
    assert made.name == f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert f"made {made}" in capfd.readouterr().out


def test_rebuild_says_what_is_missing(package, monkeypatch):
    for module in package.glob("_C.*.so"):
        module.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(fp8_rebuild, "tool", lambda name: None)
        with pytest.raises(SystemExit, match="cmake is missing: pip install cmake"):
            fp8_rebuild.main()
    with monkeypatch.context() as patch:
        patch.delenv("CXX", raising=False)
        patch.setattr(fp8_rebuild.shutil, "which", lambda name: None)
        with pytest.raises(SystemExit, match=r"no C\+\+ compiler: apt-get install g\+\+"):
            fp8_rebuild.main()
    with monkeypatch.context() as patch:
        patch.setattr(fp8_rebuild.sysconfig, "get_paths", lambda: {"include": "/none"})
        with pytest.raises(SystemExit, match=r"no /none/Python.h"):
            fp8_rebuild.main()
    with monkeypatch.context() as patch:
        patch.setattr(fp8_rebuild.os, "access", lambda path, mode: False)
        with pytest.raises(SystemExit, match="cannot be written"):
            fp8_rebuild.main()
    monkeypatch.setattr(fp8_rebuild, "CLONE", package)
    with pytest.raises(SystemExit, match="there are no sources in"):
        fp8_rebuild.main()


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_library_alone_needs_a_core_of_its_version(package, tmp_path, capfd):
    header = package / "include/fp8/version.h"
    header.write_text(header.read_text().replace(_build.VERSION, "0.0.1"))
    options = [f"-DFP8_CORE={package}", f"-DLibTorch_ROOT={Path(torch.__file__).parent}"]
    with pytest.raises(SystemExit, match="this failed, its messages are above"):
        fp8_rebuild.compile_with_cmake(ROOT, tmp_path / "build", options, "1", "fp8_torch")
    assert f"these sources are of fp8 {_build.VERSION}, but" in " ".join(
        capfd.readouterr().err.split()
    )
