#!/usr/bin/env bash
# Makes the source distribution and, from what that holds alone, the wheel: `make wheel`. Both go to dist/.
#
# PYTHON is an interpreter with everything of requirements.txt. The wheel has a libfp8_torch for each torch of
# python/fp8/_native/versions.py, of which pip downloads those that are not installed (0.5 GB each, kept in
# build/torches), and a fp8._C for each Python whose headers are here:
#   TORCHES    "all", or "installed": a wheel for this torch and this Python alone, in minutes
#   PYTHONS    folders with Python.h, between colons; of each minor version from 3.11 on the first one counts
#              (default: /usr/include/python3.* and pyenv's)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
version=$(cat VERSION)
# Of libraries made on Debian 12: they ask for dlopen of GLIBC_2.34 (NVTX) and GLIBCXX_3.4.29. tests/wheel/audit.py
# checks it. So Debian 12, Ubuntu 22.04 and RHEL 9 are the oldest.
platform=manylinux_2_34_x86_64

# The headers and the libraries that are linked to; torch itself is not installed.
unpack_torch() { # unpack_torch RELEASE: prints the folder
  local folder=build/torches/$1
  if [ ! -f "$folder/torch/version.py" ]; then
    mkdir -p "$folder"
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$folder" "torch==$1" >&2
    "$python" - "$folder" <<'END'
import pathlib
import re
import sys
import zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("torch-*.whl")
wanted = re.compile(r"torch/(version\.py$|include/|lib/lib(c10|torch|torch_cpu|c10_cuda|torch_cuda)\.so$)")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if wanted.match(name)]
    # version.py comes last: it says that the rest is there.
    for name in sorted(names, key=lambda name: name.endswith("torch/version.py")):
        archive.extract(name, folder)
wheel.unlink()
END
  fi
  echo "$PWD/$folder/torch"
}

torches=""
if [ "${TORCHES:-all}" = all ]; then
  here=$("$python" -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')
  for release in $("$python" -c 'import runpy
for pair in runpy.run_path("python/fp8/_native/versions.py")["PAIRS"]: print(pair.release)'); do
    [ "${release%.*}" = "$here" ] || torches+=:$(unpack_torch "$release")
  done
  headers=""
  seen=" $("$python" -c 'import sys; print("3.%d" % sys.version_info[1])') " # that one is built anyway
  for folder in $(tr : ' ' <<<"${PYTHONS-$(echo /usr/include/python3.*/ ~/.pyenv/versions/*/include/python3.*/)}"); do
    minor=$(sed -n 's/^#define PY_VERSION *"\(3\.1[1-9]\).*/\1/p' "$folder/patchlevel.h" 2>/dev/null) || continue
    if [ -n "$minor" ] && [[ $seen != *" $minor "* ]] && [ -f "$folder/Python.h" ]; then
      seen+="$minor "
      headers+=:${folder%/}
    fi
  done
  echo "wheel: fp8._C for Python$seen"
  export FP8_WHEEL_TORCHES=$torches FP8_WHEEL_PYTHONS=$headers FP8_WHEEL_PLATFORM=$platform
fi

rm -rf dist build/sdist python/*.egg-info # an old egg-info would add its files to the archive
mkdir -p build/sdist
"$python" -c 'import setuptools.build_meta as backend; backend.build_sdist("dist")' >build/sdist/log
tar -xzf "dist/fp8-$version.tar.gz" -C build/sdist
# Again with nothing of this machine in it: the same sources, the same archive. (Wheels follow the variable themselves.)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
tar -C build/sdist --format=gnu --sort=name --mtime="@$SOURCE_DATE_EPOCH" --mode=u=rwX,go=rX --owner=0 --group=0 \
  --numeric-owner -cf - "fp8-$version" | gzip -9n >"dist/fp8-$version.tar.gz"
"$python" -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps \
  --wheel-dir dist "build/sdist/fp8-$version"
ls -l dist
