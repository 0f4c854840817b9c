"""Packaging: one version, a source distribution that can be built, pins that agree."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import fp8
from fp8._native.versions import PAIRS

ROOT = Path(__file__).resolve().parents[3]
VERSION = (ROOT / "VERSION").read_text().strip()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Names inside the source distribution of a clean copy of the tree, without its top folder."""
    copy = tmp_path_factory.mktemp("sdist") / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=copy, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", VERSION)
    assert fp8.__version__ == VERSION


def test_version_is_written_in_one_place():
    sources = [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder, pattern in (("cmake", "*"), ("csrc", "*"), ("python/fp8", "*.py")):
        sources += [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    # `version = "0.1.0"`, `project(... VERSION 0.1.0`, `#define FP8_VERSION "0.1.0"`
    named = re.compile(rf"version\w*\s*=?\s*[\"']?{re.escape(VERSION)}\b", re.IGNORECASE)
    for path in sources:
        if path.name != "_build.py" and path.suffix != ".so":
            assert not named.search(path.read_text(errors="replace")), path


def test_changelog_has_the_version_or_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{VERSION}]" in changelog or "## [Unreleased]" in changelog


def test_torch_requirement_begins_with_the_oldest_and_leaves_the_newest_alone():
    (requirement,) = PROJECT["project"]["dependencies"]
    assert requirement == f"torch>={PAIRS[0].torch}"  # a bound above would move a newer torch
    assert requirement in PROJECT["build-system"]["requires"]
    pin = re.search(r"^torch==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pin[1] in {pair.torch for pair in PAIRS if pair.cpu == "tested"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-lint.txt"])
def test_requirements_are_pinned(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line), line


def test_sdist_has_what_the_build_needs(sdist):
    needed = {"CMakeLists.txt", "VERSION", "LICENSE", "README.md", "setup.py", "pyproject.toml"}
    needed |= {"scripts/jobs.sh", "python/fp8/__init__.py", "python/fp8/py.typed"}
    for folder in ("cmake", "csrc"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        needed |= {path.relative_to(ROOT).as_posix() for path in files}
    assert needed <= sdist, sorted(needed - sdist)


def test_sdist_has_nothing_that_was_built(sdist):
    built = {"python/fp8/_build.py"} | {name for name in sdist if name.endswith((".so", ".pyc"))}
    assert not built & sdist


def test_make_help_fits_a_screen():
    text = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
    assert len(text.splitlines()) <= 24
    for target in ("build", "demo", "test", "test-gpu", "bench", "lint", "clean"):
        assert re.search(rf"^  {target} ", text, re.MULTILINE), target
