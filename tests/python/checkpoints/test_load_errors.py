"""What fp8.load refuses: with an error that names tensor or file, and a model left as it was."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
import torch
from checkpoint_files import checkpoint, codes, file_of, model, scales, write
from reference import assert_same_bits
from torch import nn

import fp8
from fp8.checkpoints._safetensors import read_header

ERRORS = (ValueError, NotImplementedError, FileNotFoundError)


def fails(source, match, error=ValueError, target=None):
    target = model() if target is None else target
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(error, match=match):
        fp8.load(target, source)
    for name, value in target.state_dict().items():
        assert_same_bits(value, before[name], name)


def changed(tmp_path, quantization=None, format="fp8, blocks", **changes):
    """A checkpoint with some tensors of layer 0 replaced; None takes one out."""
    tensors, _ = checkpoint(format)
    for last, value in changes.items():
        tensors[f"layers.0.{last}"] = value
    return write(tmp_path, {n: t for n, t in tensors.items() if t is not None}, quantization)


def test_codes_without_a_scale(tmp_path):
    fails(
        changed(tmp_path, weight_scale_inv=None),
        r"'layers.0.weight' is FP8 \(F8_E4M3\) and has no scale: expected one of "
        r"layers.0.weight_scale, layers.0.weight_scale_inv,",
    )


def test_codes_that_torchao_names_want_the_scale_that_it_names(tmp_path):
    source = changed(tmp_path, format="torchao", _weight_scale=None, weight_scale=scales(144, 1))
    fails(source, "'layers.0._weight_qdata' .* expected one of layers.0._weight_scale")


@pytest.mark.parametrize("shape", [(2, 3), (144, 2), (2,), (1, 144, 1), (160,), (3, 1)])
def test_scale_of_a_shape_that_means_nothing(shape, tmp_path):
    match = r"'layers.0.weight_scale_inv': expected one scale, \[144, 1\] or \[2, 2\]"
    fails(changed(tmp_path, weight_scale_inv=scales(*shape)), match)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_scale_of_another_dtype(dtype, tmp_path):
    scale = torch.ones(2, 2).to(dtype)
    fails(changed(tmp_path, weight_scale_inv=scale), "expected a scale in F32, BF16, F16, F8_E8M0")


def test_mxfp8_by_its_scales(tmp_path):
    exponents = torch.zeros(144, 5, dtype=torch.uint8)
    fails(changed(tmp_path, weight_scale_inv=exponents), r"MXFP8 .* is not supported")
    exponents = exponents.view(torch.float8_e8m0fnu)
    fails(changed(tmp_path, weight_scale_inv=exponents), r"MXFP8 .* is not supported")


def test_static_scale_of_several_elements(tmp_path):
    source = changed(tmp_path, input_scale=scales(160))
    fails(source, r"'layers.0.input_scale': expected a static scale of one element, got \[160\]")


def test_codes_of_another_shape(tmp_path):
    source = changed(tmp_path, weight=codes(144, 161), weight_scale_inv=scales(2, 2))
    fails(
        source, r"'layers.0.weight': expected \[144, 160\], as the model has it, got \[144, 161\]"
    )


def test_amds_float8(tmp_path):
    weight = torch.randn(144, 160).to(torch.float8_e4m3fnuz)
    source = changed(tmp_path, weight=weight, weight_scale_inv=None)
    fails(source, "'layers.0.weight' is in F8_E4M3FNUZ, AMD's float8", NotImplementedError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e5m2])
def test_weights_in_integers_and_other_floats(dtype, tmp_path):
    weight = torch.ones(144, 160).to(dtype)
    source = changed(tmp_path, weight=weight, weight_scale_inv=None)
    fails(source, "'layers.0.weight' is in .*, for bfloat16 in the model", NotImplementedError)


def test_packed_weights(tmp_path):
    source = changed(
        tmp_path,
        {"quant_method": "compressed-tensors"},
        weight=None,
        weight_scale_inv=None,
        weight_packed=torch.zeros(144, 20, dtype=torch.int32),
    )
    match = r"'layers.0.weight_packed' \(I32\) holds the weight of 'layers.0' in compressed-tensors"
    fails(source, match, NotImplementedError)


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "awq"}, "is quantized by 'awq'; FP8 checkpoints of fp8, compressed"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "is in NVFP4, which is not"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "is in W4A16_AWQ"),
    ],
)
def test_foreign_formats_by_their_name(quantization, match, tmp_path):
    fails(changed(tmp_path, quantization), match, NotImplementedError)


def test_modelopts_own_file_is_read(tmp_path):
    folder = changed(tmp_path)
    own = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(own))
    fails(folder, "is in NVFP4", NotImplementedError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    fails(tmp_path, f"{name} is a pickle, .* safe_serialization=True", NotImplementedError)
    fails(tmp_path / name, f"{name} is a pickle", NotImplementedError)


def test_nothing_there(tmp_path):
    fails(tmp_path, r"no \*.safetensors in", FileNotFoundError)
    fails(tmp_path / "none", "expected a folder or a .safetensors file", FileNotFoundError)


def test_high_precision_for_a_frozen_layer(tmp_path):
    weight = torch.randn(144, 160)
    source = changed(tmp_path, weight=weight, weight_scale_inv=None)
    fails(source, "'layers.0.weight' is in F32, for a layer that is frozen", target=frozen())


def frozen():
    return fp8.freeze(model(), filter=lambda module, name: name.startswith("layers"))


def test_buffers_on_meta_that_no_checkpoint_has(tmp_path):
    target = model()
    target["norm"].register_buffer("table", torch.ones(2, device="meta"), persistent=False)
    fails(changed(tmp_path), "the buffer 'norm.table' is on the meta device", target=target)


def test_a_rename_of_two_into_one(tmp_path):
    with pytest.raises(ValueError, match="rename gives 'x' to two tensors"):
        fp8.load(model(), changed(tmp_path), rename=lambda name: "x")


def test_model_that_is_none(tmp_path):
    with pytest.raises(TypeError, match=r"fp8.load: expected a torch.nn.Module, got dict"):
        fp8.load({}, tmp_path)


# --- indexes -------------------------------------------------------------------------------------


def sharded(tmp_path):
    tensors, _ = checkpoint("fp8, blocks")
    folder = write(tmp_path, tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    return folder, index, json.loads(index.read_text())


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model\0.safetensors",
        ".safetensors",
        "model.bin",
        "",
    ],
)
def test_index_that_leads_elsewhere(name, tmp_path):
    folder, index, content = sharded(tmp_path)
    content["weight_map"]["norm.weight"] = name
    index.write_text(json.dumps(content))
    fails(folder, "expected names of .safetensors files beside it")


def test_index_of_a_file_that_is_missing(tmp_path):
    folder, _, _ = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, "names 'model-00002-of-00002.safetensors', which is missing", FileNotFoundError)


def test_index_of_a_tensor_that_is_missing(tmp_path):
    folder, index, content = sharded(tmp_path)
    content["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    fails(folder, "has 'more' in model-00001-of-00002.safetensors, which has not")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "expected weight_map"),
        ('{"weight_map": {"a": 1}}', "expected weight_map"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_index_that_is_none(text, match, tmp_path):
    folder, index, _ = sharded(tmp_path)
    index.write_text(text)
    fails(folder, match)


def test_two_files_of_one_tensor_and_no_index(tmp_path):
    folder, index, _ = sharded(tmp_path)
    index.unlink()
    (folder / "a.safetensors").write_bytes(file_of({"norm.weight": torch.ones(48)}))
    fails(folder, "'norm.weight' is in a.safetensors and model-")


# --- headers -------------------------------------------------------------------------------------


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


HEADERS = [
    (b"", "expected 8 bytes of header length, the file has 0"),
    (b"1234567", "the file has 7"),
    (struct.pack("<Q", 1 << 62) + b"{}", "truncated, or no safetensors file"),
    (struct.pack("<Q", 3) + b"{}", "said to have 3 bytes, of 2"),
    (packed(b"\xff\xfe"), "its header is no JSON"),
    (packed(b"[" * 100_000), "its header is no JSON"),
    (packed([1]), "no JSON object"),
    (packed({"__metadata__": 1}), "__metadata__ is no object"),
    (packed({"a": 1}), "'a' lacks dtype, shape or data_offsets"),
    (packed({"a": {"dtype": "F32"}}), "'a' lacks"),
    (packed(one(dtype=1), b"\0" * 8), "expected dtype as a string"),
    (packed(one(shape=[-2]), b"\0" * 8), "expected shape as a list of extents"),
    (packed(one(shape=[2.0]), b"\0" * 8), "expected shape"),
    (packed(one(shape=[True, 2]), b"\0" * 8), "expected shape"),
    (packed(one(shape=[1 << 70]), b"\0" * 8), "expected shape"),
    (packed(one(shape=[1] * 100), b"\0" * 8), "expected shape"),
    (packed(one(shape=[1 << 40, 1 << 40]), b"\0" * 8), "takes 4835703278458516698824704"),
    (packed(one(data_offsets=[8, 0]), b"\0" * 8), r"expected data_offsets \[begin, end\]"),
    (packed(one(data_offsets=[0, 8, 9]), b"\0" * 8), "expected data_offsets"),
    (packed(one(data_offsets=[-8, 0]), b"\0" * 8), "expected data_offsets"),
    (packed(one(shape=[3]), b"\0" * 8), r"\[3\] in F32 takes 12 bytes, got 8"),
    (packed(one(), b"\0" * 7), "'a' ends at byte .* of .*: the file is truncated"),
    (packed(one(), b"\0" * 9), "1 bytes follow the last tensor"),
    (packed(one(data_offsets=[1, 9]), b"\0" * 9), "'a' leaves a gap before it"),
    (
        packed(one() | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, b"\0" * 8),
        "'b' overlaps another tensor",
    ),
    (packed(b'{"a": 1, "a": 2}'), "a key appears twice"),
]


@pytest.mark.parametrize(("content", "match"), HEADERS, ids=[f"{i}" for i, _ in enumerate(HEADERS)])
def test_header_that_is_wrong(content, match, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        read_header(file)
    assert str(file) in str(raised.value)
    fails(tmp_path, match)


def test_header_of_a_dtype_that_torch_lacks(tmp_path):
    """It is no error until such a tensor is wanted."""
    header = {"lm_head.weight": {"dtype": "F4", "shape": [20, 48], "data_offsets": [0, 480]}}
    (tmp_path / "model.safetensors").write_bytes(packed(header, b"\0" * 480))
    assert read_header(tmp_path / "model.safetensors").tensors["lm_head.weight"].dtype == "F4"
    fails(tmp_path, "'lm_head.weight' is in F4, which is not read", NotImplementedError)


def test_truncated_files(tmp_path):
    folder = changed(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        fails(folder, str(file.name))
    file.write_bytes(whole + b"\0")
    fails(folder, "1 bytes follow the last tensor")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))


def mutate(content: bytearray, limit: int, rng: random.Random) -> None:
    """One to eight bytes changed, taken out or put in, before `limit`."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(limit, len(content)))
        how = rng.randrange(4)
        if how == 0:
            content[at] = rng.randrange(256)
        elif how == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del content[at : at + rng.randrange(1, 4)]
        else:
            content[at:at] = rng.choice((b"9", b"0", b'"', b"-", b"]", b"{", b"../", b"\0"))


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files_load_or_raise(seed, tmp_path):
    """Changes of headers, their lengths, the index and the config: an error of ours that leaves the
    model as it was, or a load. Nothing else, and no crash."""
    rng = random.Random(seed)
    tensors = small().state_dict() | {"0.weight": codes(8, 16), "0.weight_scale": scales(8, 1)}
    folder = write(tmp_path, tensors, {"quant_method": "fp8"}, shards=2)
    contents = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    target, raised = small(), 0
    before = copy.deepcopy(target.state_dict())
    for _ in range(120):
        file = rng.choice(list(contents))
        content = bytearray(contents[file])
        header = 8 + int.from_bytes(content[:8], "little")
        mutate(content, header if file.suffix == ".safetensors" else len(content), rng)
        file.write_bytes(content)
        problem = None
        try:
            fp8.load(target, folder)
        except ERRORS as error:
            problem = str(error)
        if problem is None:
            target = small()
            before = copy.deepcopy(target.state_dict())
        else:
            raised += 1
            assert "fp8" in problem
            for name, value in target.state_dict().items():
                assert_same_bits(value, before[name], name)
        file.write_bytes(contents[file])
    assert raised > 60
