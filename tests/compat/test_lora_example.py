"""examples/lora.py, tiny, and the adapters on the page docs/checkpoints.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from lora_models import layers
from tiny_transformers import inputs, make

import fp8

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import lora  # noqa: E402


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_example_trains_saves_and_merges_adapters(recipe, capsys):
    assert lora.main(["--size", "tiny", "--device", "cpu", "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    found = {line.split()[0]: line for line in printed.splitlines()}
    before, after = map(float, re.findall(r"\d\.\d{3}", found["loss"]))
    assert after < before - 0.1
    losses = {
        key: float(found[key].split()[1].rstrip(":")) for key in ("loaded", "merged", "apart")
    }
    assert losses["loaded"] == losses["apart"] == after
    # Merging rounds a sum once more: of a loss that is near a minimum, little.
    assert abs(losses["merged"] - after) < 0.02
    assert "14 layers" in found["base"]
    assert "14 frozen layers" in found["result"]


def test_adapters_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs/checkpoints.md").read_text()
    section = re.search(r"^## LoRA\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    code = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(tmp_path)
    given = inputs("llama")
    space = {"fp8": fp8, "model": make("llama"), "base": fp8.freeze(make("llama"))}
    space["train"] = lambda model: model(**given).loss.backward()
    exec(compile(code[0], "docs/checkpoints.md", "exec"), space)
    assert layers(space["model"])
    assert not any("lora_" in name for name, _ in space["model"].named_parameters())
