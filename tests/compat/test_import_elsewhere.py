"""`import fp8` changes nothing in other packages, whether it comes after them or before.

Not some attributes are compared that might change, but everything that modules of these packages,
their classes and their containers hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = """
import accelerate, peft, torch, transformers
import torch.distributed.checkpoint.default_planner
import torch.optim.optimizer
import torch.utils.flop_counter
import transformers.integrations.moe
import transformers.models.mixtral.modeling_mixtral
import transformers.quantizers.auto
import transformers.trainer
"""

LOOK = """
import json, re, sys, types


def names():
    '''(module, name) -> value, of all that is loaded of the packages.'''
    return {
        (module_name, name): value
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] in ("torch", "transformers", "accelerate", "peft")
        and hasattr(module, "__dict__")
        for name, value in list(vars(module).items())
    }


def parts(value):
    '''What a container, a class or a registry of transformers holds.'''
    mapping = value._global_mapping if hasattr(type(value), "_global_mapping") else value
    if isinstance(mapping, dict):
        return [part for item in dict.items(mapping) for part in item]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=id)
    return list(vars(value).values()) if isinstance(value, type) else []


def description(value):
    '''What another process can compare: the names of a value and of what it holds.'''
    return [name_of(value), *sorted(map(name_of, parts(value)))]


def name_of(value):
    if isinstance(value, str):
        return re.sub("0x[0-9a-f]+|[0-9a-f]{8}[0-9a-f-]{20,}", "", value)[:80]
    named = isinstance(value, (type, types.FunctionType, types.MethodType))
    return f"{value.__module__}.{value.__qualname__}" if named else type(value).__qualname__


def describe(file):
    found = {".".join(key): description(value) for key, value in names().items()}
    with open(file, "w") as out:
        json.dump(found, out)
"""

AFTER = """
describe(sys.argv[1])
before = {key: (value, parts(value)) for key, value in names().items()}
import fp8
now = names()
changed = [
    key for key, (value, held) in before.items()
    if now.get(key) is not value or [*map(id, parts(value))] != [*map(id, held)]
]
modules = {module for module, _ in before}
added = [key for key in now.keys() - before.keys() if key[0] in modules]
with open(sys.argv[2], "w") as out:
    json.dump(sorted(".".join(key) for key in changed + added), out)
"""

OPERATORS = {
    "torch.jit._builtins._builtin_table",
    "torch.library._impls",
    "torch.library._keep_alive",
    "torch.ops._dir",
    "torch.ops.fp8",
    "torch.ops.loaded_libraries",
}
"""Where torch itself notes which operators and libraries there are."""

TABLES = {"torch._inductor.decomposition.decompositions", "torch._inductor.lowering.decompositions"}
"""Of what torch decomposes: made of all operators that there are when it is imported."""


def start(program: str, *files: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, files)],
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sets in one order
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def looks(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("import")
    files = {name: folder / name for name in ("without", "changed", "first")}
    programs = (
        start(IMPORTS + LOOK + AFTER, files["without"], files["changed"]),
        start("import fp8\n" + IMPORTS + LOOK + "describe(sys.argv[1])", files["first"]),
    )
    for program in programs:
        output, _ = program.communicate(timeout=240)
        assert program.returncode == 0, output[-3000:]
    return files


def test_import_of_fp8_changes_no_package_that_is_loaded(looks):
    assert set(json.loads(looks["changed"].read_text())) == OPERATORS


def test_import_of_fp8_changes_no_package_that_comes_later(looks):
    without, after = (json.loads(looks[name].read_text()) for name in ("without", "first"))
    both = without.keys() & after.keys()
    assert len(both) > 50_000
    assert {name for name in both if without[name] != after[name]} <= OPERATORS | TABLES
    loaded = {name.rpartition(".")[0] for name in without}
    assert {n for n in after.keys() - both if n.rpartition(".")[0] in loaded} <= OPERATORS
    assert without.keys() <= both
