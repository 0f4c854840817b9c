"""A checkpoint: which files it is made of, which tensors they have, and which formats it is not.

Everything is decided by the headers of the safetensors files, before any tensor is read. What
config.json says of quantization is looked at only to name a format that is refused.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ._safetensors import Entry, Header, read_header

INDEX = ".safetensors.index.json"

INPUTS = "fp8_inputs"
"""In the metadata of files: how inputs are scaled, where config.json has no words for it."""

METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt", "quark", "torchao")
"""quant_method of those that may hold what is read here: float8_e4m3fn codes with their scales."""

_FOREIGN = ("mxfp", "nvfp4", "fp4", "int4", "int8", "w4a", "awq", "gptq")
"""In the name of a ModelOpt algorithm: not ours."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint, by name, and what its config says of quantization."""

    path: Path
    tensors: dict[str, Entry]
    quantization: dict[str, Any]
    inputs: dict[str, tuple[Any, bool]]
    """Of files that `save` wrote: how a layer scales its input (granularity, powers of two)."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads headers, index and config of a folder, or of a single safetensors file.

    Raises FileNotFoundError where something is missing, ValueError for what is broken and
    NotImplementedError for a format that is not read; each names the file or format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"fp8.load: expected a folder or a .safetensors file: {path}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _pickled(path)
        header = read_header(path)
        return Checkpoint(path, header.tensors, {}, inputs_of(path, header))
    quantization = _quantization(path)
    refuse_format(str(path), quantization)
    indexes = sorted(path.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        indexes = [file for file in indexes if file.name == f"model{INDEX}"]
        if not indexes:
            raise ValueError(f"fp8.load: {path} has several indexes *{INDEX}, and no model{INDEX}")
    if indexes:
        return _indexed(indexes[0], path, quantization)
    files = sorted(path.glob("*.safetensors"))
    if (path / "model.safetensors") in files:
        files = [path / "model.safetensors"]
    if not files:
        pickles = [file for pattern in _PICKLES for file in path.glob(pattern)]
        if pickles:
            raise _pickled(pickles[0])
        raise FileNotFoundError(f"fp8.load: no *.safetensors in {path}")
    tensors: dict[str, Entry] = {}
    inputs: dict[str, tuple[Any, bool]] = {}
    for file in files:
        header = read_header(file)
        inputs |= inputs_of(file, header)
        for name, entry in header.tensors.items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {file.name}"
                raise ValueError(f"fp8.load: {name!r} is in {both}, and no index says which counts")
            tensors[name] = entry
    return Checkpoint(path, tensors, quantization, inputs)


def _indexed(index: Path, path: Path, quantization: dict[str, Any]) -> Checkpoint:
    content = _json(index)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"fp8.load: {index}: expected weight_map, from tensors to files")
    headers = {}
    inputs: dict[str, tuple[Any, bool]] = {}
    for name in sorted(set(files.values())):
        # Next to the index and nowhere else, whatever the index says.
        if not name.endswith(".safetensors") or any(c in name for c in "/\\\0:") or name[0] == ".":
            raise ValueError(
                f"fp8.load: {index}: expected names of .safetensors files beside it, got {name!r}"
            )
        file = index.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"fp8.load: {index.name} names {name!r}, which is missing")
        header = read_header(file)
        headers[name] = header.tensors
        inputs |= inputs_of(file, header)
    tensors = {}
    for name, file_name in files.items():
        if name not in headers[file_name]:
            raise ValueError(f"fp8.load: {index.name} has {name!r} in {file_name}, which has not")
        tensors[name] = headers[file_name][name]
    return Checkpoint(path, tensors, quantization, inputs)


def inputs_of(file: Path, header: Header) -> dict[str, tuple[Any, bool]]:
    """What the metadata of a file that `save` wrote says of inputs."""
    text = header.metadata.get(INPUTS)
    if text is None:
        return {}
    try:
        found = {
            name: (_known(granularity), bool(power_of_two))
            for name, (granularity, power_of_two) in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"fp8.load: {file}: its metadata {INPUTS!r} means nothing") from None
    return found


def _known(granularity: Any) -> Any:
    if granularity not in ("tensorwise", "rowwise", "blockwise"):
        raise ValueError(granularity)
    return granularity


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"fp8.load: {file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"fp8.load: {file} is no JSON object")
    return content


def _quantization(path: Path) -> dict[str, Any]:
    """What config.json or ModelOpt's own file say of quantization; empty for nothing."""
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                return part[key]  # type: ignore[no-any-return]
    own = path / "hf_quant_config.json"
    if own.is_file():
        found = _json(own).get("quantization")
        return {"quant_method": "modelopt", **(found if isinstance(found, dict) else {})}
    return {}


def refuse_format(path: str, quantization: dict[str, Any]) -> None:
    """Raises NotImplementedError for a quantization_config of a format that is not read."""
    method = quantization.get("quant_method")
    if method is not None and method not in METHODS:
        raise NotImplementedError(
            f"fp8.load: {path} is quantized by {method!r}; FP8 checkpoints of "
            f"{', '.join(METHODS)} are read. Load it with the package that made it, or take the "
            "checkpoint in high precision and call fp8.freeze"
        )
    algorithm = str(quantization.get("quant_algo", "")).lower()
    if any(word in algorithm for word in _FOREIGN):
        raise NotImplementedError(
            f"fp8.load: {path} is in {quantization['quant_algo']}, which is not float8_e4m3fn with "
            "float scales; take the checkpoint in high precision, or in FP8"
        )


def _pickled(file: Path) -> NotImplementedError:
    return NotImplementedError(
        f"fp8.load: {file} is a pickle, which runs code when it is loaded, and is not read. Save "
        "the model again as safetensors: model.save_pretrained(folder, safe_serialization=True), "
        "or safetensors.torch.save_file(state_dict, file)"
    )
