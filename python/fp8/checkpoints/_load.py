"""`load`: the tensors of a checkpoint, into a model.

First everything is decided, from headers alone, and what does not fit raises; then tensors are
read, one at a time, from maps of the files. Where the weight of a linear layer is FP8 in the
checkpoint, the layer becomes a FrozenLinear in place; elsewhere codes are multiplied with their
scales, into the dtype that the model has there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion._convert import check_model
from ..conversion._freeze import unfuse
from ..conversion._freeze_experts import set_codes
from ..integrations.transformers._names import renaming_of
from ..nn._freezing import Codes
from ..nn._frozen import FrozenLinear, freeze_in_place
from ..nn._frozen_stack import Stack, empty_stack, put, put_scale, scale_shape
from ..nn._scales import Granularity, blocks_of, to_float32
from ._experts_plan import ALL, ExpertsCodes, Slice
from ._folder import Checkpoint, open_checkpoint
from ._layers import FrozenWeight, input_scale_of, squeezed
from ._plan import Plan, Target, make_plan
from ._safetensors import Reader, reading


@dataclass(frozen=True)
class Loaded:
    """What `fp8.load` did. `print` it."""

    frozen: tuple[str, ...]
    """Layers that are FrozenLinear or FrozenExperts now."""
    dequantized: tuple[str, ...]
    """Parameters whose codes were multiplied with their scales: right values, in high precision."""
    copied: int
    """Tensors that were in high precision in the checkpoint."""
    missing: tuple[str, ...] = field(default=())
    """Of the model, not in the checkpoint; only where `strict` is False."""
    unexpected: tuple[str, ...] = field(default=())
    """Of the checkpoint, not in the model; only where `strict` is False."""
    passed_over: tuple[str, ...] = field(default=())
    """Scales of a KV cache."""

    def __str__(self) -> str:
        parts = [f"{len(self.frozen)} layers frozen, {self.copied} tensors copied"]
        if self.dequantized:
            parts.append(
                f"{len(self.dequantized)} parameters dequantized, where no frozen layer can be: "
                f"{', '.join(self.dequantized[:3])}"
                f"{', ..' if len(self.dequantized) > 3 else ''}"
            )
        for name in ("missing", "unexpected", "passed_over"):
            if count := len(getattr(self, name)):
                parts.append(f"{count} {name.replace('_', ' ')}")
        return "; ".join(parts)


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    strict: bool = True,
    static_inputs: bool = True,
    device: torch.device | str | int | None = None,
    rename: Callable[[str], str | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Fill `model` with the FP8 checkpoint in `folder`. In place; returns what was done.

    Where the checkpoint has the weight of an nn.Linear in FP8, that becomes a `FrozenLinear` with
    the checkpoint's codes, bit for bit; its scales are those of the file in float32, which has
    every value of theirs (bfloat16, float16, exponents). Which layers those are is told by the
    headers of the files and nothing else: a weight in F8_E4M3 with its scale under one of the
    names in use, per tensor, per row or per block of 128 x 128, with a static scale of the input
    or none. So the formats of vLLM's and Hugging Face's tools (`fp8`, compressed-tensors, fbgemm,
    ModelOpt, Quark, torchao as safetensors) are one. See docs/checkpoints.md.

    So are the experts of transformers' mixtures, a tensor each in the file: the module becomes a
    `FrozenExperts`, with a scale per row, also where each tensor has one, or in blocks.

    Codes where the model has neither, or experts that FrozenExperts cannot hold (see
    docs/limits.md), are multiplied with their scales into the parameter's own dtype: right values,
    but no less memory. What the checkpoint has in high precision is copied.

    The dtype of the model is that of its parameters: load into one in bfloat16 to compute in that.
    Inputs without a static scale are scaled in every call, by row, or by 128 elements of a row
    beside a weight in blocks.

    Args:
        model: of the names that the checkpoint has. Its parameters may be on the meta device, and
            are made on `device` then; buffers may not, unless the checkpoint has them.
        folder: with *.safetensors (and an index, where they are several), or one such file. The
            files are mapped, and read one tensor at a time: at most the model and one tensor are in
            memory.
        strict: raise where a tensor of one has no place in the other. False: report them.
        static_inputs: use static scales of inputs; False: scale by row, in every call, more
            accurate and with one more pass over the input.
        device: of what is on the meta device. None: the CPU.
        rename: from a name in the checkpoint to the model's; None for a tensor to leave out. By
            default the names are the same, for a model of transformers those that it gives them.
        progress: called with the number of tensors read, and of all.

    Raises, before anything in the model is changed: FileNotFoundError; ValueError for codes without
    a scale, for files that are broken, and for shapes or names that do not fit;
    NotImplementedError for other formats (MXFP8, NVFP4, INT, AMD's float8, pickles). Each names the
    tensor or the file.

    Example:
        >>> fp8.save(fp8.freeze(model), "folder")
        >>> print(fp8.load(model, "folder"))
    """
    check_model("load", model)
    checkpoint = open_checkpoint(folder)
    if rename is None:
        rename = renaming_of(model)
    if rename is not None:
        checkpoint = _renamed(checkpoint, rename)
    plan = make_plan(model, checkpoint, strict)
    place = torch.device("cpu" if device is None else device)
    # Normal tensors, whatever the caller's mode.
    with reading() as reader, torch.inference_mode(False), torch.no_grad():
        _fill(plan, Source(checkpoint, reader, place), static_inputs, progress)
    unfuse(model)
    return Loaded(
        frozen=tuple(dict.fromkeys(plan.names[m] for m in (*plan.frozen, *plan.frozen_experts))),
        dequantized=(
            *plan.dequantized,
            *(n for n, (_, parts) in plan.experts.items() if _any(parts)),
        ),
        copied=len(plan.copied) + sum(not _any(parts) for _, parts in plan.experts.values()),
        missing=tuple(plan.missing),
        unexpected=tuple(plan.unexpected),
        passed_over=tuple(plan.passed_over),
    )


def _any(parts: list[Slice]) -> bool:
    return any(part.weight is not None for part in parts)


def _renamed(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    tensors: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for layer, how in checkpoint.inputs.items():
        if (renamed := rename(f"{layer}.weight" if layer else "weight")) is not None:
            inputs[renamed.rpartition(".")[0]] = how
    for name, entry in checkpoint.tensors.items():
        new = rename(name)
        if new in tensors:
            raise ValueError(f"fp8.load: rename gives {new!r} to two tensors, one is {name!r}")
        if new is not None:
            tensors[new] = entry
    return checkpoint._replace(tensors=tensors, inputs=inputs)


class Source:
    """The tensors of a checkpoint, read while the model is filled."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader, device: torch.device) -> None:
        self.tensors, self.inputs = checkpoint.tensors, checkpoint.inputs
        self.reader, self.device = reader, device

    def place(self, tensor: Tensor) -> torch.device:
        """Where what takes the tensor's place belongs."""
        return self.device if tensor.is_meta else tensor.device

    def read(self, name: str) -> Tensor:
        """A view of the file."""
        return self.reader.read(self.tensors[name])

    def at(self, name: str) -> tuple[str, int]:
        """Where a tensor lies."""
        return str(self.tensors[name].file), self.tensors[name].begin

    def codes(self, weight: FrozenWeight, device: torch.device, static: bool = True) -> Codes:
        """The tensors of a layer, on `device`."""
        scale = self._scale(weight.scale, device)
        if weight.granularity == "blockwise":
            scale = scale.reshape(blocks_of(*weight.shape))
        name = input_scale_of(weight) if static else None
        input_scale = None if name is None else self._scale(name, device).reshape(())
        data = self.read(weight.codes).to(device, copy=True)
        return Codes(data, scale, input_scale, weight.granularity, None, False)

    def _scale(self, name: str, device: torch.device) -> Tensor:
        values = self.read(name)
        values = to_float32(values.reshape(squeezed(tuple(values.shape))), f"fp8.load: {name!r}")
        return values.to(device, copy=True)

    def numbers(self, weight: FrozenWeight, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Codes times their scale, rounded to `dtype`."""
        codes = self.codes(weight, device, static=False)
        layer = FrozenLinear.from_codes(
            codes.weight, codes.scale, compute_dtype=dtype, granularity=weight.granularity
        )
        return layer.dequantize()

    def freeze(self, module: nn.Linear, weight: FrozenWeight, static: bool) -> None:
        """Make the module hold these codes."""
        codes = self.codes(weight, self.place(module.weight), static)
        freeze_in_place(module, codes, weight.scale_name, weight.input_scale_name)
        self.tell_input(module, weight)

    def freeze_experts(self, module: nn.Module, codes: ExpertsCodes) -> None:
        """Make an experts module hold these codes."""
        device = self.place(module.down_proj)  # type: ignore[arg-type]
        up, down = (self._stack(p, codes.granularity, device) for p in (codes.gate_up, codes.down))
        set_codes(module, up, down, self.power_of_two(codes))

    def power_of_two(self, codes: ExpertsCodes) -> bool:
        """What the files say of the input of experts, if they do."""
        first = codes.gate_up[0]
        layer = first.source if first.expert == ALL else first.source.rpartition(".")[0]
        return self.inputs.get(layer, (None, False))[1]

    def _stack(self, slices: list[Slice], kind: Granularity, device: torch.device) -> Stack:
        last = slices[-1]
        if last.expert == ALL:
            codes = self.read(last.source).to(device, copy=True)
            return self.with_scales(codes, slices, kind)
        stack = empty_stack(
            kind, (last.expert + 1, last.first + last.shape[0], last.shape[1]), device
        )
        for part in slices:
            assert part.weight is not None
            own = self.codes(part.weight, device, static=False)
            put(stack, part.expert, part.first, own.weight, own.scale)
        return stack

    def with_scales(self, codes: Tensor, slices: list[Slice], kind: Granularity) -> Stack:
        """Codes [E, N, K] that are there, with their scales from the files."""
        shape = scale_shape(kind, tuple(codes.shape))
        stack = Stack(codes, torch.empty(shape, dtype=torch.float32, device=codes.device), kind)
        for part in slices:
            assert part.weight is not None
            scale = self._scale(part.weight.scale, codes.device)
            if part.expert == ALL:
                own = scale_shape(part.weight.granularity, tuple(codes.shape))
                stack.scales.copy_(scale.reshape(own).expand(shape))
                continue
            put_scale(stack, part.expert, part.first, part.shape[0], scale)
        return stack

    def tell_input(self, layer: nn.Linear, weight: FrozenWeight) -> None:
        """What the files say of the input of a frozen layer, if they do."""
        known = self.inputs.get(weight.codes.rpartition(".")[0])
        if known is not None and isinstance(layer, FrozenLinear) and layer.static_scale is None:
            layer.input_granularity, layer.power_of_two = known

    def copy(self, target: Target, name: str) -> None:
        """Into the model, in its dtype."""
        target.set(self.read(name), self.device)

    def dequantize(self, target: Target, weight: FrozenWeight) -> None:
        """The same of codes."""
        values = self.numbers(weight, self.place(target.get()), target.dtype)
        target.set(values, self.device)

    def merge(self, target: Target, slices: list[Slice]) -> None:
        """A parameter of merged experts, from those of each."""
        where = self.place(target.get())
        whole = torch.empty(target.shape, dtype=target.dtype, device=where)
        for part in slices:
            if part.weight is not None:
                values = self.numbers(part.weight, where, target.dtype)
            else:
                values = self.read(part.source).to(where)
            expert = whole[part.expert].t() if part.transposed else whole[part.expert]
            expert[part.first : part.first + values.size(0)].copy_(values)
        target.set(whole, self.device)


def _fill(
    plan: Plan,
    source: Source,
    static_inputs: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """In the order of the files, so that a disk is read from one end to the other."""
    work: list[tuple[tuple[str, int], Callable[[], None]]] = []
    for module, weight in plan.frozen.items():
        act = partial(source.freeze, module, weight, static_inputs)
        work.append((source.at(weight.codes), act))
    for experts, codes in plan.frozen_experts.items():
        act = partial(source.freeze_experts, experts, codes)
        work.append((source.at(codes.gate_up[0].source), act))
    for target, name in plan.copied.items():
        work.append((source.at(name), partial(source.copy, target, name)))
    for target, weight in plan.dequantized.values():
        work.append((source.at(weight.codes), partial(source.dequantize, target, weight)))
    for target, slices in plan.experts.values():
        work.append((source.at(slices[0].source), partial(source.merge, target, slices)))
    work.sort(key=lambda item: item[0])
    for done, (_, step) in enumerate(work, 1):
        step()
        if progress is not None:
            progress(done, len(work))
