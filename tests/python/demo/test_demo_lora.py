"""examples/lora.py where peft is missing; tests/compat/test_lora_example.py has it."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")

import lora


def test_demo_lora_says_how_to_install_peft(monkeypatch, capsys):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    assert lora.main(["--size", "tiny", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "needs the package peft: pip install" in printed.err
    assert not printed.out
    versions = [word for word in lora.NEEDED.replace(",", " ").split() if "==" in word]
    pinned = Path(lora.__file__).parents[1] / "requirements-compat.txt"
    assert len(versions) == 3
    assert set(versions) <= set(pinned.read_text().split())
