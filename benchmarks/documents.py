"""What is generated in README.md and docs/, and where: a table of files, blocks and functions.

A block stands between the lines `<!-- NAME:begin -->` and `<!-- NAME:end -->` of its file. Figures
stand nowhere else: they come from the JSON in benchmarks/results, and from the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sections
import status
import tables
from runs import RESULTS, ROOT, Row, import_fp8


def replace_between(document: str, block: str, name: str) -> str:
    """The document with `block` between the lines of this name. Raises ValueError without them."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the document lacks the lines {first} and {last}")
    return f"{head}{first}\n{block}\n{last}{tail}"


_SCALES = {
    "tensorwise": "one per tensor",
    "rowwise": "one per row",
    "blockwise": "one per 128 elements of a row; weight: per 128 x 128",
}
_RESULTS = {"fprop": "y", "dgrad": "dx", "wgrad": "dW"}


def recipes() -> str:
    """The table of recipes, as the library has it."""
    default = import_fp8().recipe.DEFAULT_GROUPED_RECIPE
    lines = []
    for name, recipe in import_fp8().RECIPES.items():
        scales = _SCALES[recipe.granularity]
        if recipe.scaling == "delayed":
            scales += ", from the 16 calls before"
        of_input, of_grad = (
            str(dtype).removeprefix("torch.float8_").removesuffix("fn")
            for dtype in (recipe.input_dtype, recipe.grad_output_dtype)
        )
        takes = "yes" if "grouped" in recipe.linears else "no"
        if takes == "yes" and recipe.granularity == "blockwise":
            takes = "yes, weight gradient in high precision"
        fast = ", ".join(_RESULTS[product] for product in recipe.fast_accum)
        wgrad = recipe.wgrad.replace("fp8", "FP8")
        experts = f"{takes}, the default" if name == default else takes
        lines.append([f"`{name}`", scales, of_input, of_grad, wgrad, fast or "none", experts])
    columns = [
        "recipe",
        "scales",
        "x, weight",
        "dy",
        "weight gradient",
        "accumulate fast",
        "experts",
    ]
    return tables.markdown(columns, lines, left=len(columns))


def measured(runs: dict[str, Row]) -> str:
    """Which benchmark has figures of which recipes, on which GPU, and of which commit."""
    known = import_fp8().RECIPES
    lines = []
    for name, run in runs.items():
        variants = dict.fromkeys(str(row.get("variant", "")) for row in run["rows"])
        words = dict.fromkeys(
            word.strip(",")
            for variant in variants
            if variant.startswith("fp8 ")
            for word in variant.split()[1:2]
        )
        recipes = ", ".join(f"`{word}`" for word in words if word in known)
        head = run["header"]
        lines.append([f"`{name}.json`", head["gpu"], head["commit"] or "unknown", recipes])
    return tables.markdown(["results", "GPU", "commit", "recipes"], lines, left=4)


def training_run(folder: Path) -> str:
    """What the demo and the comparison of losses printed, as it is."""
    parts = []
    for command, stem in (("make demo", "demo"), ("make loss-curves", "loss_curves")):
        for path in sorted(folder.glob(f"{stem}_h*.txt")):
            text = path.read_text().rstrip()
            parts.append(f"`{command}`, `benchmarks/results/{path.name}`:\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


# (file, name of the block) -> what stands there, of the runs and the folder that they are from
BLOCKS: dict[tuple[str, str], Callable[[dict[str, Row], Path], str]] = {
    ("README.md", "model"): lambda runs, folder: sections.landing(runs),
    ("docs/performance.md", "bench"): sections.everything,
    ("docs/performance.md", "training"): lambda runs, folder: training_run(folder),
    ("docs/recipes.md", "recipes"): lambda runs, folder: recipes(),
    ("docs/devices.md", "measured"): lambda runs, folder: measured(runs),
    ("docs/devices.md", "checks"): lambda runs, folder: status.table(status.load(folder)),
}


def rendered(runs: dict[str, Row], folder: Path = RESULTS, root: Path = ROOT) -> dict[Path, str]:
    """Each file that has blocks, as it should be."""
    texts: dict[Path, str] = {}
    for (file, name), make in BLOCKS.items():
        path = root / file
        text = texts.get(path) or path.read_text()
        texts[path] = replace_between(text, make(runs, folder), name)
    return texts


def write(runs: dict[str, Row], folder: Path = RESULTS, root: Path = ROOT) -> list[Path]:
    """Writes the blocks, and returns the files that have some."""
    texts = rendered(runs, folder, root)
    for path, text in texts.items():
        path.write_text(text)
    return list(texts)


def write_checks(root: Path = ROOT) -> Path:
    """The table of the long checks alone: a check writes it with its result."""
    path = root / "docs/devices.md"
    table = status.table(status.load(RESULTS))
    path.write_text(replace_between(path.read_text(), table, "checks"))
    return path
