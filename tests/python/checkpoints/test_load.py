"""fp8.load: every format of a dense checkpoint, with the bytes of its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import FORMATS, SIZES, checkpoint, model, raw, scales, write
from reference import assert_same_bits, decode, expand_scale
from torch import nn

import fp8


def quantization(format: str) -> dict | None:
    method = FORMATS[format][0]
    return None if method is None else {"quant_method": method}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("meta", [False, True])
def test_load_has_the_bytes_of_the_file(format, shards, meta, tmp_path):
    tensors, weights = checkpoint(format)
    folder = write(tmp_path, tensors, quantization(format), shards)
    with torch.device("meta" if meta else "cpu"):
        target = model()
    done = fp8.load(target, folder)
    assert done.frozen == ("layers.0", "layers.1", "layers.2")
    assert not done.dequantized
    for i, weight in enumerate(weights):
        layer = target["layers"][i]
        source = next(
            v for name, v in weight.tensors.items() if name in ("weight", "_weight_qdata")
        )
        assert type(layer) is fp8.FrozenLinear
        assert raw(layer.weight.detach()) == raw(source)
        assert layer.granularity == weight.granularity
        assert raw(layer.scales.detach()) == raw(weight.scales)
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.device.type == "cpu"
        if weight.static is None:
            assert layer.static_scale is None
            expected = "blockwise" if weight.granularity == "blockwise" else "rowwise"
            assert layer.input_granularity == expected
        else:
            assert_same_bits(layer.static_scale.detach(), torch.tensor(weight.static))
        if i < 2:
            assert raw(layer.bias.detach()) == raw(tensors[f"layers.{i}.bias"])
    for name in ("embed.weight", "norm.weight", "norm.bias", "lm_head.weight"):
        assert raw(target.get_parameter(name).detach()) == raw(tensors[name])


@pytest.mark.parametrize("format", FORMATS)
def test_load_computes_what_the_numbers_say(format, tmp_path):
    """Against code · scale in float64, by what rounding x to four bits may do."""
    tensors, weights = checkpoint(format)
    target = model()
    fp8.load(target, write(tmp_path, tensors), static_inputs=False)
    for layer, weight, (k, _) in zip(target["layers"], weights, SIZES, strict=True):
        exact = decode(layer.weight) * expand_scale(
            layer.scales.detach().reshape(weight.scales.shape if weight.granularity == "blockwise"
                                          else (-1, 1) if weight.granularity == "rowwise" else ()),
            layer.weight.shape,
        ).double()  # fmt: skip
        x = torch.randn(8, k, dtype=torch.bfloat16)
        expected = x.double() @ exact.t()
        if layer.bias is not None:
            expected += layer.bias.double()
        error = (layer(x).double() - expected).norm() / expected.norm()
        assert error < 2**-4
        assert layer.static_scale is None


def test_load_keeps_parameters_that_are_there(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    target = model()
    embed, bias = target["embed"].weight, target["layers"][0].bias
    layer = target["layers"][0]
    fp8.load(target, write(tmp_path, tensors))
    assert target["embed"].weight is embed
    assert target["layers"][0] is layer
    assert layer.bias is bias


def test_load_casts_what_is_in_high_precision_to_the_models_dtype(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    target = model(torch.float32)
    fp8.load(target, write(tmp_path, tensors))
    assert target["embed"].weight.dtype == torch.float32
    assert target["layers"][0].bias.dtype == torch.float32
    assert target["layers"][0].compute_dtype == torch.float32
    assert target["layers"][0](torch.randn(2, 160)).dtype == torch.float32


@pytest.mark.parametrize("meta", [False, True])
def test_load_keeps_tied_weights_tied(meta, tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    del tensors["lm_head.weight"]
    with torch.device("meta" if meta else "cpu"):
        target = model()
        target["embed"] = nn.Embedding(20, 48, dtype=torch.bfloat16)
        target["lm_head"].weight = target["embed"].weight
    fp8.load(target, write(tmp_path, tensors))
    assert target["lm_head"].weight is target["embed"].weight
    assert raw(target["embed"].weight.detach()) == raw(tensors["embed.weight"])


def test_load_dequantizes_where_there_is_no_linear(tmp_path):
    """And where a weight has two places: codes times scale, rounded once."""
    tensors, _ = checkpoint("fp8, blocks")
    del tensors["lm_head.weight"]
    codes = torch.randn(20, 48).to(torch.float8_e4m3fn)
    scale = scales(20, 1)
    tensors |= {"embed.weight": codes, "embed.weight_scale": scale}
    target = model()
    target["lm_head"].weight = target["embed"].weight
    done = fp8.load(target, write(tmp_path, tensors))
    assert done.dequantized == ("embed.weight",)
    assert "1 parameters dequantized" in str(done)
    assert_same_bits(target["embed"].weight.detach(), (codes.float() * scale).bfloat16())


def test_load_takes_no_static_scale_beside_blocks(tmp_path):
    """Whose product wants x in blocks."""
    tensors, _ = checkpoint("fp8, blocks")
    tensors["layers.1.input_scale"] = torch.ones(())
    target = model()
    fp8.load(target, write(tmp_path, tensors))
    assert target["layers"][1].static_scale is None
    assert target["layers"][1].input_granularity == "blockwise"


def test_load_passes_over_scales_of_a_cache(tmp_path):
    tensors, _ = checkpoint("ModelOpt")
    for name in ("self_attn.k_scale", "k_proj.k_scale", "attn.kv_scale", "q_proj.output_scale"):
        tensors[name] = torch.ones(())
    done = fp8.load(model(), write(tmp_path, tensors))
    assert len(done.passed_over) == 4
    assert not done.unexpected


def test_load_of_a_file_and_of_files_without_an_index(tmp_path):
    tensors, weights = checkpoint("fp8, blocks")
    folder = write(tmp_path, tensors, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    target = model()
    fp8.load(target, folder)
    assert raw(target["layers"][2].weight.detach()) == raw(weights[2].tensors["weight"])
    single = write(tmp_path / "single", tensors) / "model.safetensors"
    target = model()
    fp8.load(target, single)
    assert raw(target["layers"][2].weight.detach()) == raw(weights[2].tensors["weight"])


def test_load_renames_and_reports_progress(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    renamed = {f"model.{name}": value for name, value in tensors.items()} | {
        "visual.weight": torch.ones(2)
    }
    seen = []
    done = fp8.load(
        model(),
        write(tmp_path, renamed),
        rename=lambda name: name.removeprefix("model.") if name.startswith("model.") else None,
        progress=lambda i, n: seen.append((i, n)),
    )
    assert len(done.frozen) == 3
    assert seen[-1] == (len(seen), len(seen))
    assert len(seen) == 3 + 6


def test_load_into_a_frozen_model_replaces_its_codes(tmp_path):
    tensors, weights = checkpoint("fp8, tensor, static")
    target = fp8.freeze(model(), "blockwise")
    fp8.load(target, write(tmp_path, tensors))
    layer = target["layers"][0]
    assert [*layer._parameters] == ["weight", "weight_scale_inv", "activation_scale", "bias"]
    assert layer.granularity == "tensorwise"
    assert layer.compute_dtype == torch.bfloat16
    assert raw(layer.weight.detach()) == raw(weights[0].tensors["weight"])


def test_load_into_a_converted_model(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    target = fp8.convert(model(), "tensorwise", filter=lambda module, name: True)
    fp8.load(target, write(tmp_path, tensors))
    assert type(target["layers"][0]) is fp8.FrozenLinear
    assert type(target["lm_head"]) is fp8.Linear


def test_load_leaves_no_view_of_the_file(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    target = model()
    folder = write(tmp_path, tensors)
    fp8.load(target, folder)
    before = {name: raw(value) for name, value in target.state_dict().items()}
    file = folder / "model.safetensors"
    with open(file, "r+b") as stream:  # in place: a map would show it
        stream.write(b"\0" * file.stat().st_size)
    assert {name: raw(value) for name, value in target.state_dict().items()} == before


def test_load_in_inference_mode_makes_tensors_like_any_other(tmp_path):
    tensors, _ = checkpoint("AutoFP8, static")
    with torch.device("meta"):
        target = model()
    with torch.inference_mode():
        fp8.load(target, write(tmp_path, tensors))
    assert not any(p.is_inference() for p in target.parameters())


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def test_load_takes_the_memory_of_the_model_and_one_tensor(tmp_path):
    size = 2048
    tensors = {f"{i}.weight": torch.zeros(size, size).to(torch.float8_e4m3fn) for i in range(8)}
    tensors |= {f"{i}.weight_scale": torch.ones(size, 1) for i in range(8)}
    folder = write(tmp_path, tensors)
    del tensors
    with torch.device("meta"):
        layers = [nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(8)]
    before, most = anonymous_memory(), []
    fp8.load(
        nn.Sequential(*layers),
        folder,
        progress=lambda done, of: most.append(anonymous_memory() - before - done * size**2),
    )
    assert max(most) < size**2


def test_load_not_strict_reports(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    del tensors["norm.weight"]
    tensors["other.weight"] = torch.ones(3)
    folder = write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"1 missing \('norm.weight'\); 1 unexpected \('other"):
        fp8.load(model(), folder)
    done = fp8.load(model(), folder, strict=False)
    assert (done.missing, done.unexpected) == (("norm.weight",), ("other.weight",))
    assert "1 missing; 1 unexpected" in str(done)


def test_load_rows_of_32_columns(tmp_path):
    """A scale for 32 elements is a row's there, and no MXFP8."""
    frozen = fp8.FrozenLinear.from_linear(nn.Linear(32, 48, bias=False), "rowwise")
    fp8.save(nn.Sequential(frozen), tmp_path)
    target = nn.Sequential(nn.Linear(32, 48, bias=False))
    fp8.load(target, tmp_path)
    assert raw(target[0].weight.detach()) == raw(frozen.weight.detach())
    assert target[0].granularity == "rowwise"
