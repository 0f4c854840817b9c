"""Verdicts on machines, this one's among them."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fp8
from fp8.tools import _doctor, _info
from fp8.tools._doctor import Gpu, Machine

ROOT = Path(__file__).resolve().parents[3]

H200 = Gpu("NVIDIA H200", 90)
GOOD = Machine(
    built_torch="2.11.0+cu130",
    built_cuda="13.0",
    architectures=(90,),
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    gpus=(H200,),
    driver="580.65.06",
    cublaslt="13.1.0",
    cublaslt_files=(("/site/nvidia/cu13/lib/libcublasLt.so.13", True),),
    transformers=_doctor.TRANSFORMERS,
)
CPU = Machine(built_torch="2.11.0+cpu", torch="2.11.0+cpu", cublaslt="none")


def judged(machine: Machine = GOOD, **changes: Any) -> list[tuple[str, str, str]]:
    found = _doctor.verdicts(dataclasses.replace(machine, **changes))
    return [(verdict.status, verdict.topic, verdict.text) for verdict in found]


def test_doctor_finds_nothing_wrong_with_a_good_machine():
    assert [(status, topic) for status, topic, _ in judged()] == [
        ("ok", "torch"),
        ("ok", "cuda:0 (NVIDIA H200, 9.0)"),
        ("ok", "driver"),
        ("ok", "cuBLASLt"),
        ("ok", "transformers"),
        ("note", "if a model is slow all the same"),
    ]


@pytest.mark.parametrize(
    ("changes", "status", "topic", "text"),
    [
        # torch
        ({"built_torch": ""}, "install", "torch", "has not been built"),
        ({"torch": "2.11.1+cu130"}, "ok", "torch", "of one minor version with 2.11.0"),
        ({"torch": "2.12.0+cu130"}, "install", "torch", "fp8 was built for 2.11.0"),
        ({"torch_cuda": "12.8"}, "install", "torch", "install a torch of CUDA 13"),
        ({"torch_cuda": "13.2"}, "ok", "torch", "2.11.0"),
        # the GPU and the build
        ({"built_cuda": ""}, "install", "cuda:0", "fp8 was built without CUDA"),
        ({"gpus": (Gpu("L4", 89),)}, "install", "cuda:0 (L4, 8.9)", '"89;90"'),
        ({"gpus": (Gpu("L4", 89),), "architectures": (89, 90)}, "slow", "cuda:0", "tensorwise"),
        ({"gpus": (Gpu("B200", 100),)}, "slow", "cuda:0", "prefer tensorwise"),
        ({"gpus": (Gpu("A100", 80),), "architectures": (80,)}, "slow", "cuda:0", "before 8.9"),
        ({"gpus": (H200, Gpu("A100", 80))}, "install", "cuda:1 (A100, 8.0)", "9.0 and newer"),
        ({"gpus": (H200, Gpu("A100", 80), H200)}, "ok", "cuda:0,2 (NVIDIA H200, 9.0)", "every"),
        # no GPU for torch
        ({"gpus": (), "driver": ""}, "slow", "GPU", "no NVIDIA driver"),
        ({"gpus": (), "torch_cuda": ""}, "install", "GPU", "is CPU-only"),
        ({"gpus": (), "driver": "535.104.05"}, "install", "GPU", "580 or newer"),
        ({"gpus": (), "driver": "535.1", "torch_cuda": "12.8"}, "install", "GPU", "finds no GPU"),
        ({"gpus": ()}, "install", "GPU", "nvidia-smi"),
        (
            {"gpus": (), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
            *("slow", "GPU", "CUDA_VISIBLE_DEVICES='' hides them"),
        ),
        ({"driver": "535.104.05"}, "note", "driver", "compatibility package"),
        # cuBLASLt
        ({"cublaslt": "13.4.1"}, "note", "cuBLASLt", "newer than 13.1"),
        ({"cublaslt": "13.0.2"}, "note", "cuBLASLt", "older than 13.1"),
        ({"cublaslt": "13.1.3"}, "ok", "cuBLASLt", "13.1.3"),
        (
            {"cublaslt_files": (("/usr/local/cuda/lib64/libcublasLt.so.13", False),)},
            *("install", "cuBLASLt", "LD_LIBRARY_PATH"),
        ),
        (
            {"cublaslt_files": (("/a/libcublasLt.so.13", True), ("/b/libcublasLt.so.12", True))},
            *("install", "cuBLASLt", "two are loaded"),
        ),
        ({"fallbacks": 3}, "slow", "matmuls", "3 calls"),
        # the rest
        ({"binding": "no module"}, "install", "fp8._C", "no module"),
        ({"transformers": "4.57.0"}, "note", "transformers", "tried with 5.17.0"),
        ({"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, "slow", "CUDA_LAUNCH_BLOCKING", "unset"),
        ({"environment": {"FP8_AUTO_TUNE": "1"}}, "note", "FP8_AUTO_TUNE", "no such variable"),
    ],
)
def test_doctor_sees(changes, status, topic, text):
    found = judged(**changes)
    assert any(s == status and t.startswith(topic) and text in x for s, t, x in found), found


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers": ""},
        {"environment": {"CUDA_LAUNCH_BLOCKING": "0", "FP8_PRINT_PLAN": "1"}},
        {"environment": {"CUDA_VISIBLE_DEVICES": "0"}},
        {"fallbacks": 0},
    ],
)
def test_doctor_is_silent_about_what_is_well(changes):
    *found, (_, hint, _) = judged(**changes)
    assert hint == "if a model is slow all the same"
    assert {status for status, _, _ in found} == {"ok"}


def test_doctor_gives_the_hint_only_where_nothing_is_slow():
    for changes in ({"fallbacks": 3}, {"gpus": (Gpu("B200", 100),)}, {"binding": "x"}):
        assert not any("summary" in text for status, _, text in judged(**changes))


def test_doctor_of_a_machine_without_a_gpu():
    found = judged(CPU)
    assert [(status, topic) for status, topic, _ in found] == [("ok", "torch"), ("slow", "GPU")]


def test_verdict_is_one_line():
    for changes in ({}, {"gpus": ()}, {"gpus": (Gpu("A100", 80),)}, {"built_cuda": ""}):
        for verdict in _doctor.verdicts(dataclasses.replace(GOOD, **changes)):
            line = str(verdict)
            assert "\n" not in line
            assert line.startswith(verdict.status)


def test_doctor_knows_the_pinned_transformers():
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned is not None
    assert pinned[1] == _doctor.TRANSFORMERS


def test_doctor_knows_every_variable_that_is_read():
    """A name in quotes is one that is read, in Python and in C++."""
    sources = [*(ROOT / "csrc").rglob("*.[ch]*"), *(ROOT / "python").rglob("*.py")]
    names = {
        name
        for path in sources
        if path.name != "_doctor.py"
        for name in re.findall(r'(?:env\w*|get)\W{1,3}"(FP8_[A-Z_]+)"', path.read_text())
    }
    assert names == set(_doctor.VARIABLES)


def test_info_ends_with_the_verdicts_on_this_machine(monkeypatch):
    facts = fp8.info()
    assert list(facts)[-1] == "verdicts"
    assert facts["verdicts"][0].startswith("ok       torch: ")
    assert _info.report(facts).splitlines()[-1].split()[0] in ("ok", "slow", "install", "note")
    monkeypatch.setenv("FP8_AUTO_TUNE", "1")
    assert any("no such variable" in line for line in fp8.info()["verdicts"])


def test_verdicts_come_out_without_the_binding(monkeypatch):
    monkeypatch.setitem(sys.modules, "fp8._C", None)
    assert any(line.startswith("install  fp8._C") for line in fp8.info()["verdicts"])


@pytest.mark.gpu
def test_verdicts_on_this_gpu():
    assert any(re.match(r"\w+ +cuda:0 \(", line) for line in fp8.info()["verdicts"])
