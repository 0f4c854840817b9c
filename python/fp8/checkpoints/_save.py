"""`save`: a model with FP8 weights as a checkpoint that other engines read."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..conversion._convert import check_model
from ..conversion._rules import find_linears
from ..integrations.transformers._experts import is_experts
from ..nn._frozen_experts import FrozenExperts
from ..nn._scales import usual_input
from ._experts_export import is_coded
from ._export import Item, Layer, check_format, items_of
from ._folder import INDEX, INPUTS
from ._safetensors import NAMES, Planned, write


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write `model` into `folder` as an FP8 checkpoint: *.safetensors and config.json.

    The weight of every FrozenLinear is written as its codes, that of an fp8.Linear as the codes
    that its forward computes, without freezing it; those of FrozenExperts and converted experts
    too, one by one (`experts.0.gate_proj.weight`); the rest as it is. `fp8.load` finds the same
    bits again. Names are the model's own. Tokenizer and generation_config are not written; of tied
    weights one is.

    Args:
        model: with fp8.Linear or FrozenLinear layers. `model.config`, if there is one with
            `to_dict`, goes into config.json.
        folder: made where it is missing.
        format: "compressed-tensors", with scales per row (its FP8_DYNAMIC), per tensor or per
            block; or "fp8", Hugging Face's fine-grained format, with scales per block or tensor,
            in float32. vLLM, SGLang and transformers read both.
        max_shard_size: bytes of tensors in a file, at most, but for a tensor that is larger.

    How a layer scales its input is in the config as far as the format has words for it; where it
    has not (one scale for all of x beside "fp8", powers of two), `fp8.load` knows from the files'
    metadata, and other engines scale by row.

    Raises TypeError for a model that is no nn.Module; ValueError for an unknown format, a scale
    that it cannot have, a model without FP8 weights or with tensors on the meta device;
    NotImplementedError for transformers' merged experts in high precision; FileExistsError where
    the folder has safetensors files already. Then nothing was written.

    Example:
        >>> fp8.save(fp8.freeze(model, "blockwise"), "folder", format="fp8")
    """
    check_model("save", model)
    check_format("save", format)
    for name, module in model.named_modules():
        if is_experts(module) and not is_coded(module):
            raise NotImplementedError(
                f"fp8.save: {name!r} holds merged experts in high precision, which are not "
                "supported: call fp8.freeze(model), or fp8.export_weights(model), which gives its "
                "tensors with these as they are"
            )
    items, layers = items_of(model, format)
    if not layers:
        raise ValueError(
            "fp8.save: the model has no FP8 weight: call fp8.freeze(model) or fp8.convert(model) "
            "first"
        )
    for item in items:
        if item.dtype not in NAMES:
            raise ValueError(f"fp8.save: {item.name!r} is {item.dtype}, which safetensors has not")
    if meta := next((n for n, p in model.state_dict().items() if p.is_meta), None):
        raise ValueError(f"fp8.save: {meta!r} is on the meta device: it has no values")
    plain = [found.name for found in find_linears(model) if found.name and found.name not in layers]
    plain += _routers(model)
    quantization = describe(format, layers, plain)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if existing := sorted((*folder.glob("*.safetensors"), *folder.glob(f"*{INDEX}"))):
        raise FileExistsError(f"fp8.save: {existing[0]} is there already; take an empty folder")
    _write(folder, items, layers, max_shard_size)
    config = _config(model)
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _routers(model: nn.Module) -> list[str]:
    """What stands beside experts, has a matrix as its weight and is no nn.Linear: other engines
    have a linear layer there, which is not in FP8."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, parent in model.named_modules()
        if any(isinstance(m, FrozenExperts) or is_experts(m) for m in parent.children())
        for name, child in parent.named_children()
        if not isinstance(child, nn.Linear)
        and getattr(child._parameters.get("weight"), "ndim", 0) == 2
    ]


def _config(model: nn.Module) -> dict[str, Any]:
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_dict"):
        return {}
    config: dict[str, Any] = json.loads(json.dumps(own.to_dict(), default=str))
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    return config


def _shards(items: Sequence[Item], limit: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        nbytes = _planned(item).nbytes
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards


def _planned(item: Item) -> Planned:
    return Planned(item.name, item.dtype, item.shape)


def _write(folder: Path, items: Sequence[Item], layers: dict[str, Layer], limit: int) -> None:
    """Files under other names first: what is cut off looks like nothing."""
    shards = _shards(items, limit)
    names = ["model.safetensors"]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    metadata = {"format": "pt"}
    if inputs := _inputs(layers):
        metadata[INPUTS] = json.dumps(inputs)
    parts = [folder / f".{name}.part" for name in names]
    try:
        for part, shard in zip(parts, shards, strict=True):
            write(part, [_planned(item) for item in shard], _tensors(shard), metadata)
        for part, name in zip(parts, names, strict=True):
            os.replace(part, folder / name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    if len(shards) > 1:
        where = {item.name: name for name, s in zip(names, shards, strict=True) for item in s}
        size = sum(_planned(item).nbytes for item in items)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"model{INDEX}").write_text(text)


def _tensors(items: Sequence[Item]) -> Iterator[Tensor]:
    for item in items:
        yield item.get()


def _inputs(layers: dict[str, Layer]) -> dict[str, list[Any]]:
    """Layers that scale their input in another way than `load` takes for granted."""
    return {
        name: [layer.input_granularity, layer.power_of_two]
        for name, layer in layers.items()
        if not layer.static
        and (layer.power_of_two or layer.input_granularity != usual_input(layer.granularity))
    }


def describe(format: str, layers: dict[str, Layer], plain: Sequence[str]) -> dict[str, Any]:
    """quantization_config of a model with these layers in FP8, and these linears not."""
    if format == "compressed-tensors":
        return _compressed_tensors(layers, plain)
    kinds = {(layer.granularity, layer.static) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"fp8.save: the format 'fp8' has one kind of scale for all layers, the model has "
            f"{sorted(kinds)} (granularity, static input); take 'compressed-tensors'"
        )
    ((granularity, static),) = kinds
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": [128, 128] if granularity == "blockwise" else None,
        "modules_to_not_convert": list(plain),
    }


def _compressed_tensors(layers: dict[str, Layer], plain: Sequence[str]) -> dict[str, Any]:
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for name, layer in layers.items():
        key = (layer.granularity, layer.input_granularity, layer.static)
        groups.setdefault(key, []).append(name)
    shared = {"num_bits": 8, "type": "float", "symmetric": True}
    strategies = {"tensorwise": "tensor", "rowwise": "channel", "blockwise": "block"}
    inputs = {"tensorwise": "tensor", "rowwise": "token", "blockwise": "group"}
    config_groups = {}
    for i, ((granularity, own, static), names) in enumerate(groups.items()):
        weights = shared | {"strategy": strategies[granularity], "dynamic": False}
        activations = shared | {"strategy": inputs[own], "dynamic": not static}
        if granularity == "blockwise":
            weights["block_structure"] = [128, 128]
        if own == "blockwise":
            activations["group_size"] = 128
        config_groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": "float-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }
