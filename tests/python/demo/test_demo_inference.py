"""make demo-inference, tiny: what it prints, and a decoder that a CUDA graph could hold."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fp8

pytest.importorskip("transformers", minversion="5.0")

import generate as demo
from stdlib_text import load_text

CPU = torch.device("cpu")
JOB = demo.JOBS["tiny"]


@pytest.fixture(scope="module")
def model():
    return demo.trained(JOB, load_text(), CPU)


@pytest.fixture
def prompt():
    return load_text().held_out[None, : JOB.prompt].long()


def run(*arguments: str) -> tuple[int, str]:
    """(exit status, standard output) of a tiny run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = demo.main(["--size", "tiny", "--device", "cpu", *arguments])
    return status, printed.getvalue()


def rows(printed: str) -> dict[str, list[str]]:
    """The cells behind the name of each model."""
    lines = [re.split(r" {2,}", line.strip()) for line in printed.splitlines() if "eager" in line]
    return {name: cells for name, *cells in lines}


def decibels(cells: list[str]) -> float:
    return float(cells[-1].removesuffix(" dB"))


def test_demo_inference_compares_frozen_models_with_bf16():
    status, printed = run()
    assert status == 0
    found = rows(printed)
    assert list(found) == ["bf16", "fp8 rowwise", "fp8 blockwise"]
    memory = [float(cells[2].removesuffix(" MiB")) for cells in found.values()]
    assert max(memory[1:]) < 0.8 * memory[0]  # embeddings stay
    assert all(float(cells[1]) > 0 for cells in found.values())
    for cells in list(found.values())[1:]:
        # A dozen layers of 26 dB each, on a residual stream that is mostly the embedding.
        assert 25 < decibels(cells) < 80
        assert float(cells[3].removesuffix("%")) > 85
    assert "14 layers" in printed


@pytest.mark.parametrize("saved", ["in bf16", "in fp8"])
def test_demo_inference_loads_a_checkpoint(model, tmp_path, saved):
    if saved == "in fp8":
        fp8.save(fp8.freeze(demo.copy.deepcopy(model)), tmp_path)
    else:
        model.save_pretrained(tmp_path)
    status, printed = run("--model", str(tmp_path), "--recipes", "rowwise")
    assert status == 0
    assert list(rows(printed))[1:] == ["fp8 as loaded" if saved == "in fp8" else "fp8 rowwise"]
    assert "trained" not in printed
    assert decibels(list(rows(printed).values())[1]) > 25


class NothingIsAskedOfTheDevice(TorchDispatchMode):
    """Operators that wait for a device or copy from the host, neither of which a capture allows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [None, "rowwise", "blockwise"])
def test_demo_decoder_gives_the_tokens_of_generate(model, prompt, recipe):
    own = demo.copy.deepcopy(model).float()  # attention over a fixed cache sums in another order
    if recipe:
        fp8.freeze(own, recipe)
    decoder = demo.Decoder(own, 64)
    expected = demo.eager(own, prompt, 12)
    assert torch.equal(decoder(prompt, 12), expected)
    assert torch.equal(decoder(prompt, 12), expected)  # nothing is left of the first
    with torch.no_grad(), NothingIsAskedOfTheDevice():
        decoder.step()


def test_demo_thaws_what_codes_stand_for(model):
    frozen = fp8.freeze(demo.copy.deepcopy(model))
    thawed = demo.thawed(frozen)
    assert demo.frozen_layers(frozen)
    assert not demo.frozen_layers(thawed)
    name, layer = next(iter(demo.frozen_layers(frozen).items()))
    assert torch.equal(thawed.get_submodule(name).weight, layer.dequantize())


def test_demo_inference_refuses_bad_arguments(capsys, tmp_path):
    for arguments in (["--tokens", "1"], ["--model", str(tmp_path / "none")], ["--recipes", "x"]):
        with pytest.raises(SystemExit) as stop:
            demo.main(arguments)
        assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "--tokens must be at least 2, got 1" in printed
    assert "--model must be a folder" in printed


@pytest.mark.gpu
def test_demo_inference_runs_on_a_gpu():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--size", "tiny", "--device", "cuda"]) == 0
    assert printed.getvalue().count(" graph ") == 3
