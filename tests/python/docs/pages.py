"""README.md and docs/ as the tests of this folder read them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"

if not (ROOT / "docs").is_dir():
    pytest.skip("docs/ is not beside the tests", allow_module_level=True)

PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Fence(NamedTuple):
    """A block of code. line: of its first line, from 1."""

    language: str
    text: str
    line: int


def fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines, 1):
        if (mark := re.match(r" *```(\w*)$", line)) is None:
            continue
        if begin is None:
            begin, language = number, mark[1]
        else:
            text = textwrap.dedent("\n".join(lines[begin : number - 1]))
            yield Fence(language, text + "\n", begin + 1)
            begin = None
    assert begin is None, f"{page}: the block of line {begin} has no end"


def prose(page: Path) -> str:
    """The page with its blocks of code and comments blanked, line for line."""
    text = page.read_text()

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^ *```.*?^ *```$", blank, text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
