"""For mkdocs.yml: links of the pages that lead out of docs/, and the site's first page.

In a clone such links lead to files beside it. The site has no sources: what lies in
benchmarks/results is copied into it, as plots are, and other links become their text. A file that
is not there is a warning, so an error of `mkdocs build --strict`. The first page begins as
README.md does, in place of the link to it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results/"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s#]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.site_links")


def on_files(files: Files, config: Any) -> Files:
    """Adds the results that some page links to."""
    wanted = set()
    for page in Path(config.docs_dir).glob("*.md"):
        wanted |= {path for _, _, path, _ in LINK.findall(page.read_text())}
    for path in sorted(wanted):
        if path.startswith(RESULTS) and (ROOT / path).is_file():
            name = f"results/{path.removeprefix(RESULTS)}"
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def first_page(index: str) -> str:
    """README.md without its list of pages, then index.md's."""
    readme, _, _ = (ROOT / "README.md").read_text().partition("\n## More\n")
    readme = re.sub(r"\]\((?!docs/|[a-z]+:)", "](../", readme).replace("](docs/", "](")
    return f"{readme}\n## {index.partition('## ')[2]}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of one page."""
    if page.file.src_uri == "index.md":
        markdown = first_page(markdown)

    def replace(match: re.Match[str]) -> str:
        image, text, path, _ = match.groups()
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, path)
        if path.startswith(RESULTS) and (ROOT / path).is_file():
            return f"{image}[{text}](results/{path.removeprefix(RESULTS)})"
        return text if text.startswith("`") or text == path else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)
