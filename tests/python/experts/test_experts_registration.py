"""The name `fp8` in transformers' registry: whichever is imported first, and without transformers.

Each program is a process of its own: what is imported cannot be taken back.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[3] / "python"
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs transformers"
)


def run(program: str) -> str:
    """What a program prints; it must end well and warn of nothing."""
    head = f"import sys\nsys.path.insert(0, {str(PYTHON)!r})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", head + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


MODEL = """
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
)
model = MixtralForCausalLM(config)
model.set_experts_implementation("fp8")
import torch
model(torch.arange(8)[None]).logits.sum().backward()
print("in FP8" if "1 in FP8 (1 rowwise)" in fp8.summary(model) else fp8.summary(model))
"""


def test_import_fp8_does_not_import_transformers():
    assert (
        run("import fp8\nprint([m for m in sys.modules if m.startswith('transformers')])") == "[]"
    )


REGISTER = "fp8.integrations.transformers.register()"


@needs_transformers
@pytest.mark.parametrize(
    "imports",
    [
        f"import fp8\n{REGISTER}",  # which imports transformers' registry
        f"import fp8\nimport transformers\n{REGISTER}",
        f"import transformers\nimport fp8\n{REGISTER}",  # its registry comes later: lazily
        f"from transformers import MixtralForCausalLM\nimport fp8\n{REGISTER}",
    ],
)
def test_implementation_exists_in_either_order(imports):
    assert run(imports + MODEL) == "in FP8"


@needs_transformers
@pytest.mark.parametrize(
    "imports",
    ["import fp8", "from transformers import MixtralForCausalLM\nimport fp8"],
)
def test_implementation_is_unknown_until_asked_for(imports):
    """Whichever is imported first; transformers says so when the name is used."""
    program = MODEL.partition("import torch")[0].replace(
        'model.set_experts_implementation("fp8")',
        """
try:
    model.set_experts_implementation("fp8")
except ValueError as error:
    print(error)
""",
    )
    assert 'experts_implementation="fp8"` is not supported' in run(imports + program)


@needs_transformers
def test_implementation_is_taken_by_a_config():
    program = MODEL.replace('model.set_experts_implementation("fp8")', "").replace(
        "(config)", "._from_config(config, experts_implementation='fp8')"
    )
    assert run(f"import fp8\n{REGISTER}" + program) == "in FP8"


@needs_transformers
def test_convert_registers():
    """Where it meets a model of transformers, one without experts too."""
    program = """
        import fp8, torch
        from transformers import LlamaConfig, LlamaModel
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        model = LlamaModel(LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2,
        ))
        for one in (torch.nn.Linear(16, 16), torch.nn.ModuleDict({"inner": model})):
            fp8.convert(one, filter=lambda *_: True)
            print("fp8" in ALL_EXPERTS_FUNCTIONS)
    """
    assert run(program) == "False\nTrue"


@needs_transformers
def test_registration_by_a_pickled_model(tmp_path):
    """Its config asks for the implementation; fp8 was imported first, and nothing called."""
    file = str(tmp_path / "model.pt")
    convert = "fp8.convert(model, filter=lambda *_: True)"
    save = MODEL.replace('model.set_experts_implementation("fp8")', convert).replace(
        "import torch", f"import torch\ntorch.save(model, {file!r})"
    )
    assert "in FP8" in run("import fp8" + save)
    program = f"""
        import fp8, torch
        model = torch.load({file!r}, weights_only=False)
        print(tuple(model(torch.arange(8)[None]).logits.shape))
    """
    assert run(program) == "(1, 8, 32)"


@needs_transformers
def test_registration_leaves_the_module_and_imports_alone():
    program = """
        import inspect
        before = list(sys.meta_path)
        import fp8
        fp8.integrations.transformers.register()
        import transformers.integrations.moe as moe
        from importlib.machinery import SourceFileLoader
        assert type(moe.__loader__) is type(moe.__spec__.loader) is SourceFileLoader
        assert "class ExpertsInterface" in inspect.getsource(moe)
        assert sys.meta_path == before
        print(moe.ALL_EXPERTS_FUNCTIONS["fp8"].__module__)
    """
    assert run(program) == "fp8.integrations.transformers._experts"


@needs_transformers
def test_registration_can_be_repeated():
    """After a reload, or where a test emptied sys.modules, transformers' registry is a new one."""
    program = """
        import importlib
        import fp8
        import transformers.integrations.moe as moe
        importlib.reload(moe)
        for name in [name for name in sys.modules if name.startswith("transformers.integrations")]:
            del sys.modules[name]
        again = importlib.import_module("transformers.integrations.moe")
        print("fp8" in moe.ALL_EXPERTS_FUNCTIONS, "fp8" in again.ALL_EXPERTS_FUNCTIONS)
        fp8.integrations.transformers.register()
        fp8.integrations.transformers.register()
        print("fp8" in again.ALL_EXPERTS_FUNCTIONS)
        importlib.reload(fp8)
    """
    assert run(program) == "False False\nTrue"


@needs_transformers
def test_registration_while_another_thread_imports():
    program = """
        import threading
        import fp8
        threads = [
            threading.Thread(target=lambda: __import__("transformers.integrations.moe")),
            threading.Thread(target=fp8.integrations.transformers.register),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        print("fp8" in ALL_EXPERTS_FUNCTIONS)
    """
    assert run(program) == "True"


def test_registration_without_transformers():
    """convert, revert and summary work; a module of that name which is none is left alone."""
    program = """
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "transformers":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import fp8, torch
        model = fp8.convert(torch.nn.Sequential(torch.nn.Linear(16, 16)), filter=lambda *_: True)
        print(fp8.summary(model).splitlines()[-1][:20])
        fp8.revert(model)
        try:
            fp8.integrations.transformers.register()
        except ModuleNotFoundError as error:
            print(error)
    """
    assert run(program) == "1 linear: 1 in FP8 (\ntransformers"


def test_registration_where_transformers_is_too_old(tmp_path):
    """A transformers without the registry: only the explicit call fails."""
    package = tmp_path / "transformers" / "integrations"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "moe.py").write_text("VALUE = 3\n")
    program = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import transformers.integrations.moe as moe
        import fp8
        fp8.convert(fp8.Linear(16, 16), filter=lambda *_: True)
        try:
            fp8.integrations.transformers.register()
        except ImportError as error:
            print(moe.VALUE, error)
    """
    assert run(program) == (
        "3 fp8.integrations.transformers.register: transformers.integrations.moe has no "
        "ExpertsInterface; transformers 5 or later is needed"
    )


def test_registration_tries_again_after_a_failed_import(tmp_path):
    package = tmp_path / "transformers" / "integrations"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "moe.py").write_text("raise ImportError('not yet')\n")
    program = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        sys.dont_write_bytecode = True
        import fp8
        try:
            fp8.integrations.transformers.register()
        except ImportError as error:
            print(error)
        with open({str(package / "moe.py")!r}, "w") as file:
            file.write("class ExpertsInterface:\\n    register = staticmethod(print)\\n")
        import importlib
        importlib.invalidate_caches()
        fp8.integrations.transformers.register()
    """
    lines = run(program).splitlines()
    assert lines[0] == "not yet"
    assert lines[1].startswith("fp8 <function forward at")
    assert len(lines) == 2
