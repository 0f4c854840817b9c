"""The list of deliberate faults fits the tree; `make test-faults` runs it."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/faults"))

from fault import apply  # noqa: E402
from faults import FAULTS  # noqa: E402


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_applied(fault, tmp_path):
    target = tmp_path / fault.file
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / fault.file, target)
    before = apply(fault, tmp_path)
    assert target.read_text() != before
    first, *more = fault.test.split()
    if first in ("ctest", "tsan"):
        assert [path.stem for path in ROOT.glob(f"tests/cpp/*/{more[0]}.cpp")] == more
    else:
        assert all((ROOT / path).exists() for path in (first, *more))


def test_faults_are_enough():
    assert sum(not fault.gpu for fault in FAULTS) >= 12
