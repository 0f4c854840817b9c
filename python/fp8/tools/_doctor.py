"""Verdicts on a machine: what runs fast, what takes a slower path and why, what to install.

Pure functions of `Machine`, a few facts, so that any machine can be judged anywhere. `_info.py`
collects the facts of this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "slow", "install", "note"]

CUBLASLT = "13.1"
"""The version that the guards in csrc/core/matmul were written and tested for."""
TRANSFORMERS = "5.17.0"
"""The version whose families `make sweep` compares; requirements.txt has it too."""
VARIABLES = (
    "FP8_AUTOTUNE",
    "FP8_BATCH_INVARIANT",
    "FP8_CACHE_DIR",
    "FP8_PLAN_CACHE_CAPACITY",
    "FP8_PRINT_PLAN",
    "FP8_PROGRESS",
    "FP8_WHOLE_GPU_LAUNCHES",
)
# The oldest driver branch that runs a CUDA major version (NVIDIA, "CUDA Compatibility").
_DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
_SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "each launch waits for the GPU",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each allocation asks the driver",
}


@dataclass(frozen=True)
class Gpu:
    """One that torch can use."""

    name: str
    capability: int
    """89 for 8.9."""


@dataclass(frozen=True)
class Machine:
    """What the verdicts depend on. Versions are strings, empty where there is none."""

    built_torch: str = ""
    built_cuda: str = ""
    architectures: tuple[int, ...] = ()
    """Compute capabilities that the kernels were compiled for, 90 for 9.0."""
    binding: str = ""
    """Why fp8._C cannot be imported; empty where it can."""
    torch: str = ""
    torch_cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cublaslt: str = ""
    """Version at run time."""
    cublaslt_files: tuple[tuple[str, bool], ...] = ()
    """Those loaded in this process: path, whether it is torch's own."""
    fallbacks: int = 0
    """Matmul problems that no cuBLASLt algorithm served."""
    transformers: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """FP8_* variables and those that hide or slow GPUs."""


@dataclass(frozen=True)
class Verdict:
    """One line: how it stands with `topic`, and what to do if not well."""

    status: Status
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<8} {self.topic}: {self.text}"


def verdicts(machine: Machine) -> list[Verdict]:
    """All of them, in a fixed order."""
    parts = (_torch, _gpus, _driver, _cublaslt, _fallbacks, _binding, _transformers, _environment)
    found = [verdict for part in parts for verdict in part(machine)]
    if machine.gpus and all(verdict.status in ("ok", "note") for verdict in found):
        text = (
            "FP8 gains with large layers and thousands of tokens a step: print(fp8.summary(model)) "
            "says what runs in FP8 and why not the rest, FP8_PRINT_PLAN=1 what was launched"
        )
        found.append(Verdict("note", "if a model is slow all the same", text))
    return found


def _torch(m: Machine) -> Iterator[Verdict]:
    topic = "torch"
    if not m.built_torch:
        yield Verdict("install", topic, "fp8 has not been built: `make build`, or pip install")
        return
    if m.built_cuda and m.torch_cuda and _major(m.built_cuda) != _major(m.torch_cuda):
        yield Verdict(
            "install",
            topic,
            f"its CUDA is {m.torch_cuda}, fp8 was built with {m.built_cuda}: install a torch of "
            f"CUDA {_major(m.built_cuda)}, or build fp8 again",
        )
    elif _minor(m.torch) != _minor(m.built_torch):
        text = f"{m.torch} runs, fp8 was built for {m.built_torch}: build fp8 again"
        yield Verdict("install", topic, text)
    else:
        same = m.torch == m.built_torch
        text = m.torch if same else f"{m.torch}, of one minor version with {m.built_torch}"
        yield Verdict("ok", topic, text)


def _gpus(m: Machine) -> Iterator[Verdict]:
    if not m.gpus:
        yield _without_gpu(m)
        return
    for gpu in dict.fromkeys(m.gpus):
        places = ",".join(str(index) for index, other in enumerate(m.gpus) if other == gpu)
        yield _kind_of_gpu(m, gpu, f"cuda:{places} ({gpu.name}, {_dotted(gpu.capability)})")


def _without_gpu(m: Machine) -> Verdict:
    topic = "GPU"
    if not m.driver:
        return Verdict(
            "slow",
            topic,
            "none, and no NVIDIA driver: FP8 is emulated on the CPU, for tests; nn.Linear is "
            "faster here",
        )
    if not m.torch_cuda:
        return Verdict(
            "install",
            topic,
            f"the driver is there ({m.driver}), but this torch ({m.torch}) is CPU-only: install a "
            "CUDA build of it, and fp8 with CUDA",
        )
    needed = _DRIVER_OF_CUDA.get(_major(m.torch_cuda), 0)
    if _major(m.driver) < needed:
        return Verdict(
            "install",
            topic,
            f"driver {m.driver} is too old for torch's CUDA {m.torch_cuda}: {needed} or newer",
        )
    if "CUDA_VISIBLE_DEVICES" in m.environment:
        value = m.environment["CUDA_VISIBLE_DEVICES"]
        text = f"none visible: CUDA_VISIBLE_DEVICES={value!r} hides them; FP8 runs on the CPU"
        return Verdict("slow", topic, text)
    return Verdict(
        "install",
        topic,
        f"driver {m.driver} and torch's CUDA {m.torch_cuda} suit each other, but torch finds no "
        "GPU: does `nvidia-smi` list one in this container?",
    )


def _kind_of_gpu(m: Machine, gpu: Gpu, topic: str) -> Verdict:
    if not m.built_cuda:
        return Verdict(
            "install",
            topic,
            "fp8 was built without CUDA: build it where nvcc is (CMAKE_ARGS=-DFP8_CUDA=ON); now "
            "its operators raise on CUDA tensors",
        )
    oldest = min(m.architectures, default=0)
    if gpu.capability < oldest:
        return Verdict(
            "install",
            topic,
            f"fp8 was built for {_dotted(oldest)} and newer: build it with CMAKE_ARGS="
            f"'-DFP8_CUDA_ARCHITECTURES=\"{gpu.capability};{oldest}\"'",
        )
    if gpu.capability < 89:
        return Verdict(
            "slow",
            topic,
            "no FP8 tensor cores before 8.9: every recipe dequantizes and multiplies in 16 bits; "
            "nn.Linear is faster here",
        )
    if gpu.capability != 90:
        return Verdict(
            "slow",
            topic,
            "tensorwise and delayed use FP8 tensor cores; cuBLASLt has scales per row and block "
            "on 9.0 alone, so rowwise, blockwise, experts dequantize first: prefer tensorwise",
        )
    return Verdict("ok", topic, "FP8 tensor cores in every recipe")


def _driver(m: Machine) -> Iterator[Verdict]:
    if not (m.gpus and m.driver and m.torch_cuda):
        return
    needed = _DRIVER_OF_CUDA.get(_major(m.torch_cuda), 0)
    if _major(m.driver) >= needed:
        yield Verdict("ok", "driver", f"{m.driver}, for CUDA {m.torch_cuda}")
    else:
        yield Verdict(
            "note",
            "driver",
            f"{m.driver} runs CUDA {m.torch_cuda} by a compatibility package, it seems: {needed} "
            "and newer do by themselves",
        )


def _cublaslt(m: Machine) -> Iterator[Verdict]:
    topic = "cuBLASLt"
    foreign = [path for path, own in m.cublaslt_files if not own]
    if foreign:
        yield Verdict(
            "install",
            topic,
            f"{foreign[0]} is loaded, not torch's own: take its folder out of LD_LIBRARY_PATH",
        )
    elif len(m.cublaslt_files) > 1:
        paths = " and ".join(path for path, _ in m.cublaslt_files)
        yield Verdict("install", topic, f"two are loaded, {paths}: keep one")
    if not m.built_cuda or m.cublaslt in ("", "none", "unknown"):
        return
    if _numbers(m.cublaslt)[:2] == _numbers(CUBLASLT):
        yield Verdict("ok", topic, f"{m.cublaslt}, what its guards were written for")
    else:
        newer = "newer" if _numbers(m.cublaslt) > _numbers(CUBLASLT) else "older"
        yield Verdict(
            "note",
            topic,
            f"{m.cublaslt} is {newer} than {CUBLASLT}, which the guards against its defects were "
            "written for: not tested with fp8",
        )


def _fallbacks(m: Machine) -> Iterator[Verdict]:
    if m.fallbacks:
        yield Verdict(
            "slow",
            "matmuls",
            f"{m.fallbacks} calls of this process found no cuBLASLt algorithm and dequantized: "
            "FP8_PRINT_PLAN=1 names them",
        )


def _binding(m: Machine) -> Iterator[Verdict]:
    if m.binding:
        yield Verdict(
            "install",
            "fp8._C",
            f"not there ({m.binding}): operators run, autotune and plan cache facts do not; "
            "build fp8 with this Python",
        )


def _transformers(m: Machine) -> Iterator[Verdict]:
    topic = "transformers"
    if not m.transformers:
        return
    if m.transformers == TRANSFORMERS:
        yield Verdict("ok", topic, f"{m.transformers}, what fusions were tried with")
    else:
        yield Verdict(
            "note",
            topic,
            f"{m.transformers}; fusions were tried with {TRANSFORMERS}. What is not recognized "
            "stays as it is: print(fp8.summary(model)) shows it",
        )


def _environment(m: Machine) -> Iterator[Verdict]:
    for name, value in sorted(m.environment.items()):
        if name in _SLOWING and value not in ("", "0"):
            yield Verdict("slow", name, f"{value}: {_SLOWING[name]}; unset it but to debug")
        elif name.startswith("FP8_") and name not in VARIABLES:
            text = f"fp8 has no such variable; it has {', '.join(VARIABLES)}"
            yield Verdict("note", name, text)


def _numbers(version: str) -> tuple[int, ...]:
    """(13, 1, 0) of '13.1.0'; of '2.11.0+cu130' (2, 11, 0)."""
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def _major(version: str) -> int:
    return _numbers(version)[0] if version else 0


def _minor(version: str) -> tuple[int, ...]:
    return _numbers(version)[:2]


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
