#!/usr/bin/env bash
# Makes what a release consists of, into dist/: wheel, source distribution and SHA256SUMS (`make release`). Both are
# made twice, from objects compiled in two build folders, the second without ccache, and must have the same bytes;
# then both are tried in fresh environments, as `make test-wheel` and `make test-sdist` do.
#   scripts/release.sh               of a committed tree whose CHANGELOG names the version
#   scripts/release.sh --rehearsal   of any tree
# PYTHON is an interpreter with everything of requirements.txt; build/ has been built with it and with CMAKE_ARGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
version=$(cat VERSION)

if [ "${1:-}" != --rehearsal ]; then
  if [ -n "$(git status --porcelain)" ]; then
    echo "release: commit first, these files differ from the last commit:" >&2
    git status --short >&2
    exit 1
  fi
  if ! grep -q "^## \[$version\]" CHANGELOG.md; then
    echo "release: CHANGELOG.md has no heading '## [$version]', the version in VERSION" >&2
    exit 1
  fi
fi
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

again=$PWD/build/release/build
rm -rf build/release
FP8_BUILD_DIR=$PWD/build scripts/wheel.sh
mkdir -p build/release
mv dist build/release/first

read -ra options <<<"${CMAKE_ARGS:-}"
export CCACHE_DISABLE=1
cmake -S . -B "$again" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
  -DFP8_PYTHON_PACKAGE_DIR="$PWD/build/release/fp8" ${options[@]+"${options[@]}"} >/dev/null
cmake --build "$again" -j "$(scripts/jobs.sh)"
FP8_BUILD_DIR=$again scripts/wheel.sh

for file in dist/*; do
  cmp "$file" "build/release/first/${file#dist/}" || {
    echo "release: ${file#dist/} is not reproducible: compare dist/ with build/release/first/" >&2
    exit 1
  }
done
scripts/test_wheel.sh wheel
scripts/test_wheel.sh sdist
(cd dist && sha256sum -- * >SHA256SUMS && cat SHA256SUMS)
