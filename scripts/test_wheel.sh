#!/usr/bin/env bash
# Installs what `make wheel` made into a fresh virtual environment and tries it there.
#   scripts/test_wheel.sh wheel   make test-wheel
#   scripts/test_wheel.sh sdist   make test-sdist: pip builds it first, in a clean environment of its own
# pip gets torch from its index (some GB). For the wheel, WHEEL_SITE=FOLDER takes torch and the other packages from that
# site-packages folder instead; then only fp8 itself is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
version=$(cat VERSION)
case ${1:?wheel or sdist} in
  wheel) files=(dist/fp8-"$version"-*.whl) ;;
  sdist) files=("dist/fp8-$version.tar.gz") ;;
esac
[ -f "${files[0]}" ] || { echo "test-$1: ${files[0]} is missing, run \`make wheel\`" >&2; exit 1; }

unset PYTHONPATH  # a clone's python/ there would pass for an installed fp8
environment=$root/build/$1-env
rm -rf "$environment"
"$python" -m venv "$environment"
pip=("$environment/bin/python" -m pip --disable-pip-version-check install --quiet)
if [ "$1" = wheel ] && [ -n "${WHEEL_SITE:-}" ]; then
  echo "$WHEEL_SITE" >"$(echo "$environment"/lib/python3*/site-packages)/borrowed.pth"
  "${pip[@]}" --no-deps "$root/${files[0]}"
else
  "${pip[@]}" "$root/${files[0]}" numpy
fi

cd "$environment"  # not where a folder fp8 could be found
"$environment/bin/python" "$root/tests/wheel/smoke.py" "$root"
rm -rf "$environment"  # gigabytes; kept where something failed
