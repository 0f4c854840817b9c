"""Rules for the libraries that CMake puts into the package: they must work on another machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp8
from fp8 import _build

PACKAGE = Path(fp8.__file__).parent
CORE = PACKAGE / "lib/libfp8_core.so"
CORES = [CORE, *PACKAGE.glob("lib/without_cuda/libfp8_core.so")]
TORCH = PACKAGE / f"lib/torch{'.'.join(torch.__version__.split('.')[:2])}/libfp8_torch.so"
EXTENSION = next(iter(PACKAGE.glob("_C.*.so")), PACKAGE / "_C.so")
LIBRARIES = [*CORES, TORCH, EXTENSION]
ids = [path.relative_to(PACKAGE).as_posix().split(".so")[0] for path in LIBRARIES]

pytestmark = pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
built_with_cuda = pytest.mark.skipif(not _build.CUDA_VERSION, reason="built without CUDA")


def dynamic_section(library: Path, kind: str) -> list[str]:
    """Values of one kind in the dynamic section: NEEDED, SONAME, RPATH or RUNPATH."""
    text = subprocess.check_output(["readelf", "--dynamic", "--wide", library], text=True)
    return re.findall(rf"\({kind}\)[^\[]*\[([^\]]*)\]", text)


def undefined_symbols(library: Path) -> list[str]:
    text = subprocess.check_output(["nm", "--dynamic", "--undefined-only", library], text=True)
    return [line.split()[-1] for line in text.splitlines()]


@pytest.mark.parametrize("library", LIBRARIES, ids=ids)
def test_library_is_in_the_package(library):
    assert library.is_file()


@pytest.mark.parametrize("library", LIBRARIES, ids=ids)
def test_library_has_no_absolute_rpath(library):
    paths = dynamic_section(library, "RPATH") + dynamic_section(library, "RUNPATH")
    for entry in ":".join(paths).split(":"):
        assert entry == "" or entry.startswith("$ORIGIN"), f"{library.name}: {paths}"


@pytest.mark.parametrize("library", LIBRARIES, ids=ids)
def test_library_needs_names_not_paths(library):
    for name in dynamic_section(library, "NEEDED"):
        assert "/" not in name


@built_with_cuda
def test_core_needs_cublaslt_by_the_soname_that_torch_brings():
    wanted = [name for name in dynamic_section(CORE, "NEEDED") if "cublasLt" in name]
    assert wanted == [f"libcublasLt.so.{_build.CUDA_VERSION.split('.')[0]}"]


@pytest.mark.parametrize("core", CORES, ids=ids[: len(CORES)])
def test_core_needs_no_torch(core):
    needed = dynamic_section(core, "NEEDED")
    assert not [name for name in needed if re.match(r"lib(torch|c10|python)", name)]
    assert not [name for name in undefined_symbols(core) if re.search(r"N2at|N3c10|N5torch", name)]


@pytest.mark.parametrize("library", [TORCH, EXTENSION], ids=["torch", "C"])
def test_library_for_torch_needs_no_cuda(library):
    """So it serves a torch without CUDA too: CUDA is reached through libfp8_core and c10."""
    needed = dynamic_section(library, "NEEDED")
    assert not [name for name in needed if re.search(r"cuda|cublas", name)]
    assert "libfp8_core.so" in needed
    symbols = undefined_symbols(library)
    assert not [name for name in symbols if re.match(r"cuda[A-Z]|cublas", name)]
    assert not [name for name in symbols if re.search(r"N3c104cuda|N2at4cuda", name)]


def test_core_without_cuda_has_every_function_that_is_asked_for():
    (core,) = CORES[1:] or [CORE]
    text = subprocess.check_output(["nm", "--dynamic", "--defined-only", core], text=True)
    defined = {line.split()[-1] for line in text.splitlines()}
    for library in (TORCH, EXTENSION):
        wanted = {name for name in undefined_symbols(library) if "3fp84core" in name}
        assert wanted <= defined, library
    assert not [name for name in dynamic_section(core, "NEEDED") if re.search("cuda|cublas", name)]


@pytest.mark.parametrize("library", LIBRARIES[:-1], ids=ids[:-1])
def test_library_needs_no_python(library):
    assert not [name for name in dynamic_section(library, "NEEDED") if "python" in name]
    assert not [name for name in undefined_symbols(library) if re.match(r"_?Py[A-Z_]", name)]


@built_with_cuda
@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
def test_process_uses_torchs_own_cublaslt():
    program = (
        "import torch, fp8; fp8.info()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print('\\n'.join(sorted({word for word in maps if 'libcublasLt.so' in word})))"
    )
    environment_paths = [path for path in sys.path if path]
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {environment_paths!r}\n{program}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert len(loaded) == 1, loaded
    # The wheel keeps it in nvidia/, beside torch/.
    assert Path(loaded[0]).is_relative_to(Path(torch.__file__).resolve().parents[1]), loaded
