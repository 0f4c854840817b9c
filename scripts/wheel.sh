#!/usr/bin/env bash
# Makes the source distribution and, from what that holds alone, the wheel: `make wheel`. Both go to dist/.
# PYTHON is an interpreter with everything of requirements.txt; the wheel is for its torch and its Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
version=$(cat VERSION)

rm -rf dist build/sdist python/fp8.egg-info  # an old egg-info would add its files to the archive
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
