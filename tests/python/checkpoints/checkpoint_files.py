"""Checkpoints as other tools write them: files made here, byte by byte, of random codes.

`FORMATS` has a function for each way of naming and shaping scales: it gives the tensors that belong
to one weight, under the last parts of their names, and what codes and scales should be found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    E4M3: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        part = raw(tensor) if tensor.numel() else b""
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(
    folder: Path, tensors: dict[str, Tensor], quantization: dict | None = None, shards: int = 1
) -> Path:
    """A folder as transformers has it."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "test"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(file_of(tensors))
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        (folder / file).write_bytes(file_of(own))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Weight(NamedTuple):
    """One weight in a format."""

    tensors: dict[str, Tensor]  # by the last part of their names
    scales: Tensor  # as they should be found, float32
    granularity: str
    static: float | None = None


def codes(n: int, k: int) -> Tensor:
    """Every code but NaN."""
    values = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0x38
    return values.view(E4M3)


def blocks(n: int, k: int) -> tuple[int, int]:
    return -(-n // 128), -(-k // 128)


def scales(*shape: int) -> Tensor:
    """Of bfloat16's precision, so that each dtype has them."""
    return ((torch.rand(shape) + 0.5) * 2**-9).bfloat16().float()


def powers(*shape: int) -> Tensor:
    return torch.exp2(torch.randint(-12, -6, shape).float())


def _simple(name: str, granularity: str, make: Callable[[int, int], Tensor], dtype=torch.float32):
    def weight(n: int, k: int) -> Weight:
        scale = make(n, k)
        tensors = {"weight": codes(n, k), name: scale.to(dtype)}
        return Weight(tensors, scale, granularity)

    return weight


def _static(name: str, scale_name: str, shape: tuple[int, ...], dtype=torch.float32):
    def weight(n: int, k: int) -> Weight:
        scale = scales(*shape)
        tensors = {"weight": codes(n, k), scale_name: scale.to(dtype)}
        tensors[name] = torch.full(shape, 2**-5).to(dtype)
        return Weight(tensors, scale, "tensorwise", 2**-5)

    return weight


def _modelopt_blocks(n: int, k: int) -> Weight:
    down, across = blocks(n, k)
    scale = scales(down, across)
    tensors = {"weight": codes(n, k), "weight_scale": scale.reshape(down, 1, across, 1)}
    return Weight(tensors, scale, "blockwise")


def _torchao(n: int, k: int) -> Weight:
    scale = scales(n, 1)
    return Weight({"_weight_qdata": codes(n, k), "_weight_scale": scale}, scale, "rowwise")


def _of_blocks(n: int, k: int) -> Tensor:
    return scales(*blocks(n, k))


FORMATS: dict[str, tuple[str | None, Callable[[int, int], Weight]]] = {
    "fp8, blocks": ("fp8", _simple("weight_scale_inv", "blockwise", _of_blocks)),
    "fp8, blocks in bf16": (
        "fp8",
        _simple("weight_scale_inv", "blockwise", _of_blocks, torch.bfloat16),
    ),
    "fp8, blocks in e8m0": (
        "fp8",
        _simple(
            "weight_scale_inv",
            "blockwise",
            lambda n, k: powers(*blocks(n, k)),
            torch.float8_e8m0fnu,
        ),
    ),
    "fp8, tensor": ("fp8", _simple("weight_scale_inv", "tensorwise", lambda n, k: scales())),
    "fp8, tensor, static": ("fp8", _static("activation_scale", "weight_scale_inv", ())),
    "AutoFP8": ("fp8", _simple("weight_scale", "tensorwise", lambda n, k: scales(1))),
    "AutoFP8, static": ("fp8", _static("input_scale", "weight_scale", ())),
    "DeepSeek-V4": (
        "fp8",
        _simple("scale", "blockwise", lambda n, k: powers(*blocks(n, k)), torch.float8_e8m0fnu),
    ),
    "Mistral": (None, _static("qscale_act", "qscale_weight", ())),
    "compressed-tensors, tensor, static": (
        "compressed-tensors",
        _static("input_scale", "weight_scale", (1,), torch.bfloat16),
    ),
    "compressed-tensors, channel": (
        "compressed-tensors",
        _simple("weight_scale", "rowwise", lambda n, k: scales(n, 1), torch.bfloat16),
    ),
    "compressed-tensors, block": (
        "compressed-tensors",
        _simple("weight_scale", "blockwise", _of_blocks, torch.bfloat16),
    ),
    "fbgemm": ("fbgemm_fp8", _simple("weight_scale", "rowwise", lambda n, k: scales(n, 1))),
    "ModelOpt": ("modelopt", _static("input_scale", "weight_scale", ())),
    "ModelOpt, channel": ("modelopt", _simple("weight_scale", "rowwise", lambda n, k: scales(n))),
    "ModelOpt, block": ("modelopt", _modelopt_blocks),
    "Quark": ("quark", _simple("weight_scale", "rowwise", lambda n, k: scales(n))),
    "torchao": ("torchao", _torchao),
    "ComfyUI": (None, _static("scale_input", "scale_weight", ())),
}

SIZES = ((160, 144), (257, 130), (256, 384))
"""in_features and out_features: blocks that are not whole, and that are."""


def model(dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> nn.ModuleDict:
    """Layers of SIZES, the first two with a bias; a head, an embedding and a norm."""
    found = nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 48),
            "norm": nn.LayerNorm(48),
            "layers": nn.ModuleList(nn.Linear(*size, bias=i < 2) for i, size in enumerate(SIZES)),
            "lm_head": nn.Linear(48, 20, bias=False),
        }
    )
    if tied:
        found["lm_head"].weight = found["embed"].weight
    return found.to(dtype)


def checkpoint(format: str, names: Iterable[str] = ()) -> tuple[dict[str, Tensor], list[Weight]]:
    """The tensors of `model` in a format, and what each layer should hold."""
    tensors = {
        name: torch.randn_like(value)
        for name, value in model().state_dict().items()
        if not name.startswith("layers.") or name.endswith("bias")
    }
    weights = []
    for i, (k, n) in enumerate(SIZES):
        weight = FORMATS[format][1](n, k)
        weights.append(weight)
        tensors |= {f"layers.{i}.{name}": value for name, value in weight.tensors.items()}
    return tensors, weights
