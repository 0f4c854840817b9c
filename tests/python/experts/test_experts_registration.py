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
print("in FP8" if "1 in FP8 (1 rowwise_gw_hp)" in fp8.summary(model) else fp8.summary(model))
"""


def test_import_fp8_does_not_import_transformers():
    assert (
        run("import fp8\nprint([m for m in sys.modules if m.startswith('transformers')])") == "[]"
    )


@needs_transformers
@pytest.mark.parametrize(
    "imports",
    [
        "import fp8",  # transformers comes later
        "import transformers\nimport fp8",  # its registry comes later: it imports lazily
        "from transformers import MixtralForCausalLM\nimport fp8",
    ],
)
def test_implementation_exists_in_either_order(imports):
    assert run(imports + MODEL) == "in FP8"


@needs_transformers
def test_implementation_is_taken_by_a_config():
    program = MODEL.replace('model.set_experts_implementation("fp8")', "").replace(
        "(config)", "._from_config(config, experts_implementation='fp8')"
    )
    assert run("import fp8" + program) == "in FP8"


@needs_transformers
def test_registration_leaves_no_trace_in_the_module():
    """Its loader is the one that Python gives it, so sources and reloads work as ever."""
    program = """
        import importlib, inspect
        import fp8
        import transformers.integrations.moe as moe
        from importlib.machinery import SourceFileLoader
        assert type(moe.__loader__) is type(moe.__spec__.loader) is SourceFileLoader
        assert "class ExpertsInterface" in inspect.getsource(moe)
        assert moe.ALL_EXPERTS_FUNCTIONS["fp8"] is fp8.experts.forward
        print(len([f for f in sys.meta_path if type(f).__module__.startswith("fp8")]))
    """
    assert run(program) == "1"


@needs_transformers
def test_registration_survives_a_reload_and_a_second_import():
    program = """
        import importlib
        import fp8
        import transformers.integrations.moe as moe
        importlib.reload(moe)
        print("fp8" in moe.ALL_EXPERTS_FUNCTIONS)
        for name in [name for name in sys.modules if name.startswith("transformers.integrations")]:
            del sys.modules[name]
        again = importlib.import_module("transformers.integrations.moe")
        print(again is not moe and "fp8" in again.ALL_EXPERTS_FUNCTIONS)
        importlib.reload(fp8)
        print(len([f for f in sys.meta_path if type(f).__module__.startswith("fp8")]))
    """
    assert run(program) == "True\nTrue\n1"


@needs_transformers
def test_registration_goes_along_with_other_hooks():
    """A hook in front that looks the module up through the others, as tracers do."""
    program = """
        import importlib.util
        import fp8
        class Tracer:
            def find_spec(self, name, path=None, target=None):
                if name == "transformers.integrations.moe":
                    for finder in sys.meta_path:
                        if finder is not self:
                            spec = finder.find_spec(name, path, target)
                            if spec is not None:
                                return spec
        sys.meta_path.insert(0, Tracer())
        spec = importlib.util.find_spec("transformers.integrations.moe")  # looked up, not loaded
        assert spec.loader.get_source("transformers.integrations.moe")
        assert "transformers.integrations.moe" not in sys.modules
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        print("fp8" in ALL_EXPERTS_FUNCTIONS)
    """
    assert run(program) == "True"


@needs_transformers
def test_registration_while_another_thread_imports():
    program = """
        import threading
        threads = [
            threading.Thread(target=lambda: __import__("transformers.integrations.moe")),
            threading.Thread(target=lambda: __import__("fp8")),
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
            import transformers.integrations.moe
        except ModuleNotFoundError as error:
            print(error)
    """
    assert run(program) == "1 linear: 1 in FP8 (\ntransformers"


def test_registration_where_transformers_is_too_old(tmp_path):
    """A transformers without the registry: nothing is registered, and nothing fails."""
    package = tmp_path / "transformers" / "integrations"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "moe.py").write_text("VALUE = 3\n")
    program = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import fp8
        import transformers.integrations.moe as moe
        print(moe.VALUE, fp8.transformers_hook.register())
    """
    assert run(program) == "3 False"


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
            import transformers.integrations.moe
        except ImportError as error:
            print(error)
        with open({str(package / "moe.py")!r}, "w") as file:
            file.write("class ExpertsInterface:\\n    register = staticmethod(print)\\n")
        import importlib
        importlib.invalidate_caches()
        import transformers.integrations.moe
    """
    lines = run(program).splitlines()
    assert lines[0] == "not yet"
    assert lines[1].startswith("fp8 <function forward at")
    assert len(lines) == 2
