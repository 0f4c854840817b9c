"""Links between the pages, without a network: files are there, and so are headings."""

from __future__ import annotations

import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, name_of, prose

OTHERS = ["CONTRIBUTING.md", "csrc/README.md", "python/README.md"]
LINKING = [*PAGES, *(ROOT / name for name in OTHERS)]
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "code", text)


def links(page: Path) -> list[str]:
    return LINK.findall(without_code(prose(page)))


def on_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def on_the_site(heading: str) -> str:
    """As Python-Markdown's toc extension makes them."""
    text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def headings(page: Path) -> list[str]:
    found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in found]


def broken(page: Path) -> list[str]:
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.is_relative_to(ROOT) or not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md":
            names = headings(target)
            # The same on both, so that a link works wherever the page is read.
            if not {anchor} <= set(map(on_github, names)) & set(map(on_the_site, names)):
                wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_of_a_page_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One & two\n\n## Three: four\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) [b](other.md#three-four) [c](other.md#five) [`d`](other.md#no-heading)\n"
        "[e](other.md#one--two) `[f](code.md)` [g](https://example.org/) [h](#here) [i](../x.md)\n"
        "```\n[j](fenced.md)\n```\n"
    )
    assert broken(page) == [
        "gone.md: no such file",
        "other.md#five: no such heading",
        "other.md#no-heading: no such heading",
        "other.md#one--two: no such heading",  # differs between GitHub and the site
        "#here: no such heading",
        "../x.md: no such file",
    ]


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {README}
    while new:
        reached |= new
        found = {
            (page.parent / link.partition("#")[0]).resolve()
            for page in new
            for link in links(page)
            if ".md" in link
        }
        new = (found & set(PAGES)) - reached
    assert reached == set(PAGES)


def test_files_that_pages_link_to_are_committed():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    known = {ROOT / line for line in done.stdout.splitlines()}
    for page in LINKING:
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if not re.match(r"[a-z]+:|#", link) and target.is_file():
                assert target in known, f"{name_of(page)}: {link}"
