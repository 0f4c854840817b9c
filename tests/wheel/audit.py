"""Whether a wheel's libraries keep what its tag promises: `make test-wheel` runs this.

python audit.py WHEEL    needs readelf (binutils). A wheel of one machine (linux_x86_64) promises
nothing; manylinux_X_Y promises glibc X.Y and the libstdc++ that came with it (PEP 600).
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# auditwheel's policies: the newest symbol versions that a library may ask for.
POLICIES = {
    "2_28": {"GLIBC": "2.28", "GLIBCXX": "3.4.25", "CXXABI": "1.3.11", "GCC": "8.0.0"},
    "2_34": {"GLIBC": "2.34", "GLIBCXX": "3.4.29", "CXXABI": "1.3.13", "GCC": "8.0.0"},
}


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def too_new(library: Path, policy: dict[str, str]) -> list[str]:
    """Symbol versions past the policy's, "GLIBC_2.38"."""
    text = subprocess.check_output(["readelf", "--version-info", "--wide", library], text=True)
    wanted = set(re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", text))
    return [f"{k}_{v}" for k, v in sorted(wanted) if numbers(v) > numbers(policy[k])]


def foreign_paths(library: Path) -> list[str]:
    """Folders of a RUNPATH that do not lie where the library does."""
    text = subprocess.check_output(["readelf", "--dynamic", "--wide", library], text=True)
    paths = ":".join(re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text))
    return [path for path in paths.split(":") if path and not path.startswith("$ORIGIN")]


def main() -> None:
    wheel = Path(sys.argv[1])
    tag = re.search(r"-manylinux_(\d+_\d+)_\w+\.whl$", wheel.name)
    offences = []
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so"))
        assert libraries, f"{wheel.name} has no library"
        for library in libraries:
            name = library.relative_to(folder)
            offences += [f"{name}: RUNPATH has {path}" for path in foreign_paths(library)]
            if tag:
                offences += [f"{name} asks for {v}" for v in too_new(library, POLICIES[tag[1]])]
    for offence in offences:
        print(f"audit: {offence}", file=sys.stderr)
    print(
        f"audit: {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB, {len(libraries)} libraries"
    )
    sys.exit(bool(offences))


if __name__ == "__main__":
    main()
