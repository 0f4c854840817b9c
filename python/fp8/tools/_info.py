"""`fp8.info()`: what a bug report needs, as data and as text; and the plan cache's statistics and
control.

Nothing here runs at import. `info()` asks the CUDA driver about the devices, so it initializes CUDA
where there is one.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .._native import loader, versions
from ..recipe import RECIPES, Recipe
from . import _doctor

_TENSOR_CORES = "FP8 tensor cores"
_FALLBACK = "slower path: dequantize, then matmul"


def plan_cache_info() -> dict[str, int]:
    """Statistics of the cuBLASLt plan cache since it was last cleared.

    Keys: size and capacity (plans), hits, misses, fallbacks (calls that no cuBLASLt algorithm
    served), tuned (plans that `fp8.autotune` or FP8_AUTOTUNE chose). All 0 before the first matmul
    on a GPU.
    """
    facts: dict[str, int] = loader.native().plan_cache_info()
    return facts


def plan_cache_clear() -> None:
    """Drop every plan, tuned ones too, and reset the statistics.

    The next matmul of each shape asks cuBLASLt again. What autotune keeps on disk stays there.
    """
    loader.native().plan_cache_clear()


def info() -> dict[str, object]:
    """Versions, devices, what each recipe runs on each device, FP8_* variables, the plan cache, and
    whether autotune is on and where it keeps what it measured, and verdicts: what is ok, what takes
    a slower path and why, what to install.

    Values are strings, numbers, lists and dicts of these, ready for json.dumps. `python -m
    fp8` prints them.
    """
    facts = _facts()
    judged = _doctor.verdicts(_machine(facts))
    return {**facts, "verdicts": [str(verdict) for verdict in judged]}


def _facts() -> dict[str, Any]:
    return {
        **_versions(),
        "this pair": versions.status(torch.__version__, _cublaslt_runtime()),
        "pairs": versions.table(),
        "cublaslt files": _cublaslt_files(),
        "driver": _driver_version(),
        "devices": _devices(),
        "recipes": _recipe_status(),
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key.startswith("FP8_")
        },
        "plan cache": _native_or_error("plan_cache_info"),
        "autotune": _autotune(),
        "whole-GPU launches": _whole_gpu_launches(),
    }


def _machine(facts: dict[str, Any]) -> _doctor.Machine:
    """What the verdicts depend on."""
    built = facts["built with"]
    build = loader.read_build()
    archs = re.findall(r"\d+", built.get("archs", ""))
    visible = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING")
    return _doctor.Machine(
        built_torch=build.torch,
        built_cuda=build.cuda,
        architectures=tuple(map(int, archs)),
        binding=str(built.get("not available", "")),
        torch=facts["torch"],
        torch_cuda=torch.version.cuda or "",
        gpus=tuple(
            _doctor.Gpu(device["name"], int(device["compute capability"].replace(".", "")))
            for device in facts["devices"]
        ),
        driver="" if facts["driver"] == "none" else facts["driver"],
        cublaslt=facts["cublaslt at run time"],
        cublaslt_files=tuple((f["path"], f["torch's own"]) for f in facts["cublaslt files"]),
        fallbacks=int(facts["plan cache"].get("fallbacks", 0)),
        transformers=_installed("transformers"),
        environment={
            **facts["environment"],
            **{name: os.environ[name] for name in visible if name in os.environ},
        },
    )


def _installed(package: str) -> str:
    """The version of a package, without importing it; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report(facts: dict[str, object]) -> str:
    """The result of `info()` as text, one fact a line."""
    width = max(len(key) for key in facts)
    lines = []
    for key, value in facts.items():
        first, *more = _lines(value)
        lines.append(f"{key:<{width}}  {first}")
        lines += [" " * (width + 2) + line for line in more]
    return "\n".join(lines)


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        if value and all(isinstance(item, int) for item in value.values()):
            return [", ".join(f"{key}: {item}" for key, item in value.items())]
        pairs = [f"{key}: {', '.join(_lines(item))}" for key, item in value.items()]
        return pairs or ["none"]
    if isinstance(value, list):
        return [", ".join(_lines(item)) for item in value] or ["none"]
    return [str(value)]


def _versions() -> dict[str, object]:
    return {
        "fp8": loader.read_build().version,
        "built with": {"torch": loader.read_build().torch, **_native_or_error("build_info")},
        "cublaslt at run time": _cublaslt_runtime(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _native_or_error(function: str) -> dict[str, Any]:
    """A dict from `fp8._C`, or why there is none: a bug report must come out in any case."""
    try:
        return dict(getattr(loader.native(), function)())
    except ImportError as error:
        return {"not available": str(error.__cause__ or error)}


def _cublaslt_runtime() -> str:
    """'13.1.0' from 130100; 'none' for a build without CUDA."""
    try:
        version = int(loader.native().cublaslt_runtime_version())
    except ImportError:
        return "unknown"
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "none"


def _cublaslt_files() -> list[dict[str, object]]:
    """Every libcublasLt in this process. Two of them, or one not torch's own, explain failures."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = sorted(set(re.findall(r"/\S*libcublasLt\.so\S*", maps)))
    return [{"path": path, "torch's own": _is_torchs(Path(path))} for path in paths]


def _is_torchs(library: Path) -> bool:
    """Whether it lies in torch's package or in the nvidia packages beside it (pip's layout)."""
    package = Path(torch.__file__).resolve().parent
    library = library.resolve()
    return any(library.is_relative_to(place) for place in (package, package.parent / "nvidia"))


def _driver_version() -> str:
    """The NVIDIA kernel driver's version, '580.65.06', or 'none'."""
    for read in (_driver_file, _nvidia_smi):
        try:
            match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", read())
        except (OSError, subprocess.SubprocessError):
            continue
        if match:
            return match[0]
    return "none"


def _driver_file() -> str:
    return Path("/proc/driver/nvidia/version").read_text()


def _nvidia_smi() -> str:  # where a container hides the file
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL, timeout=10)


def _whole_gpu_launches() -> str:
    try:
        return "on" if loader.native().whole_gpu_launches() else "off"
    except ImportError as error:
        return str(error).splitlines()[0]


def _autotune() -> dict[str, object]:
    try:
        native = loader.native()
    except ImportError as error:
        return {"not available": str(error.__cause__ or error)}
    files = {native.autotune_file(str(device["name"])) or "none" for device in _devices()}
    return {"mode": "on" if native.autotune_enabled() else "off", "files": sorted(files)}


def _devices() -> list[dict[str, object]]:
    devices: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "compute capability": f"{facts.major}.{facts.minor}",
                "memory GiB": round(facts.total_memory / 2**30, 1),
            }
        )
    return devices


def _recipe_status() -> dict[str, dict[str, str]]:
    """device -> recipe -> what carries it out."""
    build = _native_or_error("build_info")
    unknown = "0" if loader.read_build().cuda else ""  # where fp8._C cannot be asked
    architectures = [int(number) for number in re.findall(r"\d+", build.get("archs", unknown))]
    status = {"cpu": dict.fromkeys(RECIPES, "CPU kernels")}
    for device in _devices():
        capability = int(str(device["compute capability"]).replace(".", ""))
        status[str(device["device"])] = {
            name: _status(recipe, capability, architectures) for name, recipe in RECIPES.items()
        }
    return status


def _status(recipe: Recipe, capability: int, architectures: list[int]) -> str:
    """What runs on a GPU of this compute capability (90: 9.0) in a build for these architectures.

    cuBLASLt multiplies in FP8 from 8.9 on, with a scale per row or block on 9.0 alone.
    """
    if not architectures:
        return "none: this fp8 was built without CUDA"
    if capability < min(architectures):  # newer ones compile the kernels when they load
        return f"none: this fp8 was built for compute capability {min(architectures) / 10} and up"
    if capability < 89 or (recipe.granularity != "tensorwise" and capability != 90):
        return _FALLBACK
    return _TENSOR_CORES
