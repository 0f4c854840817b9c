"""Loads the native library, and says what to do when it cannot be loaded.

`lib/torch2.11/libfp8_torch.so` registers the operators (namespace `torch.ops.fp8`) in torch 2.11.
It uses ordinary LibTorch symbols, so it fits one minor version; a package has one for each that it
is for, and a mismatch is found before anything is loaded, because it may also crash later. All of
them use `lib/libfp8_core.so`, the kernels, or, where torch has no CUDA, the same functions without
any, `lib/without_cuda/libfp8_core.so`. `_C` holds the little that is no operator (build facts, plan
cache) and is imported only when asked for.
"""

import ctypes
import importlib
import json
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .versions import minor

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = PACKAGE / "lib"

_BUILD_IT = (
    "in a clone of the repository run `make build` (and put its python/ on PYTHONPATH), "
    "or `pip install --no-build-isolation .` to install it beside your torch"
)
_REBUILD = (
    "`python -m fp8_rebuild` compiles what fits this environment (no nvcc; it needs a C++ compiler "
    "and cmake); in a clone of the repository `make build`"
)


class Build(NamedTuple):
    """What the native libraries were built for."""

    version: str  # of fp8: "0.1.0"
    cuda: str  # "13.0"; empty when built without CUDA
    torches: dict[str, str]  # minor -> what its library was built with: {"2.11": "2.11.0+cu130"}

    @property
    def torch(self) -> str:
        """What the library for the running torch was built with; "none" without one."""
        return self.torches.get(minor(torch.__version__), "none")


def load() -> Build:
    """Register the operators. Raises ImportError, with the cause and the cure, when that fails."""
    build = read_build()
    if not build.torches:
        why = f"{LIBRARIES / 'torch*' / 'libfp8_torch.so'} is missing: it has not been built"
        raise ImportError(_message(why, _BUILD_IT, build))
    if minor(torch.__version__) not in build.torches:
        why = (
            f"it was built for torch {_listed(build)}, but torch {torch.__version__} is running; "
            "LibTorch's ABI holds within one minor version only"
        )
        cure = f"install torch {_newest(build)}.*, or {_REBUILD}"
        raise ImportError(_message(why, cure, build))
    try:
        if build.cuda and torch.version.cuda is None:
            # The next library asks for this name, and finds the one that is loaded already.
            ctypes.CDLL(str(LIBRARIES / "without_cuda" / "libfp8_core.so"))
        library = LIBRARIES / f"torch{minor(torch.__version__)}" / "libfp8_torch.so"
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        linker = str(error.__cause__ or error)  # torch wraps the dynamic linker's message
        why, cure = _diagnose(linker, build)
        raise ImportError(_message(why, cure, build, linker)) from error
    return build


def native() -> ModuleType:
    """The pybind11 module `fp8._C`. Raises ImportError when there is none for this Python."""
    try:
        return importlib.import_module("fp8._C")
    except ImportError as error:
        found = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
        why = (
            f"fp8._C cannot be imported by Python {platform.python_version()}; "
            f"found: {', '.join(found) or 'none'}"
        )
        raise ImportError(_message(why, _REBUILD, read_build(), str(error))) from error


def read_build() -> Build:
    """The build's facts. Raises ImportError when there has been no build."""
    try:
        facts = importlib.import_module("fp8._build")
    except ImportError as error:
        why = f"{PACKAGE / '_build.py'} is missing: it has not been built"
        raise ImportError(_message(why, _BUILD_IT, None)) from error
    return Build(facts.VERSION, facts.CUDA_VERSION, _torches(facts.VERSION))


def _torches(version: str) -> dict[str, str]:
    """The libraries of this version of fp8: what fp8_rebuild left before an upgrade is none."""
    found = {}
    for path in LIBRARIES.glob("torch*/build.json"):
        facts = json.loads(path.read_text())
        if facts["fp8"] == version and path.with_name("libfp8_torch.so").exists():
            found[path.parent.name.removeprefix("torch")] = facts["torch"]
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _newest(build: Build) -> str:
    return list(build.torches)[-1]


def _listed(build: Build) -> str:
    """'2.11.0+cu130', or '2.11, 2.12 and 2.13' for several."""
    if len(build.torches) == 1:
        return next(iter(build.torches.values()))
    *first, last = build.torches
    return f"{', '.join(first)} and {last}"


def _diagnose(error: str, build: Build) -> tuple[str, str]:
    """The probable cause and the cure of a failed dlopen, from the dynamic linker's message."""
    cuda_library = re.search(r"(lib(?:cublas\w*|cudart|c10_cuda|torch_cuda)\.so[.\d]*)", error)
    if cuda_library and "undefined symbol" not in error:
        return (
            f"{cuda_library[1]} was not found; fp8 was built with CUDA {build.cuda} and uses the "
            f"CUDA libraries that torch brings (this torch: CUDA {torch.version.cuda})",
            f"install torch {minor(torch.__version__)} for CUDA {build.cuda.split('.')[0]}, "
            "together with its nvidia-* packages, or one without CUDA, or build fp8 from its "
            f"sources: {_BUILD_IT}",
        )
    if "undefined symbol" in error:
        return (
            f"a symbol is missing: this torch ({torch.__version__}) has another ABI than the one "
            f"that fp8 was built against ({build.torch})",
            _REBUILD,
        )
    if re.search(r"(GLIBC|GLIBCXX|CXXABI)_", error):
        return (
            "it was built on a system with newer C or C++ libraries than this one",
            f"build fp8 from its sources: {_BUILD_IT}",
        )
    return "the dynamic linker refused it (its message is below)", _REBUILD


def _message(why: str, cure: str, build: Build | None, linker: str | None = None) -> str:
    here = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"Python {platform.python_version()}"
    )
    lines = ["fp8 cannot load its native library.", f"  Why:     {why}.", f"  Cure:    {cure}."]
    if build is not None:
        targets = ", ".join(build.torches.values()) or "none"
        lines.append(
            f"  Built:   fp8 {build.version} for torch {targets}; CUDA {build.cuda or 'none'}"
        )
    lines.append(f"  Running: {here}")
    if linker is not None:
        lines.append(f"  Linker:  {linker}")
    return "\n".join(lines)
