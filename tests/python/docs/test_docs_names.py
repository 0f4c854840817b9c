"""What the pages name exists: make targets, programs, files, variables, public names."""

from __future__ import annotations

import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, fences, name_of, prose

import fp8

FOLDERS = ("benchmarks", "cmake", "csrc", "docs", "examples", "python", "scripts", "tests")


def code_of(page: Path) -> list[str]:
    """Blocks that are of no other language than the shell's, and code in sentences."""
    blocks = [f.text for f in fences(page) if f.language in ("", "sh", "console")]
    return [*blocks, *re.findall(r"`([^`\n]+)`", prose(page))]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_exist(page):
    known = targets()
    for code in code_of(page):
        for target in re.findall(r"^(?:\S+=\S+ )*make ([a-z-]+)", code, re.MULTILINE):
            assert target in known, code
        for module in re.findall(r"\bpython3? -m ([\w.]+)", code):
            assert find_spec(module), code
        for program in re.findall(r"\bpython3? ([\w./-]+\.py)", code):
            assert (ROOT / program).is_file(), code


def test_the_readme_names_commands():
    found = "\n".join(code_of(README))
    for command in ("make demo", "make test", "python -m fp8", "pip install"):
        assert re.search(rf"^{command}( |$)", found, re.MULTILINE), command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    for code in code_of(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", code):
            assert any(ROOT.glob(code.rstrip("/"))), code


def test_page_of_environment_variables_has_those_that_are_read():
    read = set()
    for path in [*(ROOT / "csrc").rglob("*"), *(ROOT / "python/fp8").rglob("*.py")]:
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
            pattern = r"(?:getenv\(|environ(?:\.get)?[\[(])\"(FP8_\w+)\""
            read |= set(re.findall(pattern, path.read_text()))
    page = (ROOT / "docs/environment.md").read_text()
    assert read == set(re.findall(r"^\| `(FP8_\w+)` \|", page, re.MULTILINE))
    assert len(read) >= 5


def public_names() -> dict[str, object]:
    """What the `__all__` of fp8 and of its public modules offer, by the shortest path. Without
    integrations, which import other packages."""
    modules = ["fp8"]
    for found in pkgutil.iter_modules(fp8.__path__, "fp8."):
        if not found.name.startswith(("fp8._", "fp8.info", "fp8.integrations")):
            modules.append(found.name)
    names = {}
    for module in sorted(modules, key=len):
        offered = importlib.import_module(module)
        for name in getattr(offered, "__all__", ()):
            names[f"{module}.{name}"] = getattr(offered, name)
    names["fp8.ops.MATMUL_OPS"] = fp8.ops.MATMUL_OPS
    names["fp8.ops.make_history"] = fp8.ops.make_history
    del names["fp8.__version__"], names["fp8.ops"]
    return names


def test_reference_has_every_public_name_once():
    text = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("api", "api-ops"))
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    listed.remove("fp8.ops")  # the head of its page
    names = public_names()
    assert sorted(set(listed)) == sorted(listed)
    for name in [name for name in listed if name.startswith("fp8.integrations.")]:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)
        listed.remove(name)
    assert set(listed) <= set(names)
    by_object = {id(names[name]) for name in listed}
    assert [name for name, value in names.items() if id(value) not in by_object] == []


def test_the_readme_is_a_page():
    assert len(README.read_text().splitlines()) <= 200
