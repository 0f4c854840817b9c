"""from_pretrained with ConvertConfig: FP8 layers around weights in high precision, and no trace of
them in what the model saves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import two_processes
from converted import convert, converted_layers, every, relative, step
from tiny_transformers import loss, make
from torch import nn

import fp8
from fp8.integrations.transformers import ConvertConfig


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **more: object) -> str:
    make(family, dtype, **more).save_pretrained(folder)
    return str(folder)


def load(folder: str, config: object = None, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, **options
    ).train()


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_model_is_the_converted_one(family, dtype, tmp_path):
    """What is chosen and fused before the weights are there is what convert chooses after."""
    folder = saved(family, tmp_path, dtype)
    model = load(folder, ConvertConfig("rowwise", filter=every), dtype=dtype)
    expected = convert(load(folder, dtype=dtype), "rowwise")
    assert fp8.summary(model) == fp8.summary(expected)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ours, theirs = step(model, loss(family)), step(expected, loss(family))
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in theirs.grads.items())


PLAIN = """
    import json, sys
    import torch, transformers

    class NoFP8:
        def find_spec(self, name, path=None, target=None):
            assert name.partition(".")[0] != "fp8", "fp8 is imported"

    sys.meta_path.insert(0, NoFP8())
    for folder in sys.argv[1:]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        quantized = hasattr(model, "hf_quantizer") or hasattr(model.config, "quantization_config")
        print(json.dumps({
            "classes": sorted({type(m).__module__ + "." + type(m).__name__ for m in linears}),
            "implementation": model.config._experts_implementation,
            "quantized": quantized,
            "keys": sorted(model.state_dict()),
            "sum": sum(float(p.double().sum()) for p in model.parameters()),
        }))
"""


def load_without_fp8(folders: list[str]) -> list[dict[str, object]]:
    """What a process in which fp8 cannot be imported says of the models."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAIN), *folders],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_saved_model_has_no_trace_of_fp8(tmp_path):
    models = {}
    for family in ("llama", "mixtral"):
        folder = tmp_path / family
        model = load(saved(family, folder / "a"), ConvertConfig(filter=every))
        converted_layers(model)
        loss(family)(model).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.save_pretrained(folder / "b")
        texts = [path.read_text().lower() for path in (folder / "b").glob("*.json")]
        assert len(texts) >= 1
        for text in texts:
            assert "fp8" not in text
            assert "quant" not in text
        files = [safetensors.torch.load_file(folder / x / "model.safetensors") for x in "ab"]
        dtypes = [{name: t.dtype for name, t in file.items()} for file in files]
        assert dtypes[0] == dtypes[1]
        models[str(folder / "b")] = model
    for again, model in zip(load_without_fp8(list(models)), models.values(), strict=True):
        assert again["classes"] == ["torch.nn.modules.linear.Linear"]
        assert again["implementation"] != "fp8"
        assert again["quantized"] is False
        assert again["keys"] == sorted(model.state_dict())
        total = sum(float(p.detach().double().sum()) for p in model.parameters())
        assert again["sum"] == pytest.approx(total, rel=1e-12)


def test_loaded_model_is_like_any_other(tmp_path):
    """Nothing says that it is quantized: casting is allowed, Trainer asks for no adapters."""
    folder = saved("llama", tmp_path)
    model = load(folder, ConvertConfig(filter=every))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert next(model.half().parameters()).dtype == torch.float16
    assert "fp8" not in repr(model.config).lower()


def test_device_map_with_offloading(tmp_path):
    """accelerate's hooks come after the conversion."""
    folder = saved("llama", tmp_path / "a")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(
        folder,
        ConvertConfig("rowwise", filter=every),
        device_map=places,
        offload_folder=str(tmp_path / "b"),
    ).eval()
    expected = convert(load(folder), "rowwise").eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert len(converted_layers(model)) == len(converted_layers(expected))


def test_tensor_parallel_plan(tmp_path):
    """Two processes, each with half of the rows or columns of a layer: its error is FP8's."""
    saved("llama", tmp_path / "model", num_key_value_heads=2)
    for result in two_processes.run("tp_program.py", tmp_path):
        loss, grads = result["parallel"]
        _, one_grads = result["one process"]
        exact_loss, exact = result["linear"]
        whole, local = result["one process, shapes"], result["parallel, shapes"]
        assert [math.prod(shape) for shape in whole] == [2 * math.prod(shape) for shape in local]
        assert loss == pytest.approx(float(exact_loss), rel=0.03)
        assert grads.keys() == exact.keys()
        ours, ones, theirs = (
            torch.cat([each[name].double().flatten() for name in exact])
            for each in (grads, one_grads, exact)
        )
        assert 0 < relative(ours, theirs) < 1.3 * relative(ones, theirs)


def test_config_as_a_dict(tmp_path):
    """As command lines and YAML files have it; the classes must have been named once."""
    folder = saved("llama", tmp_path)
    given = {"quant_method": "fp8_convert", "recipe": "rowwise", "fuse": False, "filter": every}
    model = load(folder, given)
    assert {layer.recipe for layer in converted_layers(model).values()} == {"rowwise"}


def test_config_can_be_printed():
    """transformers logs it as JSON: a filter is no JSON."""
    text = repr(ConvertConfig(fp8.Recipe("rowwise", power_of_two=True), filter=every))
    assert '"recipe": "rowwise:power_of_two"' in text
    assert "every" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "e4m3"}, ValueError, "e4m3"),
        ({"modules_to_not_convert": ["a"]}, TypeError, "ConvertConfig: unknown option 'modules_to"),
    ],
)
def test_config_says_at_once_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvertConfig(**arguments)


def test_checkpoint_that_is_quantized_is_refused(tmp_path):
    """By another method: transformers says so. By ours, which none is: this library does."""
    folder = saved("llama", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    theirs = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for method, message in ((theirs, "FineGrainedFP8Config"), ({}, "which no checkpoint has")):
        file.write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "fp8_convert"} | method})
        )
        with pytest.raises(ValueError, match=message):
            load(folder, ConvertConfig(filter=every))
