"""The package's shape: public packages of private modules, and no name that means two things."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import new_process
import pytest
from torch import nn

import fp8

COMMANDS = {"fp8.__main__", "fp8.info"}
"""Run with `python -m`, not imported. The second is the first's name of old, for one release more:
importing it gives the function."""

OTHERS = {
    f"fp8.integrations.{name}": package
    for name, package in {
        "axolotl": "axolotl",
        "lightning": "lightning",
        "megatron": "megatron-core",
        "peft": "peft",
        "torchtitan": "torchtitan",
        "transformers._callback": "transformers",
        "transformers._quantizer": "transformers",
    }.items()
}
"""Modules that import a package which may be missing. `make test-compat` has these packages."""

PUBLIC = {"fp8", "fp8.recipe"} | {
    f"fp8.{name}"
    for name in (
        *("checkpoints", "conversion", "integrations", "integrations.transformers", "nn", "ops"),
        "tools",
    )
}


def walk() -> dict[str, ModuleType]:
    """Every module of the package but OTHERS, by its name. Built parts (fp8._C, fp8._build) too."""
    found = {"fp8": fp8}
    for module in pkgutil.walk_packages(fp8.__path__, "fp8."):
        if module.name not in COMMANDS and module.name not in OTHERS:
            found[module.name] = importlib.import_module(module.name)
    return found


@pytest.mark.parametrize("package", [name for name, m in walk().items() if hasattr(m, "__path__")])
def test_package_hides_none_of_its_modules(package):
    """`import a.b` and `a.b` must be one thing."""
    module = importlib.import_module(package)
    for _, name, _ in pkgutil.iter_modules(module.__path__, f"{package}."):
        if name not in COMMANDS and name not in OTHERS:
            importlib.import_module(name)
            assert isinstance(getattr(module, name.rpartition(".")[2]), ModuleType), name


def test_public_modules_are_these():
    """All others have an underscore in their path, and so may move."""
    public = {name for name in walk() if "._" not in name}
    assert public == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"fp8.integrations", "fp8.recipe"}))
def test_public_package_lists_its_names(name):
    module = importlib.import_module(name)
    for attribute in module.__all__:
        if name == "fp8.integrations.transformers" and attribute.startswith("Convert"):
            continue  # of OTHERS
        assert hasattr(module, attribute), attribute
    have = {key for key, value in vars(module).items() if not isinstance(value, ModuleType)}
    have -= {"MATMUL_OPS", "make_history"}  # __all__ of fp8.ops lists the operators
    have -= {"TYPE_CHECKING"}
    assert {key for key in have if not key.startswith("_")} <= set(module.__all__)


def test_map_has_every_module():
    """python/README.md, a line each."""
    root = Path(fp8.__file__).parent
    text = (Path(__file__).parents[3] / "python/README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    listed = re.findall(r"`([\w/]+\.py)`", "\n".join(rows))
    have = {str(path.relative_to(root)) for path in root.rglob("*.py")} - {"_build.py"}
    # Of a package's __init__.py the line of the package speaks.
    assert sorted(listed) == sorted(n for n in have if not n.endswith("/__init__.py"))


def test_names_of_the_packages_are_those_of_fp8():
    for package in (fp8.nn, fp8.tools, fp8.conversion):
        for name in set(package.__all__) & set(fp8.__all__):
            assert getattr(package, name) is getattr(fp8, name)


@pytest.mark.parametrize("module", sorted(OTHERS))
def test_module_names_the_package_that_is_missing(module):
    """And whoever names nothing of it does without."""
    program = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {{"axolotl", "lightning", "megatron", "peft",
                                              "torchtitan", "transformers"}}:
                    raise ModuleNotFoundError("it is not there", name=name)

        sys.meta_path.insert(0, Absent())
        import fp8, importlib
        dir(fp8.integrations), dir(fp8.integrations.transformers)
        try:
            importlib.import_module({module!r})
        except ImportError as error:
            print(error)
    """
    result = new_process.python("-c", "\n".join(line[8:] for line in program.splitlines()))
    assert result.returncode == 0, result.stderr
    name = module.partition("._")[0]
    expected = (
        rf"{re.escape(name)} needs the package {OTHERS[module]} \(tested with [\d.]+\): it is"
    )
    assert re.match(expected, result.stdout), result.stdout


@pytest.mark.parametrize("name", ["fp8.integrations", "fp8.integrations.transformers"])
def test_package_has_no_other_names(name):
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'convert'"):
        importlib.import_module(name).convert  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        *(fp8.Linear(16, 16), fp8.FrozenLinear(16, 16), fp8.GroupedLinear(1, 16, 16)),
        *(fp8.GatedMLP(16, 16), fp8.MLP(16, 16)),
    ],
)
def test_pickles_name_public_modules(module):
    data = pickle.dumps(module, protocol=0)
    assert b"fp8.nn" in data
    assert b"fp8.nn._" not in data
    assert isinstance(pickle.loads(data), nn.Module)


def test_import_changes_nothing_elsewhere():
    """No finder, loader or hook in Python's import, and no module but torch's and its own."""
    program = """
        import sys, torch
        import builtins
        paths = (sys.meta_path, sys.path_hooks, sys.path)
        before = [list(part) for part in paths], builtins.__import__, set(sys.modules)
        import fp8
        assert [list(part) for part in paths] == before[0]
        assert builtins.__import__ is before[1]
        others = {name.partition(".")[0] for name in set(sys.modules) - before[2]}
        print(*sorted(others - set(sys.stdlib_module_names) - {"fp8", "torch"}))
    """
    result = new_process.python("-c", "\n".join(line[8:] for line in program.splitlines()))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
