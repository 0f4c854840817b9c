#!/usr/bin/env python3
"""Checks that nothing in fp8_core includes a torch header, directly or through our own headers, and
that includes lead from room to room downwards only (FLOORS).

fp8_core is: every *.cu and *.cuh below csrc/, the public headers fp8/core*.h, and each source that
CMake lists for the target, in `add_library(fp8_core ...)` or `target_sources(fp8_core ...)`,
written out or by way of a variable. A .cu file without torch compiles in seconds; that is why the
layer exists. `check_layers.py [ROOT]`; exit status 1 and one line per offence.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FORBIDDEN = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
# csrc's rooms, the lowest floor first: a file includes its own room and those of lower floors.
FLOORS = (
    ("include",),
    ("host",),
    ("core/device",),
    ("core/quantize", "core/matmul"),
    ("core/grouped", "core/norm", "core/rope", "core/mlp"),
    ("cpu",),
    ("torch/common",),
    ("torch/quantize",),
    ("torch/matmul",),
    ("torch/linear", "torch/grouped", "torch/norm", "torch/rope"),
    ("torch/merged", "torch/mlp", "torch/experts"),
    ("torch/registration",),
    ("bindings",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CORE_TARGET = re.compile(r"\b(?:add_library|target_sources)\s*\(\s*fp8_core\b([^)]*)\)")
VARIABLE = re.compile(r"\bset\s*\(\s*(\w+)\s([^)]*)\)")


def cmake_sources(root: Path) -> set[Path]:
    """Files that CMake compiles into fp8_core."""
    sources: set[Path] = set()
    for pattern in ("CMakeLists.txt", "csrc/**/CMakeLists.txt", "cmake/*.cmake", "csrc/**/*.cmake"):
        for script in root.glob(pattern):
            text = re.sub(r"#[^\n]*", "", script.read_text())
            variables = dict(VARIABLE.findall(text))
            for arguments in CORE_TARGET.findall(text):
                for name, value in variables.items():
                    arguments = arguments.replace(f"${{{name}}}", value)
                words = re.sub(r"\$\{\w*SOURCE_DIR\w*\}/", "", arguments).split()
                folders = (script.parent, root, root / "csrc")
                places = (folder / word for word in words for folder in folders)
                sources.update(place.resolve() for place in places if place.is_file())
    return sources


def core_files(root: Path) -> set[Path]:
    """Every file of the layer that the rule starts from."""
    csrc = root / "csrc"
    kernels = {path.resolve() for path in [*csrc.rglob("*.cu"), *csrc.rglob("*.cuh")]}
    public = {header.resolve() for header in csrc.glob("include/fp8/core*.h")}
    return kernels | cmake_sources(root) | public


def resolve(name: str, includer: Path, root: Path) -> Path | None:
    """Our own header behind an include, or None for one from elsewhere."""
    for folder in (includer.parent, root / "csrc", root / "csrc/include"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


def offences(root: Path) -> list[str]:
    """One line per forbidden include, with the way from the core file that reaches it."""
    root = root.resolve()
    found = []
    pending = [(path, path.relative_to(root).as_posix()) for path in sorted(core_files(root))]
    seen = {path for path, _ in pending}
    while pending:
        path, route = pending.pop()
        for _, name in INCLUDE.findall(path.read_text()):
            if FORBIDDEN.search(name):
                found.append(f"{route} includes {name}, but fp8_core may include no torch header")
            header = resolve(name, path, root)
            if header is not None and header not in seen:
                seen.add(header)
                pending.append((header, f"{route} -> {header.relative_to(root).as_posix()}"))
    return sorted(found)


def room_of(path: str) -> str | None:
    """The room of a file, from its path below csrc/; None in a tree that has other ones."""
    return next((room for room in FLOOR if path.startswith(f"{room}/")), None)


def climbs(root: Path) -> list[str]:
    """One line per include of ours that leads to a higher floor, or to the next room on its own."""
    found = []
    csrc = root.resolve() / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        includer = path.relative_to(csrc).as_posix()
        own = room_of(includer)
        for _, name in INCLUDE.findall(path.read_text()):
            header = resolve(name, path, root.resolve())
            other = room_of(header.relative_to(csrc).as_posix()) if header is not None else None
            if own is None or other is None or own == other or FLOOR[other] < FLOOR[own]:
                continue
            found.append(f"csrc/{includer} includes {name}, but {other} is not below {own}")
    return found


def main() -> int:
    """Prints the offences; returns 1 if there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = offences(root) + climbs(root)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
