"""When and where the long checks last passed: a small JSON file each, beside benchmark results.

From these, status_CHECK_GPU.json (or _cpu), the table in docs/devices.md is made.

`make fuzz`, `make soak` and `make sweep` call write(). For `make test-gpu` and `make sanitize`
their scripts run this file:

    python benchmarks/status.py test-gpu --begin EPOCH --arguments "$ARGS" --junit FILE ...
    python benchmarks/status.py sanitize --begin EPOCH --log NAME=STATUS=FILE ...
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import tables
from runs import RESULTS, ROOT, Row, header, slug

CHECKS = ("test-gpu", "sanitize", "fuzz", "soak", "sweep")
PARTIAL = ROOT / "build" / "status"


def folder_of(arguments: object) -> Path:
    """Where a result belongs: what arguments changed is no whole run, and not to be committed."""
    return PARTIAL if arguments else RESULTS


def write(
    check: str,
    counts: Row,
    failures: list[Row],
    seconds: float,
    folder: Path,
    facts: Row | None = None,
    command: str = "",
) -> Path:
    """counts: numbers by name. failures: what failed, with what brings it back (seed, step, test).
    facts: more for the header. A tree with changes has "dirty": true, null where nobody knows."""
    head = header()
    commit = head["commit"]
    head |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "dirty": commit.endswith("+") if commit else None,
        "wall_s": round(seconds, 1),
        **(facts or {}),
    }
    head["command"] = command or head["command"]
    run = {
        "check": check,
        "passed": not failures,
        "header": head,
        "counts": counts,
        "failures": failures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"status_{check}_{slug(head['gpu']) if head['gpu'] else 'cpu'}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    if folder == RESULTS:
        show()
    return path


def show() -> None:
    """Puts the table of what is in RESULTS onto its page."""
    import documents  # which imports this module

    documents.write_checks()


def load(folder: Path) -> list[Row]:
    """Every status in the folder, in the order of CHECKS, then by device."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("status_*.json"))]
    return sorted(found, key=lambda run: CHECKS.index(run["check"]))


def table(runs: list[Row]) -> str:
    """Markdown: a line for each check and device."""
    if not runs:
        return "No results yet of `make test-gpu`, `make sanitize`, `make fuzz`, `make soak`, ..."
    lines = []
    for run in runs:
        head = run["header"]
        counts = ", ".join(f"{n} {name}" for name, n in main_counts(run["counts"]).items())
        lines.append(
            [
                f"`make {run['check']}`",
                head["gpu"] or "CPU",
                "passed" if run["passed"] else f"{len(run['failures'])} failures",
                counts,
                head["date"].split()[0],
                head["commit"] or "unknown",
            ]
        )
    return tables.markdown(["check", "device", "result", "counts", "date", "commit"], lines)


def main_counts(counts: Row) -> Row:
    """Those that a reader looks for: cases of each family stay in the JSON."""
    known = ("passed", "failed", "skipped", "cases", "steps", "calls", "errors", "checks")
    return {name: n for name, n in counts.items() if name in known}


def from_junit(paths: list[Path]) -> tuple[Row, list[Row]]:
    """Counts and failures of pytest's and ctest's reports. A test with two reports counts once as
    failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for path in paths:
        for test in ElementTree.parse(path).getroot().iter("testcase"):
            name = f"{test.get('classname', '')}::{test.get('name')}"
            bad = next((e for e in test if e.tag in ("failure", "error")), None)
            if bad is not None:
                counts["failed"] += 1
                failures.append({"what": name, "error": (bad.get("message") or "")[:300]})
            elif any(e.tag == "skipped" for e in test):
                counts["skipped"] += 1
            else:
                counts["passed"] += 1
    return counts, failures


def from_logs(logs: list[str]) -> tuple[Row, list[Row]]:
    """Counts and failures of compute-sanitizer's runs, each NAME=EXIT STATUS=FILE."""
    counts = {"passed": 0, "failed": 0, "calls": 0, "errors": 0}
    failures = []
    for log in logs:
        name, code, path = log.split("=", 2)
        text = Path(path).read_text(errors="replace")
        errors = sum(map(int, re.findall(r"ERROR SUMMARY: (\d+) error", text)))
        errors += sum(map(int, re.findall(r"RACECHECK SUMMARY: .*\((\d+) errors", text)))
        counts["calls"] += sum(map(int, re.findall(r"op_sweep: (\d+) calls", text)))
        counts["errors"] += errors
        good = code == "0" and errors == 0
        counts["passed" if good else "failed"] += 1
        if not good:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            failures.append(
                {"what": name, "error": f"status {code}, {errors} errors: {last}"[:300]}
            )
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=("test-gpu", "sanitize"))
    parser.add_argument("--begin", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--arguments", default="", help="what was handed on: a part of the run")
    parser.add_argument("--junit", nargs="*", type=Path, default=[])
    parser.add_argument("--log", nargs="*", default=[], metavar="NAME=STATUS=FILE")
    parser.add_argument("--status", type=int, default=0, help="exit status of the whole")
    options = parser.parse_args()
    reports = [path for path in options.junit if path.is_file()]
    sanitize = options.check == "sanitize"
    counts, failures = from_logs(options.log) if sanitize else from_junit(reports)
    if options.status and not failures:  # it ended before a test could say so
        failures = [{"what": options.check, "error": f"exit status {options.status}"}]
    command = f"make {options.check}"
    if options.arguments:
        command += f" ARGS={options.arguments!r}"
    folder = folder_of(options.arguments)
    seconds = time.time() - options.begin
    path = write(options.check, counts, failures, seconds, folder, command=command)
    print(f"{options.check}: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
