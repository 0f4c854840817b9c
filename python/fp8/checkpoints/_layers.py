"""Which tensors of a checkpoint are codes, and where their scales are.

A tensor in F8_E4M3 is codes, and there must be a scale for it: under one of the names that formats
use, in a shape that means something for a weight of its shape. No rule of a config is interpreted,
so none can be misread; and no weight is ever taken without its scale.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..nn._scales import (
    INPUT_SCALES,
    WEIGHT_SCALES,
    Granularity,
    blocks_of,
    granularity_of,
)
from ._safetensors import DTYPES, Entry

CODES = "F8_E4M3"

_FNUZ = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")

# Of attention's cache and outputs, and the mark that ComfyUI leaves: no linear needs them.
_PASSED_OVER = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale", "scaled_fp8")
_OUTPUT_OF = ("q_proj", "k_proj", "v_proj")

# Names that other formats give to a weight that is no float8 tensor.
_PACKED = ("weight_packed", "qweight", "weight_quantized", "blocks", "weight_bits")


class FrozenWeight(NamedTuple):
    """Codes, their scale and what else belongs to them, by their names in the checkpoint."""

    codes: str
    scale: str
    input_scale: str | None
    granularity: Granularity
    shape: tuple[int, int]  # [N, K]

    @property
    def scale_name(self) -> str:
        """The last part of the scale's name."""
        return self.scale.rpartition(".")[2]

    @property
    def input_scale_name(self) -> str:
        """The last part of the name of the input's scale; one by default."""
        return "input_scale" if self.input_scale is None else self.input_scale.rpartition(".")[2]


def passed_over(name: str) -> bool:
    """Whether a tensor is of no use here and of none elsewhere: scales of a KV cache."""
    head, _, last = name.rpartition(".")
    if last == "output_scale":
        return head.rpartition(".")[2] in _OUTPUT_OF
    return last.endswith(_PASSED_OVER)


def names_of_codes(prefix: str) -> tuple[str, ...]:
    """What the weight of a layer called `prefix` is called, where it is codes."""
    dot = f"{prefix}." if prefix else ""
    return (f"{dot}weight", f"{dot}_weight_qdata")


def frozen_weight(tensors: Mapping[str, Entry], codes: str) -> FrozenWeight:
    """What belongs to a tensor of codes, the weight of a linear layer, called `codes`.

    Raises ValueError that names it where there is no scale, or one that does not fit.
    """
    entry = tensors[codes]
    prefix, _, last = codes.rpartition(".")
    dot = f"{prefix}." if prefix else ""
    if len(entry.shape) != 2:
        raise ValueError(
            f"fp8.load: {codes!r}: expected codes [out_features, in_features], got "
            f"{list(entry.shape)}"
        )
    rows, cols = entry.shape
    own: tuple[str, ...] = WEIGHT_SCALES
    if last != "weight":
        own = (
            ("_weight_scale",)
            if last == "_weight_qdata"
            else (f"{last}_scale_inv", f"{last}_scale")
        )
    scale = next((f"{dot}{name}" for name in own if f"{dot}{name}" in tensors), None)
    if scale is None:
        raise ValueError(
            f"fp8.load: {codes!r} is FP8 (F8_E4M3) and has no scale: expected one of "
            f"{', '.join(f'{dot}{name}' for name in own)}. Codes without a scale are no weights; "
            "the checkpoint is incomplete, or of a format that is not known here"
        )
    granularity = scale_of(tensors, scale, rows, cols, codes)
    inputs = (f"{dot}{name}" for name in INPUT_SCALES)
    static = next((name for name in inputs if name in tensors), None)
    if static is not None and _count(tensors[static].shape) != 1:
        raise ValueError(
            f"fp8.load: {static!r}: expected a static scale of one element, got "
            f"{list(tensors[static].shape)}"
        )
    if static is not None and tensors[static].dtype not in _SCALE_DTYPES:
        raise ValueError(f"fp8.load: {static!r}: expected floats, got {tensors[static].dtype}")
    return FrozenWeight(codes, scale, static, granularity, (rows, cols))


def input_scale_of(weight: FrozenWeight) -> str | None:
    """The static scale that the layer takes: none beside blocks, whose product wants x in blocks;
    there a scale is computed in every call, which is more accurate."""
    return None if weight.granularity == "blockwise" else weight.input_scale


def scale_of(
    tensors: Mapping[str, Entry], scale: str, rows: int, cols: int, codes: str
) -> Granularity:
    """What a scale of codes [rows, cols] is for, by its shape. Raises ValueError."""
    entry = tensors[scale]
    shape = squeezed(entry.shape)
    # Of 32 columns one group is a row.
    groups = len(shape) == 2 and cols % 32 == 0 and tuple(shape) == (rows, cols // 32) and cols > 32
    if entry.dtype == "U8" or groups:
        raise ValueError(
            f"fp8.load: {codes!r} with {scale!r}, {entry.dtype} {list(entry.shape)}: MXFP8 (a "
            "scale for 32 elements) is not supported; take the checkpoint in high precision, or "
            "with scales per tensor, per row or per block of 128 x 128"
        )
    if entry.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"fp8.load: {scale!r}: expected a scale in {', '.join(_SCALE_DTYPES)}, got "
            f"{entry.dtype}"
        )
    granularity = granularity_of(shape, rows, cols)
    grid = blocks_of(rows, cols)
    if granularity is None and 1 in grid and shape == (max(grid),):
        return "blockwise"  # transformers drops dimensions of 1 when it saves experts
    if granularity is None:
        raise ValueError(
            f"fp8.load: {scale!r}: expected one scale, [{rows}, 1] or "
            f"{list(grid)} (blocks of 128 x 128) for {codes!r} [{rows}, {cols}], "
            f"got {list(entry.shape)}"
        )
    return granularity


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ModelOpt's [rows, 1, cols, 1] as [rows, cols]; others as they are."""
    is_blocks = len(shape) == 4 and shape[1] == shape[3] == 1
    return (shape[0], shape[2]) if is_blocks else shape


def refuse(tensors: Mapping[str, Entry], wanted: Iterable[str]) -> None:
    """Raises NotImplementedError for tensors, of those that a model wants, whose dtype is not
    read."""
    for name in wanted:
        dtype = tensors[name].dtype
        if dtype in _FNUZ:
            raise NotImplementedError(
                f"fp8.load: {name!r} is in {dtype}, AMD's float8, whose codes mean half of what "
                "F8_E4M3's do; take a checkpoint in float8_e4m3fn"
            )
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"fp8.load: {name!r} is in {dtype}, which is not read (FP4 and FP6 formats are not "
                "supported); take a checkpoint in F8_E4M3 or high precision"
            )


def packed(tensors: Mapping[str, Entry], prefix: str) -> str | None:
    """The tensor that holds the weight of `prefix` in a format that is not read."""
    names = (f"{prefix}.{last}" if prefix else last for last in _PACKED)
    return next((name for name in names if name in tensors), None)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
