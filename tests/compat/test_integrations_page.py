"""Every snippet of docs/integrations.md runs as it stands there, and does what its section says."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from converted import converted_layers
from torch import nn

import fp8
from fp8.conversion import _expert_rules, _rules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def blocks(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def nothing_is_small(setattr: Callable[[Any, str, Any], None]) -> None:
    """The default rules take layers of any size: the snippets have no filter."""
    setattr(_rules, "MIN_MEAN_SIZE", 0)
    setattr(_rules, "MIN_WORK", MappingProxyType(dict.fromkeys(fp8.RECIPES, 0)))
    setattr(_expert_rules, "MIN_EXPERTS_WORK", 0)


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    nothing_is_small(monkeypatch.setattr)


def run(section: str, names: dict[str, Any], which: int = 0) -> dict[str, Any]:
    """The names that there are once a snippet has run with these."""
    space = {"fp8": fp8, "torch": torch} | names
    exec(compile(blocks(section)[which], f"docs/integrations.md, {section}", "exec"), space)
    return space


def recipes(model: nn.Module) -> set[str]:
    return {layer.recipe for layer in converted_layers(model).values()}


def test_page_has_no_snippet_that_is_not_run_here():
    text = Path(__file__).read_text()
    for section in SECTIONS:
        for language, count in (("python", 2), ("yaml", 1), ("text", 1)):
            found = len(blocks(section, language))
            assert found <= count
            if found:
                assert f'"{section}"' in text, section
    assert not re.search(r"^```(?!python|yaml|text|\n)", PAGE, re.MULTILINE)


def test_page_names_the_versions_that_are_tested():
    files = [ROOT / "requirements.txt", ROOT / "requirements-compat.txt"]
    lines = "".join(file.read_text() for file in files).splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    rows = re.findall(r"^\| \[([\w-]+)\]\(.*?\) \| (\S+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 8
    for file in (ROOT / "python/fp8/integrations").rglob("*.py"):  # in their ImportErrors
        rows += re.findall(r'"([\w-]+)", "([\d.]+)", error\)', file.read_text())
    assert len(rows) == 8 + 7
    for package, version in rows:
        assert pinned[package] == version, package


def test_snippet_of_trainer(tmp_path):
    import transformers
    from test_trainer import Texts
    from tiny_transformers import make

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    names = {"Trainer": transformers.Trainer, "model": make("llama"), "args": args}
    done = run("Trainer and TRL", names | {"data": Texts()})
    assert recipes(done["model"]) == {"rowwise"}
    assert done["trainer"].state.global_step == 2


def test_snippet_of_from_pretrained(tmp_path):
    from tiny_transformers import make
    from transformers import AutoModelForCausalLM

    make("llama").save_pretrained(tmp_path)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "name": str(tmp_path)}
    assert recipes(run("from_pretrained", names)["model"]) == {"rowwise"}
    asked = re.search(r"`(\{.*?\})`", SECTIONS["from_pretrained"])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=eval(asked[1]) if asked else None
    )
    assert recipes(model) == {"rowwise"}


def test_snippet_of_experts(tmp_path):
    from tiny_transformers import make
    from transformers import AutoModelForCausalLM

    make("mixtral").save_pretrained(tmp_path)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "mixture": str(tmp_path)}
    done = run("Experts of transformers' mixtures", names)
    assert "2 in FP8" in fp8.summary(done["model"])


def test_snippet_of_peft():
    import peft
    from tiny_transformers import inputs, make

    class Optimizer:
        """Notes that it was asked."""

        steps = 0

        def step(self) -> None:
            self.steps += 1

    names = {"peft": peft, "model": make("llama"), "micro_batches": [inputs("llama")] * 2}
    done = run("PEFT", names | {"optimizer": Optimizer()})
    assert any("base_layer" in name for name in converted_layers(done["model"]))
    grads = {n for n, p in done["model"].named_parameters() if p.grad is not None}
    assert grads
    assert all("lora_" in name for name in grads)
    assert done["optimizer"].steps == 1


def test_snippet_of_accelerate():
    from accelerate import Accelerator

    model = nn.Sequential(nn.Linear(64, 64))
    names = {
        "Accelerator": Accelerator,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": torch.utils.data.DataLoader(torch.randn(8, 64), batch_size=4),
    }
    done = run("accelerate", names)
    for batch in done["batches"]:
        done["accelerator"].backward(done["model"](batch).square().mean())
        done["optimizer"].step()
    assert recipes(done["model"]) == {"tensorwise"}


def test_snippet_of_lightning(tmp_path):
    import lightning
    from test_lightning import Task, batches

    settings = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }
    names = {"lightning": lightning, "task": Task(), "batches": batches(), "settings": settings}
    done = run("Lightning", names)
    assert recipes(done["task"]) == {"rowwise"}
    assert len(done["task"].seen) == 2


def test_snippet_of_fabric():
    import lightning

    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"lightning": lightning, "model": model, "optimizer": optimizer}
    done = run("Lightning", names, which=1)
    done["fabric"].backward(done["model"](torch.randn(4, 64)).float().sum())
    done["optimizer"].step()
    assert recipes(done["model"]) == {"rowwise"}


def test_snippet_of_torchtitan():
    from test_torchtitan import model_config, overridden

    (line,) = blocks("torchtitan", "text")
    option, token = shlex.split(line)
    assert option == "--override.imports"
    config = overridden(token, config=model_config(2048, 4096))
    assert config.layers[0].up.recipe == "rowwise"


def test_snippet_of_axolotl():
    (text,) = blocks("axolotl", "yaml")
    given = yaml.safe_load(text)
    for plugin in given.pop("plugins"):
        module, _, name = plugin.rpartition(".")
        assert getattr(importlib.import_module(module), name).__name__ == "Plugin"
    from fp8.integrations.axolotl import FP8Args

    assert FP8Args(**given).fp8_recipe == "rowwise"
    assert given.keys() == FP8Args.model_fields.keys()


@pytest.mark.parametrize("section", ["DeepSpeed", "Megatron-Core"])
def test_snippets_that_need_process_groups_are_run(section):
    """In processes of their own, by these programs."""
    program = {"DeepSpeed": "zero_program.py", "Megatron-Core": "megatron_program.py"}[section]
    assert f'snippet("{section}")' in (Path(__file__).parent / program).read_text()


def snippet(section: str) -> str:
    (text,) = blocks(section)
    return text


def test_links_of_the_page_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", s.lower()).replace(" ", "-") for s in SECTIONS}
    for target in re.findall(r"\]\(#([\w-]+)\)", PAGE):
        assert target in headings
    for name in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / name).exists()
