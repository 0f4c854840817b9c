"""fp8.info, `python -m fp8` and the plan cache."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from new_process import python

import fp8
from fp8 import _build
from fp8.tools import _info

FACTS = [
    "fp8",
    "built with",
    "cublaslt at run time",
    "torch",
    "torch cuda",
    "python",
    "platform",
    "this pair",
    "pairs",
    "cublaslt files",
    "driver",
    "devices",
    "recipes",
    "environment",
    "plan cache",
    "autotune",
    "whole-GPU launches",
    "verdicts",
]


def test_info_has_every_fact_as_plain_data():
    facts = fp8.info()
    assert list(facts) == FACTS
    assert json.loads(json.dumps(facts)) == facts
    assert facts["fp8"] == fp8.__version__
    assert facts["torch"] == torch.__version__
    assert set(facts["built with"]) == {
        *("version", "torch", "cuda", "cublaslt", "archs", "compiler")
    }
    assert facts["built with"]["version"] == fp8.__version__
    assert list(facts["recipes"]["cpu"]) == list(fp8.RECIPES)


def test_info_reports_fp8_variables_only(monkeypatch):
    monkeypatch.setenv("FP8_PRINT_PLAN", "1")
    monkeypatch.setenv("NOT_FP8", "1")
    environment = fp8.info()["environment"]
    assert environment["FP8_PRINT_PLAN"] == "1"
    assert all(name.startswith("FP8_") for name in environment)


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA loads no cuBLASLt")
def test_info_finds_the_loaded_cublaslt():
    files = fp8.info()["cublaslt files"]
    assert len(files) == 1, files
    assert "libcublasLt.so" in files[0]["path"]
    assert Path(files[0]["path"]).exists()


def test_info_tells_torchs_own_libraries_from_others():
    package = Path(torch.__file__).parent
    assert _info._is_torchs(package / "lib" / "libcublasLt.so.13")
    assert _info._is_torchs(package.parent / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13")
    assert not _info._is_torchs(Path("/usr/local/cuda/lib64/libcublasLt.so.13"))


CORES, FALLBACK = _info._TENSOR_CORES, _info._FALLBACK


@pytest.mark.parametrize(
    ("capability", "tensorwise", "rowwise"),
    [
        (80, FALLBACK, FALLBACK),
        (89, CORES, FALLBACK),
        (90, CORES, CORES),
        (100, CORES, FALLBACK),
        (120, CORES, FALLBACK),
    ],
)
def test_recipe_status_by_capability(capability, tensorwise, rowwise):
    expected = {"tensorwise": tensorwise, "rowwise": rowwise, "blockwise": rowwise}
    for recipe in fp8.RECIPES.values():
        assert _info._status(recipe, capability, [90, 80]) == expected[recipe.granularity]


def test_recipe_status_of_a_build_for_other_devices():
    recipe = fp8.RECIPES["tensorwise"]
    assert _info._status(recipe, 90, []) == "none: this fp8 was built without CUDA"
    assert _info._status(recipe, 89, [120, 90]).endswith("built for compute capability 9.0 and up")


def test_recipe_status_reads_the_builds_architectures(monkeypatch):
    device = {"device": "cuda:0", "compute capability": "8.9"}
    monkeypatch.setattr(_info, "_devices", lambda: [device])
    for archs, expected in (("89,90", CORES), ("89;90", CORES), ("", "built without CUDA")):
        monkeypatch.setattr(_info, "_native_or_error", lambda name, archs=archs: {"archs": archs})
        assert expected in _info._recipe_status()["cuda:0"]["tensorwise"]


def test_recipe_status_without_the_binding(monkeypatch):
    device = {"device": "cuda:0", "compute capability": "9.0"}
    monkeypatch.setattr(_info, "_devices", lambda: [device])
    monkeypatch.setitem(sys.modules, "fp8._C", None)
    for cuda, expected in (("13.0", CORES), ("", "none: this fp8 was built without CUDA")):
        build = _info.loader.Build("0.1.0", cuda, {})
        monkeypatch.setattr(_info.loader, "read_build", lambda build=build: build)
        assert _info._recipe_status()["cuda:0"]["rowwise"] == expected


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul\nGCC 12.2.0",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release", "570.86"),
        ("nothing", "none"),
    ],
)
def test_driver_version_is_read_from_the_drivers_own_text(monkeypatch, text, version):
    monkeypatch.setattr(_info, "_driver_file", lambda: text)
    monkeypatch.setattr(_info, "_nvidia_smi", lambda: "")
    assert _info._driver_version() == version


def test_driver_version_comes_from_nvidia_smi_where_the_file_is_hidden(monkeypatch):
    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(_info, "_driver_file", missing)
    monkeypatch.setattr(_info, "_nvidia_smi", lambda: "580.65.06\n580.65.06\n")
    assert _info._driver_version() == "580.65.06"
    monkeypatch.setattr(_info, "_nvidia_smi", missing)
    assert _info._driver_version() == "none"


def test_info_comes_out_without_the_binding(monkeypatch):
    monkeypatch.setitem(sys.modules, "fp8._C", None)
    facts = fp8.info()
    assert "fp8._C" in facts["built with"]["not available"]
    assert facts["cublaslt at run time"] == "unknown"
    assert "not available" in _info.report(facts)


def test_report_is_one_screen():
    lines = _info.report(fp8.info()).splitlines()
    assert len(lines) < 40
    starts = [line.split("  ")[0] for line in lines if not line.startswith(" ")]
    assert starts == FACTS


def test_report_shows_nested_facts():
    facts = {
        "fp8": "0.1.0",
        "devices": [{"device": "cuda:0", "name": "GPU"}, {"device": "cuda:1", "name": "GPU"}],
        "environment": {},
        "plan cache": {"size": 1, "hits": 2},
    }
    assert _info.report(facts) == (
        "fp8          0.1.0\n"
        "devices      device: cuda:0, name: GPU\n"
        "             device: cuda:1, name: GPU\n"
        "environment  none\n"
        "plan cache   size: 1, hits: 2"
    )


@pytest.mark.parametrize("module", ["fp8", "fp8.info"])
def test_info_runs_as_a_command(module):
    result = python("-W", "error", "-m", module, FP8_PRINT_PLAN="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", result.stdout, re.MULTILINE)
    assert re.search(r"^(environment)? +FP8_PRINT_PLAN: 1$", result.stdout, re.MULTILINE)


def test_importing_the_info_module_leaves_the_function():
    result = python(
        "-c", "import fp8.info, fp8; print(fp8.info()['fp8']); from fp8.info import info"
    )
    assert result.stdout.strip() == fp8.__version__
    assert "ImportError" in result.stderr  # the module's place is taken by the function


@pytest.mark.skipif(not _build.CUDA_VERSION, reason="a build without CUDA cannot autotune")
@pytest.mark.parametrize(("value", "mode"), [("1", "on"), ("0", "off"), ("", "off")])
def test_info_shows_whether_autotune_is_on(value, mode):
    result = python("-c", "import fp8; print(fp8.info()['autotune']['mode'])", FP8_AUTOTUNE=value)
    assert result.stdout.strip() == mode, result.stderr


def test_info_shows_where_autotune_keeps_its_results(monkeypatch):
    gpus = [{"device": f"cuda:{index}", "name": "NVIDIA H200"} for index in (0, 1)]
    monkeypatch.setattr(_info, "_devices", lambda: gpus)
    (path,) = _info._autotune()["files"]
    assert path.startswith(os.environ["FP8_CACHE_DIR"])
    assert re.fullmatch(r"autotune-nvidia-h200-\d+\.txt", Path(path).name)


@pytest.mark.gpu
def test_info_describes_the_gpus():
    facts = fp8.info()
    name = torch.cuda.get_device_name(0)
    assert facts["devices"][0]["name"] == name
    assert set(facts["recipes"]) == {"cpu", *(d["device"] for d in facts["devices"])}
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["cublaslt at run time"])
    assert facts["driver"] != "none"


def test_plan_cache_has_its_statistics():
    facts = fp8.plan_cache_info()
    assert set(facts) == {"size", "capacity", "hits", "misses", "fallbacks", "tuned"}
    assert all(type(value) is int and value >= 0 for value in facts.values())


def test_plan_cache_clear_resets_it():
    assert fp8.plan_cache_clear() is None
    facts = fp8.plan_cache_info()
    assert not any(facts[key] for key in ("size", "hits", "misses", "fallbacks", "tuned"))


@pytest.mark.gpu
def test_plan_cache_counts_matmuls():
    fp8.plan_cache_clear()
    layer = fp8.Linear(64, 48, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        first = fp8.plan_cache_info()
        layer(x)
    second = fp8.plan_cache_info()
    assert (first["size"], first["misses"]) == (1, 1)
    assert (second["size"], second["misses"]) == (1, 1)
    assert second["hits"] == first["hits"] + 1
