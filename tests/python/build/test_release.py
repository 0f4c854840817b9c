"""scripts/release.sh, with stand-ins for what compiles and installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VERSION = (ROOT / "VERSION").read_text().strip()
MAKE_BOTH = "rm -rf dist; mkdir dist; cp VERSION dist/a.whl; cp $FP8_BUILD_DIR/x dist/a.gz"
STEPS = {
    "scripts/wheel.sh": MAKE_BOTH,
    "scripts/test_wheel.sh": 'echo "tested $1"',
    "scripts/jobs.sh": "echo 1",
    # configure: `-S . -B FOLDER ...`; what is built is the file x.
    "tools/cmake": 'if [ "$1" = -S ]; then mkdir -p "$4"; cp next "$4/x"; fi',
}


@pytest.fixture
def tree(tmp_path):
    """A committed tree, whose second build gives the bytes in `next`."""
    for name, text in STEPS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nset -e\n{text}\n")
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts/release.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "VERSION", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{VERSION}]\n")
    (tmp_path / ".gitignore").write_text("/build/\n/dist/\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "build/x").write_text("same")
    (tmp_path / "next").write_text("same")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(tree: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)


def commit(tree: Path) -> None:
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "test")


def release(tree: Path, *arguments: str) -> tuple[int, str]:
    """(status, output)."""
    environment = os.environ | {"PATH": f"{tree}/tools:{os.environ['PATH']}"}
    environment.pop("SOURCE_DATE_EPOCH", None)
    result = subprocess.run(
        ["bash", "scripts/release.sh", *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_release_has_sums_and_was_tried(tree):
    status, output = release(tree)
    assert status == 0, output
    assert "tested wheel\ntested sdist\n" in output
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tree / "dist", check=False)
    assert sums.returncode == 0
    assert sorted(path.name for path in (tree / "dist").iterdir()) == [
        "SHA256SUMS",
        "a.gz",
        "a.whl",
    ]


def test_release_that_is_not_reproducible_fails(tree):
    (tree / "next").write_text("other")
    commit(tree)
    status, output = release(tree)
    assert status == 1
    assert "release: a.gz is not reproducible" in output
    assert "tested" not in output


def test_release_needs_a_commit_and_a_heading(tree):
    (tree / "CHANGELOG.md").write_text("## [Unreleased]\n")
    assert "release: commit first" in release(tree)[1]
    commit(tree)
    assert f"has no heading '## [{VERSION}]'" in release(tree)[1]
    assert release(tree, "--rehearsal")[0] == 0
