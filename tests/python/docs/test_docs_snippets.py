"""Every Python example of README.md and docs/ runs: a page from top to bottom, in one namespace, as
a reader would. Without a GPU "cuda" is read as "cpu"; nothing else is changed or defined for it. A
block of text below an example is what it prints.

An example that cannot run here begins with a comment that says why, for the reader too. Those of
C++ are verbatim parts of the programs in examples/cpp, which tests/python/cpp builds and runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import PAGES, README, ROOT, fences, name_of

# Pages whose examples need other packages, and the test that runs them.
ELSEWHERE = {"docs/integrations.md": "tests/compat/test_integrations_page.py"}
NOT_RUN = "# Not run as a test: "
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_PYTHON = [
    page
    for page in PAGES
    if name_of(page) not in ELSEWHERE and any(f.language == "python" for f in fences(page))
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    printed = ""
    for fence in fences(page):
        if fence.language == "python":
            text = "\n" * (fence.line - 1) + fence.text.replace('"cuda"', f'"{DEVICE}"')
            code = compile(text, name_of(page), "exec")
            if not fence.text.startswith(NOT_RUN):
                exec(code, namespace)
            printed = capsys.readouterr().out
        elif fence.language == "text":
            assert fence.text == printed, f"{name_of(page)}:{fence.line}"


def test_python_examples_that_do_not_run_are_these():
    found = {
        name_of(page): [f.text.splitlines()[0] for f in fences(page) if f.text.startswith(NOT_RUN)]
        for page in WITH_PYTHON
    }
    assert {name: len(lines) for name, lines in found.items() if lines} == {
        "docs/checkpoints.md": 1,
        "docs/several-gpus.md": 1,
    }
    assert "needs peft" in found["docs/checkpoints.md"][0]
    assert "needs several processes" in found["docs/several-gpus.md"][0]


def test_pages_that_are_left_out_have_a_test_of_their_own():
    for page, test in ELSEWHERE.items():
        if (ROOT / page).exists():
            assert Path(page).name in (ROOT / test).read_text()


def test_readme_has_python_in_six_lines_and_cpp_in_six():
    python, cpp = (
        next(f.text for f in fences(README) if f.language == language)
        for language in ("python", "cpp")
    )
    for text in (python, cpp):
        assert len([line for line in text.splitlines() if line.strip()]) <= 6
    assert "fp8.convert" in python


def test_examples_of_cpp_are_parts_of_programs():
    programs = {path.name: path.read_text() for path in (ROOT / "examples/cpp").glob("*.cpp")}
    found = [(name_of(page), f) for page in PAGES for f in fences(page) if f.language == "cpp"]
    assert len(found) >= 2
    for name, fence in found:
        assert any(fence.text in program for program in programs.values()), f"{name}:{fence.line}"
