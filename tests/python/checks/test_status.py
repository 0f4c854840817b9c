"""The JSON that the long checks leave, and the table of it in docs/devices.md."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import documents
import pytest
import report
import runs
import status
import torch

ROOT = Path(__file__).parents[3]


def test_status_says_what_ran_where_and_when(tmp_path, monkeypatch):
    monkeypatch.setenv("FP8_COMMIT", "abc1234+")
    failures = [{"what": "y", "seed": 7}]
    path = status.write("fuzz", {"cases": 10, "failed": 1}, failures, 1.25, tmp_path, {"seed": 7})
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    assert path.name == f"status_fuzz_{runs.slug(gpu) if gpu else 'cpu'}.json"
    run = json.loads(path.read_text())
    assert run["check"] == "fuzz"
    assert run["passed"] is False
    assert run["failures"] == failures
    assert run["counts"] == {"cases": 10, "failed": 1}
    header = run["header"]
    assert {"gpu", "driver", "cuda", "torch", "cublaslt", "fp8", "command"} <= set(header)
    assert (header["commit"], header["dirty"], header["seed"]) == ("abc1234+", True, 7)
    assert header["wall_s"] == 1.2
    assert time.strptime(header["date"], "%Y-%m-%d %H:%M UTC")


@pytest.mark.parametrize(("commit", "dirty"), [("abc1234", False), ("", None)])
def test_status_of_a_clean_tree_and_of_an_unknown_one(tmp_path, monkeypatch, commit, dirty):
    monkeypatch.setattr(runs, "git_commit", lambda: commit)
    run = json.loads(status.write("soak", {}, [], 1, tmp_path).read_text())
    assert run["header"]["dirty"] is dirty
    assert run["passed"]


def test_results_of_runs_do_not_make_a_tree_dirty(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    for path in (tmp_path / "source", results / "status_fuzz_cpu.json"):
        path.write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.delenv("FP8_COMMIT", raising=False)
    (results / "status_fuzz_cpu.json").write_text("b")
    assert not runs.git_commit().endswith("+")
    (tmp_path / "source").write_text("b")
    assert runs.git_commit().endswith("+")


def test_arguments_make_another_run():
    assert status.folder_of([]) == status.RESULTS
    assert status.folder_of("") == status.RESULTS
    assert status.folder_of(["--seed", "7"]) == status.PARTIAL
    assert status.folder_of("-k rowwise") == status.PARTIAL


JUNIT = """<testsuites><testsuite tests="4">
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><skipped message="no"/></testcase>
<testcase classname="a" name="three"><failure message="wrong">text</failure></testcase>
<testcase classname="a" name="four"><error message="broken">text</error></testcase>
</testsuite></testsuites>"""


def test_status_from_test_reports(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(JUNIT)
    counts, failures = status.from_junit([path])
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert [f["what"] for f in failures] == ["a::three", "a::four"]
    assert failures[0]["error"] == "wrong"


def test_status_from_sanitizer_logs(tmp_path):
    texts = {
        "memcheck": "op_sweep: 12 calls\n========= ERROR SUMMARY: 0 errors\n",
        "grouped": "op_sweep: 5 calls\n========= ERROR SUMMARY: 3 errors\n",
        "racecheck": "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)\n",
    }
    logs = []
    for name, code in (("memcheck", 0), ("grouped", 9), ("racecheck", 0)):
        (tmp_path / name).write_text(texts[name])
        logs.append(f"{name}={code}={tmp_path / name}")
    counts, failures = status.from_logs(logs)
    assert counts == {"passed": 1, "failed": 2, "calls": 17, "errors": 4}
    assert [f["what"] for f in failures] == ["grouped", "racecheck"]


@pytest.mark.parametrize("arguments", [[], ["--junit", "/nowhere/*.xml"]])
def test_status_of_tests_that_never_ran_is_a_failure(monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(status, "RESULTS", tmp_path)
    shown = []
    monkeypatch.setattr(status, "show", lambda: shown.append("docs/devices.md"))
    command = ["status.py", "test-gpu", "--begin", "0", "--status", "2", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    assert status.main() == 0
    (run,) = status.load(tmp_path)
    assert run["failures"] == [{"what": "test-gpu", "error": "exit status 2"}]
    assert run["header"]["command"] == "make test-gpu"
    assert shown == ["docs/devices.md"]  # a whole run is for the page


def test_table_of_the_checks(tmp_path, monkeypatch):
    monkeypatch.setenv("FP8_COMMIT", "abc1234")
    assert "make soak" in status.table(status.load(tmp_path))
    status.write("soak", {"steps": 20000, "failed": 1}, [{"what": "threads"}], 200, tmp_path)
    status.write("fuzz", {"cases": 9000, "failed": 0, "linear": 4000}, [], 180, tmp_path)
    fuzz, soak = status.table(status.load(tmp_path)).splitlines()[2:]
    assert fuzz.startswith("| `make fuzz` |")
    assert "| passed | 9000 cases, 0 failed |" in fuzz
    assert "| 1 failures | 20000 steps, 1 failed |" in soak
    assert "abc1234" in soak
    assert report.load(tmp_path) == {}  # no benchmark, and no complaint


def test_a_check_writes_its_page_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    page = tmp_path / "docs/devices.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- checks:begin -->\nold\n<!-- checks:end -->\nb\n")
    status.write("soak", {"steps": 10, "failed": 0}, [], 200, tmp_path)
    assert documents.write_checks(tmp_path) == page
    head, *_, line, end, tail = page.read_text().splitlines()
    assert (head, end, tail) == ("a", "<!-- checks:end -->", "b")
    assert line.startswith("| `make soak` |")
