"""Importing fp8: quick, without CUDA, and with one clear message when it cannot work."""

import json
import os
import shutil
import sys
from pathlib import Path

import new_process
import pytest
import torch

import fp8
from fp8 import _build
from fp8._native import loader as _loader

PACKAGE = Path(fp8.__file__).parent


@pytest.fixture
def failing_load(monkeypatch):
    """Make the dynamic linker refuse the library with the given message, as torch reports it."""

    def refuse(linker):
        def load_library(path):
            raise OSError(f"Could not load this library: {path}") from OSError(linker)

        monkeypatch.setattr(torch.ops, "load_library", load_library)

    return refuse


@pytest.fixture
def build(monkeypatch):
    """Pretend that the library was built for something else."""

    def pretend(**facts):
        real = _loader.read_build()
        monkeypatch.setattr(_loader, "read_build", lambda: real._replace(**facts))

    return pretend


def test_load_can_be_repeated():
    assert _loader.load() == _loader.load()
    assert _loader.load().version == fp8.__version__


def test_load_without_a_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "fp8._build", None)
    with pytest.raises(ImportError, match=r"_build.py is missing: it has not been built") as raised:
        _loader.load()
    assert "make build" in str(raised.value)
    assert "pip install --no-build-isolation ." in str(raised.value)
    assert isinstance(raised.value.__cause__, ImportError)


def test_load_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_loader, "LIBRARIES", tmp_path)
    with pytest.raises(ImportError, match=r"libfp8_torch.so is missing: it has not been") as raised:
        _loader.load()
    assert "make build" in str(raised.value)


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """A folder of libraries that are no more than names and facts."""

    def make(version=fp8.__version__, **torches):
        for folder, built_with in torches.items():
            place = tmp_path / folder.replace("_", ".")
            place.mkdir()
            (place / "libfp8_torch.so").write_bytes(b"")
            facts = {"fp8": version, "torch": built_with, "compiler": "GNU"}
            (place / "build.json").write_text(json.dumps(facts))

    monkeypatch.setattr(_loader, "LIBRARIES", tmp_path)
    return make


def test_load_takes_the_library_of_the_running_torch(monkeypatch, libraries):
    libraries(torch2_9="2.9.1", torch2_11="2.11.0+cu130", torch2_100="2.100.0")
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(_loader.ctypes, "CDLL", lambda path: None)
    for version in ("2.11.5+cpu", "2.100.1"):
        monkeypatch.setattr(torch, "__version__", version)
        _loader.load()
    assert [Path(path).parent.name for path in loaded] == ["torch2.11", "torch2.100"]
    assert list(_loader.read_build().torches) == ["2.9", "2.11", "2.100"]


def test_load_ignores_what_another_version_of_fp8_left(monkeypatch, libraries):
    libraries(version="0.0.1", torch2_99="2.99.0")
    libraries(torch2_11="2.11.0")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(ImportError, match=r"it was built for torch 2\.11\.0, but torch 2\.99\.0"):
        _loader.load()


def test_load_needs_the_library_beside_its_facts(libraries, tmp_path):
    libraries(torch2_11="2.11.0", torch2_12="2.12.0")
    (tmp_path / "torch2.12/libfp8_torch.so").unlink()
    assert _loader.read_build().torches == {"2.11": "2.11.0"}


def test_load_with_a_torch_that_none_of_several_fits(monkeypatch, libraries):
    libraries(torch2_11="2.11.0+cu130", torch2_12="2.12.1+cu130", torch2_13="2.13.0+cu130")
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    with pytest.raises(ImportError, match=r"built for torch 2\.11, 2\.12 and 2\.13, but") as raised:
        _loader.load()
    assert "install torch 2.13.*, or `python -m fp8_rebuild` compiles" in str(raised.value)


@pytest.mark.parametrize(("cuda", "first"), [("13.0", True), ("", False)])
def test_load_without_cuda_takes_the_core_without_cuda(monkeypatch, build, cuda, first):
    build(cuda=cuda)
    order = []
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_loader.ctypes, "CDLL", order.append)
    monkeypatch.setattr(torch.ops, "load_library", order.append)
    _loader.load()
    names = ["/".join(Path(path).parts[-2:]) for path in order]
    expected = ["without_cuda/libfp8_core.so"] if first else []
    assert names[:-1] == expected
    assert names[-1].endswith("/libfp8_torch.so")


@pytest.mark.parametrize("version", ["2.10.1+cu130", "2.12.0", "3.11.0", "2.12.0.dev20260101+cpu"])
def test_load_with_another_torch(monkeypatch, build, version):
    build(torches={"2.11": "2.11.0+cu130"})
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"built for torch 2\.11\.0\+cu130, but torch ") as raised:
        _loader.load()
    assert f"torch {version} is running" in str(raised.value)
    assert "install torch 2.11.*, or `python -m fp8_rebuild`" in str(raised.value)


def test_load_with_another_patch_release_of_torch(monkeypatch):
    number = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(torch, "__version__", f"{number}.77+cpu")
    assert _loader.load().torch == _loader.read_build().torches[number]


@pytest.mark.parametrize("library", ["libcublasLt.so.13", "libcudart.so.13", "libtorch_cuda.so"])
def test_load_without_a_cuda_library(monkeypatch, build, failing_load, library):
    build(cuda="13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    linker = f"{library}: cannot open shared object file: No such file or directory"
    failing_load(linker)
    with pytest.raises(ImportError, match=f"{library} was not found") as raised:
        _loader.load()
    text = str(raised.value)
    assert "built with CUDA 13.0" in text
    assert "this torch: CUDA 12.8" in text
    number = ".".join(torch.__version__.split(".")[:2])
    assert f"install torch {number} for CUDA 13, together with its nvidia-* packages" in text
    assert text.splitlines()[-1] == f"  Linker:  {linker}"


def test_load_with_another_abi(build, failing_load):
    build(cuda="")
    failing_load("libfp8_torch.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationESs")
    with pytest.raises(
        ImportError, match=r"has another ABI.*\n  Cure: +`python -m fp8_reb"
    ) as raised:
        _loader.load()
    assert "_ZN3c105ErrorC2ENS" in str(raised.value)


def test_load_on_an_older_system(build, failing_load):
    build(cuda="")
    failing_load("libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by libfp8_torch.so)")
    with pytest.raises(ImportError, match="system with newer C or C\\+\\+ libraries") as raised:
        _loader.load()
    assert "build fp8 from its sources" in str(raised.value)  # the core is too new as well


def test_load_of_a_broken_file_shows_the_linkers_words(monkeypatch, tmp_path, build, libraries):
    number = ".".join(torch.__version__.split(".")[:2])
    libraries(**{f"torch{number.replace('.', '_')}": torch.__version__})
    broken = tmp_path / f"torch{number}/libfp8_torch.so"
    broken.write_bytes(b"not an ELF file, but long enough to have a header" * 10)
    with pytest.raises(ImportError, match=r"the dynamic linker refused it") as raised:
        _loader.load()
    assert "Linker:  " in str(raised.value)
    assert "invalid ELF header" in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)


def test_native_of_another_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "fp8._C", None)
    with pytest.raises(ImportError, match=r"fp8\._C cannot be imported by Python 3\.") as raised:
        fp8.plan_cache_info()
    assert "python -m fp8_rebuild" in str(raised.value)
    with pytest.raises(ImportError, match="cannot be imported"):
        fp8.plan_cache_clear()


def test_every_message_says_what_is_running(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(ImportError, match=r"^fp8 cannot load its native library") as raised:
        _loader.load()
    labels = [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]]
    assert labels == ["Why", "Cure", "Built", "Running"]
    assert f"fp8 {fp8.__version__} for torch" in str(raised.value)


def run(code, *path):
    return new_process.python("-c", code, PYTHONPATH=os.pathsep.join(str(p) for p in path))


def test_package_serves_a_torch_without_cuda():
    """This torch may have CUDA, but says that it has none, and nothing of fp8's touches it."""
    code = """
import torch
torch.version.cuda = None
import fp8
y = fp8.Linear(32, 16)(torch.randn(4, 32))
y.sum().backward()
assert fp8.plan_cache_info()["capacity"] == 0
facts = fp8.info()
assert facts["cublaslt at run time"] == "none", facts
assert facts["this pair"]["gpu"] == "no CUDA here", facts
maps = open("/proc/self/maps").read()
print(*sorted({line.split()[-1] for line in maps.splitlines() if "libfp8_core" in line}))
"""
    result = run(code, PACKAGE.parent, os.environ.get("PYTHONPATH", ""))
    assert result.returncode == 0, result.stderr
    folder = "without_cuda" if _build.CUDA_VERSION else "lib"
    assert Path(result.stdout.strip()).parts[-2:] == (folder, "libfp8_core.so")


def test_import_of_an_unbuilt_package_says_how_to_build(tmp_path):
    built = shutil.ignore_patterns("_build.py", "*.so", "lib", "include", "share", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fp8", ignore=built)
    result = run("import fp8", tmp_path)
    assert result.returncode != 0
    assert "ImportError: fp8 cannot load its native library" in result.stderr
    assert "make build" in result.stderr


def test_import_is_quick_and_leaves_cuda_alone():
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import fp8
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized()
assert "torch.distributed.tensor" not in set(sys.modules) - before
assert "fp8._C" not in set(sys.modules) - before
print(seconds)
"""
    result = run(code, PACKAGE.parent, os.environ.get("PYTHONPATH", ""))
    assert result.returncode == 0, result.stderr
    # Loading the library takes some tens of ms. A second leaves room for a slow disk.
    assert float(result.stdout) < 1.0


def test_public_names():
    assert set(fp8.__all__) == {
        *(
            "FrozenExperts",
            "FrozenLinear",
            "GROUPED_RECIPES",
            "RECIPES",
            "GatedMLP",
            "GroupedLinear",
            "Linear",
            "MLP",
            "MergedLinear",
            "RMSNorm",
            "Recipe",
            "__version__",
            "autotune",
            "batch_invariant",
            "cached_weights",
            "calibrate",
            "cmake_prefix_path",
            "convert",
            "export_weights",
            "freeze",
            "info",
            "load",
            "numerics",
            "ops",
        ),
        *("plan_cache_clear", "plan_cache_info", "revert", "save", "summary", "uncalibrate"),
    }
    assert all(hasattr(fp8, name) for name in fp8.__all__)
    assert Path(fp8.cmake_prefix_path) == PACKAGE.resolve() / "share/cmake"
    assert (PACKAGE / "py.typed").exists()


def test_version_is_the_one_in_the_version_file():
    file = PACKAGE.parents[1] / "VERSION"
    if not file.exists():
        pytest.skip("not run from a clone")
    assert file.read_text().strip() == fp8.__version__
