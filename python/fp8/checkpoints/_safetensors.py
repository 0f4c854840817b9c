"""The safetensors format: eight bytes of length, a header in JSON, bytes of tensors.

A file comes from elsewhere, so nothing in it is believed: every offset is checked against the file
before a byte of data is read, and tensors are views of a private map of the file. No package is
needed for it.
"""

import ctypes
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MOST_HEADER = 100_000_000
"""Bytes, as the format's own library has it."""


class Entry(NamedTuple):
    """One tensor of a file."""

    file: Path
    dtype: str  # as the file has it; one that torch lacks is not in DTYPES
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


class Header(NamedTuple):
    """What a file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of a file, checked. Raises ValueError that names the file and what is wrong."""
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(8)
        if len(first) < 8:
            raise _bad(file, f"expected 8 bytes of header length, the file has {size}")
        length = int.from_bytes(first, "little")
        if length > min(size - 8, _MOST_HEADER):
            raise _bad(
                file,
                f"its header is said to have {length} bytes, of {size - 8}: truncated, or no "
                "safetensors file",
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _bad(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _bad(file, "its __metadata__ is no object")
    data = 8 + length
    tensors = {name: _entry(file, name, value, data, size) for name, value in header.items()}
    _check_places(file, tensors, data, size)
    return Header(tensors, {str(k): v for k, v in metadata.items() if isinstance(v, str)})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _entry(file: Path, name: str, value: Any, data: int, size: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _bad(file, f"{name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise _bad(file, f"{name!r}: expected dtype as a string, got {dtype!r:.40}")
    if not _are_counts(shape) or len(shape) > 64:
        raise _bad(file, f"{name!r}: expected shape as a list of extents, got {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(file, f"{name!r}: expected data_offsets [begin, end], got {offsets!r:.80}")
    begin, end = data + offsets[0], data + offsets[1]
    if end > size:
        raise _bad(
            file,
            f"{name!r} ends at byte {end} of {size}: the file is truncated, or its header wrong",
        )
    count = 1
    for extent in shape:
        count *= extent
    if dtype in DTYPES and count * DTYPES[dtype].itemsize != end - begin:
        raise _bad(
            file,
            f"{name!r}: {shape} in {dtype} takes {count * DTYPES[dtype].itemsize} bytes, "
            f"got {end - begin}",
        )
    return Entry(file, dtype, tuple(shape), begin, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_places(file: Path, tensors: dict[str, Entry], data: int, size: int) -> None:
    """Tensors fill the data one after the other, as the format wants it."""
    at = data
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps another tensor" if entry.begin < at else "leaves a gap before it"
            raise _bad(file, f"{name!r} {what}")
        at = entry.end
    if at != size:
        raise _bad(file, f"{size - at} bytes follow the last tensor")


def _bad(file: Path, what: str) -> ValueError:
    return ValueError(f"fp8: {file}: {what}")


class Reader:
    """Tensors of files, each file mapped once while the reader is open."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, entry: Entry) -> Tensor:
        """A view of the file, on the CPU: valid as long as the reader is open, and not written."""
        dtype = DTYPES[entry.dtype]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.file not in self._maps:
            with open(entry.file, "rb") as stream:
                # A private map: torch wants memory that can be written.
                self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        whole = self._maps[entry.file]
        if entry.end > len(whole):
            raise _bad(entry.file, "it was cut off since its header was read")
        count = entry.end - entry.begin
        data = torch.frombuffer(whole, dtype=torch.uint8, count=count, offset=entry.begin)
        if entry.begin % dtype.itemsize:  # a view must begin at a multiple; a copy does
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def close(self) -> None:
        """Forgets the maps; each goes with the last view of it."""
        self._maps.clear()


@contextmanager
def reading() -> Iterator[Reader]:
    """A reader, closed at the end."""
    reader = Reader()
    try:
        yield reader
    finally:
        reader.close()


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write(
    file: Path, planned: Sequence[Planned], tensors: Iterator[Tensor], metadata: dict[str, str]
) -> None:
    """Writes a file of these tensors, which are taken one by one, in order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for plan in planned:
        offsets = [at, at + plan.nbytes]
        header[plan.name] = {
            "dtype": NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for plan, tensor in zip(planned, tensors, strict=True):
            if tensor.dtype != plan.dtype or tuple(tensor.shape) != plan.shape:
                raise RuntimeError(f"fp8: {plan.name} is not what was planned")
            data = tensor.detach().to("cpu").contiguous()
            if data.nbytes:
                stream.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
