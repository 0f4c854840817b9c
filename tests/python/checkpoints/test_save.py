"""fp8.save and fp8.export_weights: the bits of the forward, in files that fp8.load reads again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoint_files import FORMATS, checkpoint, model, raw, write
from reference import assert_same_bits
from torch import nn

import fp8

RECIPES = (
    *("tensorwise", "rowwise", "blockwise"),
    *("tensorwise:power_of_two", "rowwise:power_of_two", "blockwise:power_of_two"),
)
FITTING = [
    (format, recipe)
    for format in ("compressed-tensors", "fp8")
    for recipe in RECIPES
    if format != "fp8" or not recipe.startswith("rowwise")
]


def linears(module, name):
    return name.startswith("layers")


def assert_same_layers(actual: nn.Module, expected: nn.Module) -> None:
    """The same values in the same layers, which may have other names for their scales."""
    for name, layer in expected.named_modules():
        other = actual.get_submodule(name)
        if type(layer) is fp8.FrozenLinear:
            assert type(other) is fp8.FrozenLinear, name
            assert_same_bits(other.weight.detach(), layer.weight.detach(), name)
            assert raw(other.scales.detach()) == raw(layer.scales.detach()), name
            assert other.granularity == layer.granularity
            assert other.input_granularity == layer.input_granularity
            assert (other.static_scale is None) == (layer.static_scale is None)
            if layer.static_scale is None:
                assert other.power_of_two == layer.power_of_two
            else:
                assert raw(other.static_scale.detach()) == raw(layer.static_scale.detach())
        for key, value in layer.named_parameters(recurse=False):
            if "scale" not in key:
                assert_same_bits(getattr(other, key).detach(), value.detach(), f"{name}.{key}")


@pytest.mark.parametrize(("format", "recipe"), FITTING)
@pytest.mark.parametrize("shard", [10_000_000, 30_000])
def test_saved_model_is_loaded_with_its_bits(format, recipe, shard, tmp_path):
    source = fp8.freeze(model(), recipe, filter=linears)
    fp8.save(source, tmp_path / "a", format, max_shard_size=shard)
    assert (tmp_path / "a/model.safetensors.index.json").exists() == (shard == 30_000)
    target = model()
    done = fp8.load(target, tmp_path / "a")
    assert len(done.frozen) == 3
    assert_same_layers(target, source)
    for layer, other in zip(source["layers"], target["layers"], strict=True):
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        assert_same_bits(other(x), layer(x))
    fp8.save(target, tmp_path / "b", format, max_shard_size=shard)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_loaded_is_saved_with_its_bits(format, tmp_path):
    tensors, weights = checkpoint(format)
    source = model()
    fp8.load(source, write(tmp_path / "a", tensors))
    kind = weights[0].granularity
    for out in ("compressed-tensors", "fp8") if kind != "rowwise" else ("compressed-tensors",):
        fp8.save(source, tmp_path / out, out)
        target = model()
        fp8.load(target, tmp_path / out)
        assert_same_layers(target, source)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format", [None, "compressed-tensors"])
def test_exported_weights_are_those_of_the_forward(recipe, format):
    """Of a converted model, without freezing it: those that freezing it would hold."""
    source = fp8.convert(model(), recipe, filter=linears)
    before = copy.deepcopy(source.state_dict())
    exported = dict(fp8.export_weights(source, format=format))
    for name, value in source.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert type(source["layers"][0]) is fp8.Linear
    frozen = fp8.freeze(copy.deepcopy(source))
    expected = dict(fp8.export_weights(frozen, format=format))
    assert list(exported) == list(expected)
    for name, value in expected.items():
        assert_same_bits(exported[name], value, name)
    assert exported["layers.0.weight"].dtype == torch.float8_e4m3fn
    assert exported["embed.weight"].dtype == torch.bfloat16


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 48), nn.Linear(32, 16)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


def test_exported_weights_share_the_scale_that_the_forward_shares():
    source = fp8.convert(Siblings(), "tensorwise", filter=lambda module, name: True)
    exported = dict(fp8.export_weights(source))
    assert_same_bits(exported["q.weight_scale"], exported["k.weight_scale"])
    frozen = fp8.freeze(source)
    assert_same_bits(exported["k.weight"], frozen.k.weight.detach())


def test_export_of_a_static_scale_and_of_buffers():
    source = fp8.convert(model(), "tensorwise", filter=linears)
    source["layers"][0].input_scale = torch.tensor(0.25)
    source["norm"].register_buffer("kept", torch.ones(2))
    source["norm"].register_buffer("passing", torch.ones(2), persistent=False)
    exported = dict(fp8.export_weights(source))
    assert_same_bits(exported["layers.0.input_scale"], torch.tensor([0.25]))
    assert "norm.kept" in exported
    assert "norm.passing" not in exported
    named = dict(fp8.export_weights(source, format="fp8"))
    assert_same_bits(named["layers.0.activation_scale"], torch.tensor(0.25))
    assert named["layers.1.weight_scale_inv"].shape == ()
    named = dict(fp8.export_weights(source, format="compressed-tensors"))
    assert_same_bits(named["layers.0.input_scale"], torch.tensor([0.25]))


def test_export_gives_tied_weights_once():
    names = [name for name, _ in fp8.export_weights(model(tied=True))]
    assert "embed.weight" in names
    assert "lm_head.weight" not in names


def test_save_keeps_tied_weights_and_what_is_not_converted(tmp_path):
    source = fp8.freeze(model(tied=True), filter=lambda module, name: True)
    fp8.save(source, tmp_path)
    target = model(tied=True)
    fp8.load(target, tmp_path)
    assert_same_layers(target, source)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("recipe", "weights", "inputs"),
    [
        ("tensorwise", {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}),
        ("rowwise", {"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        (
            "blockwise",
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
    ],
)
def test_config_of_compressed_tensors(recipe, weights, inputs, tmp_path):
    fp8.save(fp8.freeze(model(), recipe, filter=linears), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["weights"] == float8 | weights | {"dynamic": False}
    assert group["input_activations"] == float8 | inputs


def test_config_of_compressed_tensors_with_several_groups(tmp_path):
    source = fp8.freeze(model(), "rowwise", filter=lambda module, name: name == "layers.0")
    fp8.freeze(source, "blockwise", filter=lambda module, name: name == "layers.1")
    fp8.save(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["layers.0"], ["layers.1"]]
    assert config["ignore"] == ["layers.2", "lm_head"]
    with pytest.raises(ValueError, match="scale per row, which the format 'fp8' has not"):
        fp8.save(source, tmp_path / "other", "fp8")


@pytest.mark.parametrize(
    ("recipe", "static", "size", "scheme"),
    [
        ("blockwise", False, [128, 128], "dynamic"),
        ("tensorwise", False, None, "dynamic"),
        ("tensorwise", True, None, "static"),
    ],
)
def test_config_of_fp8(recipe, static, size, scheme, tmp_path):
    source = fp8.convert(model(), recipe, filter=linears)
    for layer in source["layers"] if static else ():
        layer.input_scale = torch.tensor(0.5)
    fp8.save(source, tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": scheme,
        "weight_block_size": size,
        "modules_to_not_convert": ["lm_head"],
    }


def test_saved_files_are_what_the_safetensors_package_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = fp8.freeze(model(), "blockwise", filter=linears)
    fp8.save(source, tmp_path, "fp8")
    found = safetensors.load_file(tmp_path / "model.safetensors")
    exported = dict(fp8.export_weights(source, format="fp8"))
    assert found.keys() == exported.keys()
    for name, value in exported.items():
        assert_same_bits(found[name], value.contiguous(), name)


def test_save_refuses_and_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"fp8.save: expected a torch.nn.Module"):
        fp8.save({}, tmp_path)
    with pytest.raises(ValueError, match=r"expected a format out of .* got 'gguf'"):
        fp8.save(model(), tmp_path, "gguf")
    with pytest.raises(ValueError, match="has no FP8 weight"):
        fp8.save(model(), tmp_path)
    frozen = fp8.freeze(model(), "rowwise", filter=linears)
    with pytest.raises(ValueError, match=r"layers.0 has a scale per row, which the format 'fp8'"):
        fp8.save(frozen, tmp_path, "fp8")
    with torch.device("meta"):
        empty = model()
    with pytest.raises(ValueError, match=r"'embed.weight' is on the meta device"):
        fp8.save(fp8.freeze(empty, filter=linears), tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "old.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"old.safetensors is there already"):
        fp8.save(frozen, tmp_path)
    with pytest.raises(ValueError, match="expected a format out of"):
        fp8.export_weights(frozen, format="gguf")


def test_save_that_is_cut_off_leaves_no_file(tmp_path, monkeypatch):
    source = fp8.convert(model(), "rowwise", filter=linears)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8.checkpoints._export.quantized_together", fails)
    with pytest.raises(KeyboardInterrupt):
        fp8.save(source, tmp_path)
    assert not any(tmp_path.iterdir())


def test_metadata_of_a_file_that_means_nothing(tmp_path):
    from checkpoint_files import file_of

    for text in ("{", "[1]", '{"a": 1}', '{"a": ["x", true]}', '{"a": [["rowwise"], 1]}'):
        file = tmp_path / "model.safetensors"
        file.write_bytes(file_of({"a": torch.ones(1)}, {"format": "pt", "fp8_inputs": text}))
        with pytest.raises(ValueError, match="its metadata 'fp8_inputs' means nothing"):
            fp8.load(nn.Linear(1, 1), tmp_path)


def test_metadata_that_does_not_go_with_the_weight(tmp_path):
    from checkpoint_files import codes, file_of, scales

    tensors = {"0.weight": codes(8, 16), "0.weight_scale": scales(8, 1)}
    metadata = {"format": "pt", "fp8_inputs": '{"0": ["blockwise", false]}'}
    (tmp_path / "model.safetensors").write_bytes(file_of(tensors, metadata))
    with pytest.raises(ValueError, match=r"'0.weight' is scaled rowwise, and .* blockwise of its"):
        fp8.load(nn.Sequential(nn.Linear(16, 8, bias=False)), tmp_path)
