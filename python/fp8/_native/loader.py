"""Loads the native library, and says what to do when it cannot be loaded.

`lib/libfp8_torch.so` registers the operators (namespace `torch.ops.fp8`). It uses ordinary LibTorch
symbols, so it fits one minor version of torch; that is checked before it is loaded, because a
mismatch may also crash later. `_C` holds the little that is no operator (build facts, plan cache)
and is imported only when asked for.
"""

import importlib
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = PACKAGE / "lib" / "libfp8_torch.so"

_BUILD_IT = (
    "in a clone of the repository run `make build` (and put its python/ on PYTHONPATH), "
    "or `pip install --no-build-isolation .` to install it beside your torch"
)
_REBUILD = "build fp8 again with the torch of this environment: " + _BUILD_IT


class Build(NamedTuple):
    """What the native library was built for, read from `_build.py` (written by CMake)."""

    version: str  # of fp8: "0.1.0"
    torch: str  # "2.11.0+cu130"
    cuda: str  # "13.0"; empty when built without CUDA


def load() -> Build:
    """Register the operators. Raises ImportError, with the cause and the cure, when that fails."""
    build = read_build()
    if _minor(torch.__version__) != _minor(build.torch):
        why = (
            f"it was built for torch {build.torch}, but torch {torch.__version__} is running; "
            "LibTorch's ABI holds within one minor version only"
        )
        cure = f"install torch {_minor(build.torch)}.*, or {_REBUILD}"
        raise ImportError(_message(why, cure, build))
    if not LIBRARY.exists():
        raise ImportError(
            _message(f"{LIBRARY} is missing: it has not been built", _BUILD_IT, build)
        )
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        linker = str(error.__cause__ or error)  # torch wraps the dynamic linker's message
        why, cure = _diagnose(linker, build)
        raise ImportError(_message(why, cure, build, linker)) from error
    return build


def native() -> ModuleType:
    """The pybind11 module `fp8._C`. Raises ImportError when it was built for another Python."""
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
    return Build(facts.VERSION, facts.TORCH_VERSION, facts.CUDA_VERSION)


def _minor(version: str) -> str:
    """'2.11.0+cu130' -> '2.11'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _diagnose(error: str, build: Build) -> tuple[str, str]:
    """The probable cause and the cure of a failed dlopen, from the dynamic linker's message."""
    if build.cuda and torch.version.cuda is None:
        return (
            f"it was built with CUDA {build.cuda}, but this torch ({torch.__version__}) has none",
            f"install a CUDA build of torch {_minor(build.torch)}, or {_REBUILD}",
        )
    cuda_library = re.search(r"(lib(?:cublas\w*|cudart|c10_cuda|torch_cuda)\.so[.\d]*)", error)
    if cuda_library and "undefined symbol" not in error:
        return (
            f"{cuda_library[1]} was not found; fp8 was built with CUDA {build.cuda} and uses the "
            f"CUDA libraries that torch brings (this torch: CUDA {torch.version.cuda})",
            f"install torch {_minor(build.torch)} with the same CUDA major version, together with "
            f"its nvidia-* packages, or {_REBUILD}",
        )
    if "undefined symbol" in error:
        return (
            f"a symbol is missing: this torch ({torch.__version__}) has another ABI, or another "
            f"CUDA version, than the one that fp8 was built against ({build.torch})",
            _REBUILD,
        )
    if re.search(r"(GLIBC|GLIBCXX|CXXABI)_", error):
        return "it was built on a system with newer C or C++ libraries than this one", _REBUILD
    return "the dynamic linker refused it (its message is below)", _REBUILD


def _message(why: str, cure: str, build: Build | None, linker: str | None = None) -> str:
    here = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"Python {platform.python_version()}"
    )
    lines = ["fp8 cannot load its native library.", f"  Why:     {why}.", f"  Cure:    {cure}."]
    if build is not None:
        target = f"torch {build.torch}, CUDA {build.cuda or 'none'}"
        lines.append(f"  Built:   fp8 {build.version} for {target}")
    lines.append(f"  Running: {here}")
    if linker is not None:
        lines.append(f"  Linker:  {linker}")
    return "\n".join(lines)
